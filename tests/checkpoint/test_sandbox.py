import unicodedata

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mobile_export.checkpoint import resolve
from mobile_export.checkpoint.load import eos_ids
from mobile_export.errors import ExportError
from mobile_export.files import sha256_file

FAMILIES = ("qwen2", "qwen3", "llama")


def hashes(checkpoint):
    return {p.name: sha256_file(p) for p in checkpoint.folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_spec_same_bytes(family, sandbox, tmp_path, monkeypatch):
    first = sandbox(family)
    monkeypatch.setenv("MOBILE_EXPORT_CACHE", str(tmp_path / "other"))
    second = sandbox(family)
    assert first.folder != second.folder
    assert hashes(first) == hashes(second)
    assert first.digest == second.digest


def test_seed_and_sizes_give_other_models(sandbox):
    digests = {sandbox(more=more).digest for more in ("", "&seed=1", "&context=128", "&tied=0", "&heads=2")}
    assert len(digests) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_family_loads_and_tells_tokens_apart(family, sandbox):
    checkpoint = sandbox(family)
    model = checkpoint.model()
    assert (checkpoint.family, model.config.model_type) == (family, family)
    assert model.dtype == torch.float32 and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = checkpoint.tokenizer()("The quick brown fox", return_tensors="pt").input_ids
    logits = model(ids).logits[0]
    assert logits.std() > 1
    assert len(set(logits.argmax(-1).tolist())) > 1


def test_untied(sandbox):
    model = sandbox(more="&tied=0").model()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_qwen2_biases_matter(sandbox):
    model = sandbox().model()
    assert all(layer.self_attn.k_proj.bias.abs().max() > 0.05 for layer in model.model.layers)


@pytest.mark.parametrize("size", [260, 512, 2000])
def test_vocabulary_has_the_size_asked_for(size, cache):
    checkpoint = resolve(f"sandbox:qwen2?vocab={size}")
    assert len(checkpoint.tokenizer()) == size == checkpoint.model().config.vocab_size


def test_chat_tokens_are_single_ids(sandbox):
    checkpoint = sandbox()
    tokenizer = checkpoint.tokenizer()
    ids = [tokenizer.encode(token) for token in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")]
    assert all(len(one) == 1 for one in ids)
    assert eos_ids(checkpoint) == ids[0] + ids[1]
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILE_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve("sandbox:qwen2?vocab=512").tokenizer()


@settings(deadline=None, max_examples=300)
@example("e\u0301 \u30c8\u3099")
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_survives(tokenizer, text):
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sandbox:qwen2?layer=2", "did you mean 'layers'?"),
        ("sandbox:qwen2?layers=two", "whole number"),
        ("sandbox:qwen2?layers=0", "0"),
        ("sandbox:qwen2?vocab=259", "260 or more"),
        ("sandbox:qwen2?heads=3&kv_heads=2", "multiple of kv_heads"),
        ("sandbox:qwen2?hidden=66", "does not fit"),
        ("sandbox:gpt2", "unsupported architecture 'gpt2'"),
        ("sandbox:", "unsupported architecture ''"),
    ],
)
def test_wrong_spec(spec, says, cache):
    with pytest.raises(ExportError) as error:
        resolve(spec)
    assert says in str(error.value)


def test_altered_cache_is_made_again(sandbox):
    first = sandbox()
    weights = first.folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert sandbox().digest == first.digest
    assert weights.read_bytes() != bytes(data)
