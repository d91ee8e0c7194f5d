"""Answers: asked by the chat template, generated greedily, cut where they end, executed."""

import numpy as np
import pytest

from mobile_export.checkpoint import resolve
from mobile_export.tasks import code
from mobile_export.tasks.code import extract, solve
from mobile_export.tasks.sets import Problem

PROBLEM = Problem(name="one", ask="Write f.", tests="assert f() == 1")
RIGHT = "def f():\n    return 1\n"


@pytest.fixture(scope="module")
def tokenizer(spec):
    return resolve(spec()).tokenizer()


class Says:
    """A model that answers with a text, then with `end` for ever."""

    vocab = 1024

    def __init__(self, tokenizer, answer, end, context=2048):
        self.script, self.end, self.context = tokenizer(answer)["input_ids"], end, context
        self.fed = []

    def last_logits(self, tokens, start):
        assert start == len(self.fed), "each token once, after those before"
        self.fed += tokens
        self.prompt = self.prompt or len(self.fed)
        at = len(self.fed) - self.prompt
        row = np.zeros(self.vocab, np.float32)
        row[self.script[at] if at < len(self.script) else self.end] = 1
        return row

    def reset(self):
        self.fed, self.prompt = [], 0


def ask(tokenizer, answer, **more):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    runner = Says(tokenizer, answer, end, **more)
    return solve(runner, tokenizer, {end}, PROBLEM, "Only code."), runner


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (f"Here:\n```python\n{RIGHT}```", "passed"),
        (RIGHT, "passed"),
        ("```python\ndef f():\n    return 2\n```", "AssertionError"),
        ("I cannot do that.", "SyntaxError: invalid syntax (answer, line 1)"),
        ("", "NameError: name 'f' is not defined"),
    ],
)
def test_an_answer_is_executed(tokenizer, answer, verdict):
    result, _ = ask(tokenizer, answer)
    assert (result.name, result.verdict, result.answer) == ("one", verdict, answer)
    assert result.tokens == len(tokenizer(answer)["input_ids"])


def test_the_request_is_one_turn_of_the_chat_template(tokenizer):
    _, runner = ask(tokenizer, "x")
    asked = tokenizer.decode(runner.fed[: runner.prompt])
    assert asked == "<|im_start|>user\nWrite f. Only code.<|im_end|>\n<|im_start|>assistant\n"


def test_what_follows_the_block_is_not_generated(tokenizer):
    block = f"```python\n{RIGHT}```"
    result, _ = ask(tokenizer, block + "\nThis function returns one. " * 20)
    assert result.verdict == "passed"
    assert result.answer.startswith(block) and len(result.answer) <= len(block) + 1


def test_it_ends_after_so_many_tokens_and_when_the_cache_is_full(tokenizer, monkeypatch):
    monkeypatch.setattr(code, "MOST_TOKENS", 30)
    result, _ = ask(tokenizer, "x = 1\n" * 100)
    assert result.tokens == 30
    _, runner = ask(tokenizer, "")
    room = runner.prompt + 5
    result, runner = ask(tokenizer, "x = 1\n" * 100, context=room)
    assert result.tokens == 5 and len(runner.fed) <= room
    result, _ = ask(tokenizer, RIGHT, context=runner.prompt)
    assert (result.tokens, result.verdict) == (0, "the prompt leaves no room")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("```python\na\n```\ntext\n```python\nb\n```", "a\n"),
        ("```py\na\n", "a\n"),
        ("```\na\nb\n```", "a\nb\n"),
        ("1. so:\n  ```python\n  a\n    b\n  ```", "a\n  b\n"),
        ("a = '```'", "a = '```'"),
        ("```python\na = '```'\n```", "a = '```'\n"),
        ("text", "text"),
    ],
)
def test_the_first_block(answer, found):
    assert extract(answer) == found
