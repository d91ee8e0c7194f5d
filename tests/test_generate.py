"""Answers of a bundle: the artefact's own tokens, as text, in a stream that ends where it should."""

from dataclasses import replace

import msgspec
import pytest

from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
from mobile_export.generate import generate
from mobile_export.targets import executorch


@pytest.fixture(scope="module")
def tokenizer(spec):
    return resolve(spec()).tokenizer()


@pytest.fixture(scope="module")
def greedy(sandbox_bundle):
    """The most likely tokens after a prompt, end-of-text ignored, computed by the runner alone."""
    runner = executorch.open(sandbox_bundle.path("program"))

    def answer(tokens, count):
        made, position, tokens = [], 0, list(tokens)
        while len(made) < count:
            made.append(int(runner.last_logits(tokens, position).argmax()))
            position, tokens = position + len(tokens), made[-1:]
        return made

    return answer


def text_of(tokenizer, tokens):
    """A character whose last bytes never came is not shown."""
    return tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def ending_at(bundle, *ids):
    return replace(
        bundle,
        manifest=msgspec.structs.replace(
            bundle.manifest, io=msgspec.structs.replace(bundle.manifest.io, eos_ids=list(ids))
        ),
    )


def test_a_raw_prompt_is_continued(sandbox_bundle, tokenizer, greedy):
    tokens = tokenizer("def f(x):")["input_ids"]
    pieces = list(generate(ending_at(sandbox_bundle), "def f(x):", raw=True, max_tokens=12))
    assert len(pieces) > 1 and all(pieces)
    assert "".join(pieces).rstrip("\ufffd") == text_of(tokenizer, greedy(tokens, 12))


@pytest.mark.parametrize("system", [None, "Be short."])
def test_a_chat_goes_through_the_template(sandbox_bundle, tokenizer, greedy, system):
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "hi"})
    tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    said = "".join(generate(ending_at(sandbox_bundle), "hi", system=system, max_tokens=6))
    assert said.rstrip("\ufffd") == text_of(tokenizer, greedy(tokens, 6))


def test_it_stops_at_an_end_of_text(sandbox_bundle, tokenizer, greedy):
    tokens = tokenizer("def f(x):")["input_ids"]
    made = greedy(tokens, 12)
    end = next(index for index in range(2, 12) if made[index] not in made[:index])
    bundle = ending_at(sandbox_bundle, 1, made[end])
    said = "".join(generate(bundle, "def f(x):", raw=True, max_tokens=12))
    assert said.rstrip("\ufffd") == text_of(tokenizer, made[:end])
    first = ending_at(sandbox_bundle, made[0])
    assert list(generate(first, "def f(x):", raw=True)) == []


def test_it_stops_when_the_cache_is_full(sandbox_bundle, tokenizer, greedy):
    prompt = "a b c d e f g h i j k l m n o p"
    tokens = tokenizer(prompt)["input_ids"]
    room = 64 - len(tokens)
    assert 10 < room < 60
    said = "".join(generate(ending_at(sandbox_bundle), prompt, raw=True, max_tokens=1000))
    assert said.rstrip("\ufffd") == text_of(tokenizer, greedy(tokens, room))


def test_a_prompt_that_leaves_no_room(sandbox_bundle, tokenizer):
    words = "zq" * 70
    count = len(tokenizer(words)["input_ids"])
    assert count > 64
    with pytest.raises(
        ExportError, match=f"the prompt has {count} tokens, and the bundle's context is 64; s"
    ):
        next(generate(sandbox_bundle, words, raw=True))
    with pytest.raises(ExportError, match="the prompt has 0 tokens"):
        next(generate(sandbox_bundle, "", raw=True))
    full = tokenizer.decode([5] * 64)
    assert len(tokenizer(full)["input_ids"]) == 64
    with pytest.raises(ExportError, match="64 tokens, and the bundle's context is 64"):
        next(generate(sandbox_bundle, full, raw=True))


def test_a_temperature_draws_by_its_seed(sandbox_bundle):
    bundle = ending_at(sandbox_bundle)

    def draw(temperature, seed):
        pieces = generate(bundle, "one", raw=True, max_tokens=20, temperature=temperature, seed=seed)
        return "".join(pieces)

    assert draw(1.0, 3) == draw(1.0, 3)
    assert len({draw(1.0, seed) for seed in range(4)}) == 4
    assert draw(1e-9, 5) == draw(0.0, 6)


def test_the_stock_runner_says_the_same(sandbox_bundle, tokenizer, greedy, stock_runner):
    """Its Python binding takes whole characters only, which a random model seldom says for long."""

    def clean(prompt):
        made = greedy(tokenizer(prompt)["input_ids"], 12)
        texts = [tokenizer.decode([token]) for token in made]
        return next((at for at, text in enumerate(texts) if not text.isascii() or made[at] > 1020), 12)

    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    prompt = max((f"{word} is" for word in words), key=clean)
    count = clean(prompt)
    assert count >= 3
    pieces = stock_runner(sandbox_bundle, prompt, count)
    assert len(pieces) == count
    ours = generate(ending_at(sandbox_bundle), prompt, raw=True, max_tokens=count)
    assert "".join(pieces) == "".join(ours)
