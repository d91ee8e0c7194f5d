import json
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoTokenizer

from mobile_export.checkpoint import resolve
from mobile_export.checkpoint.load import eos_ids
from mobile_export.errors import ExportError

TEXTS = [
    "Hello, world! It's 2026 and we'll print(x[1234]).",
    "你好，世界。ドラえもん naïve façade Ångström",
    "مرحبا 👩‍👩‍👧‍👦🇨🇭 a\n\n\n  b\t\tc   ",
    "<|im_start|>user\nhi<|im_end|>",
]


def refused(path):
    with pytest.raises(ExportError) as error:
        resolve(str(path))
    assert str(path.parent) not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_fp32_gguf_is_the_same_model(family, sandbox, write_gguf):
    source = sandbox(family)
    checkpoint = resolve(str(write_gguf(source)))
    assert (checkpoint.name, checkpoint.spec, checkpoint.family) == ("tiny", "tiny.gguf", family)
    first, second = source.model(), checkpoint.model()
    assert second.lm_head.weight is second.model.embed_tokens.weight
    weights = second.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items())
    ids = torch.tensor([list(range(0, 512, 9))])
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert first.config.rms_norm_eps == second.config.rms_norm_eps
    assert first.config.rope_parameters == second.config.rope_parameters
    assert eos_ids(source) == eos_ids(checkpoint)


def test_tokenizer_is_the_same(sandbox, write_gguf):
    source = sandbox()
    path = write_gguf(source)
    first, second = source.tokenizer(), resolve(str(path)).tokenizer()
    chat = [{"role": "user", "content": "hi"}]
    assert first.apply_chat_template(chat, tokenize=False) == second.apply_chat_template(chat, tokenize=False)
    auto = AutoTokenizer.from_pretrained(resolve(str(path)).folder)
    for text in TEXTS:
        assert first.encode(text) == second.encode(text) == auto.encode(text)
    assert (first.eos_token, first.pad_token, first.bos_token) == (
        second.eos_token,
        second.pad_token,
        second.bos_token,
    )


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("qwen2", "a 123\n\n2 it's", ["a", "Ġ", "1", "2", "3", "ĊĊ", "2", "Ġit", "'s"]),
        ("llama-bpe", "a 1234\n\n2", ["a", "Ġ", "123", "4", "ĊĊ", "2"]),
        ("smollm", "a 123\n\n2", ["a", "Ġ", "1", "2", "3", "ĊĊ", "2"]),
        ("gpt-2", "a 123\n\n2", ["a", "Ġ123", "Ċ", "Ċ", "2"]),
        ("default", "a 123", ["a", "Ġ123"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(pre, text, pieces, sandbox, write_gguf):
    tokenizer = resolve(str(write_gguf(sandbox(), pre=pre))).tokenizer().backend_tokenizer
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_bytes_are_the_same_each_time(sandbox, write_gguf, tmp_path, monkeypatch):
    path = write_gguf(sandbox(), license="apache-2.0")
    first = resolve(str(path))
    assert first.license == "Apache-2.0"
    monkeypatch.setenv("MOBILE_EXPORT_CACHE", str(tmp_path / "other"))
    other = shutil.copy(path, tmp_path / "renamed.gguf")
    second = resolve(str(other))
    assert first.digest == second.digest and first.provenance == second.provenance
    assert second.name == "renamed"


def test_converted_once(sandbox, write_gguf):
    path, lines = write_gguf(sandbox()), []
    resolve(str(path), progress=lines.append)
    assert lines[0] == "reading tiny.gguf" and lines[-1].startswith("converted tiny.gguf in ")
    count = len(lines)
    resolve(str(path), progress=lines.append)
    assert len(lines) == count


def test_interrupted_conversion_leaves_nothing(sandbox, write_gguf, cache):
    path = write_gguf(sandbox())

    def interrupt(line):
        if line.startswith("dequantising"):
            raise KeyboardInterrupt

    before = sorted((cache / "checkpoints").iterdir())
    with pytest.raises(KeyboardInterrupt):
        resolve(str(path), progress=interrupt)
    assert sorted((cache / "checkpoints").iterdir()) == before
    assert resolve(str(path)).model() is not None


KILLED = """
import os, signal, sys
from mobile_export.checkpoint import resolve
def die(line):
    if line.startswith("dequantising"):
        os.kill(os.getpid(), signal.SIGKILL)
resolve(sys.argv[1], progress=die)
"""


def test_killed_conversion_leaves_nothing(sandbox, write_gguf, cache):
    path = write_gguf(sandbox())
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert not list((cache / "checkpoints").glob("gguf-*"))
    assert list((cache / "checkpoints").glob(".gguf-*"))
    assert resolve(str(path)).digest
    assert not list((cache / "checkpoints").glob(".gguf-*"))


def test_head_and_embedding_quantised_apart_stay_tied(sandbox, write_gguf):
    source = sandbox()
    types = {"token_embd.weight": Type.Q4_0, "output.weight": Type.Q8_0}
    model = resolve(str(write_gguf(source, types=types))).model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exact = source.model().lm_head.weight
    assert (model.lm_head.weight - exact).abs().max() < exact.abs().max() / 127  # the finer copy


def test_untied_head_stays_untied(sandbox, write_gguf):
    source = sandbox(more="&tied=0")
    model = resolve(str(write_gguf(source))).model()
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, source.model().lm_head.weight)


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.1, 0.3, 0.9, 0.9999])
def test_truncated(share, sandbox, write_gguf):
    path = write_gguf(sandbox())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    says = refused(path)
    assert "damaged or cut short" in says or "not a GGUF" in says


def test_altered_anywhere_never_a_traceback(sandbox, write_gguf):
    path, rng = write_gguf(sandbox()), random.Random(0)
    data = path.read_bytes()
    outcomes = set()
    for _ in range(60):
        altered = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            altered[rng.randrange(16_000)] = rng.randrange(256)  # metadata and tensor infos
        path.write_bytes(altered)
        try:
            resolve(str(path))
            outcomes.add("accepted")
        except ExportError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_not_finite(sandbox, write_gguf):
    path = write_gguf(sandbox())
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    assert "not finite" in refused(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arch": "mamba"}, "unsupported architecture 'mamba'"),
        ({"model": "llama"}, "tokenizer is of type 'llama'"),
        ({"pre": "tekken"}, "cuts text by 'tekken'"),
        ({"drop": ["blk.1.attn_q.weight"]}, "lacks 1 tensors, e.g. blk.1.attn_q.weight"),
        ({"drop": ["token_embd.weight"]}, "embedding"),
        ({"layers": 1}, "tensors we do not know, e.g. blk.1."),
        ({"layers": 10**9}, "lacks layers"),
        ({"kinds": 511}, "does not fit its embedding"),
        ({"eos": 512}, "'eos_token_id' is not in its vocabulary"),
        ({"rope_scaling": "yarn"}, "scales its rope (yarn)"),
    ],
)
def test_refused(changes, says, sandbox, write_gguf):
    assert says in refused(write_gguf(sandbox(), **changes))


def test_unknown_quantization(sandbox, write_gguf):
    path = write_gguf(sandbox(), types={"blk.0.attn_q.weight": Type.Q8_0})
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    assert data[at] == Type.Q8_0
    data[at] = 99
    path.write_bytes(data)
    assert "unknown type 99" in refused(path)


def test_known_type_that_holds_no_weights(sandbox, write_gguf):
    path = write_gguf(sandbox())
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    assert data[at] == Type.F32
    data[at] = Type.I32
    path.write_bytes(data)
    assert "type I32 cannot be read" in refused(path)


def test_other_versions(sandbox, write_gguf):
    path = write_gguf(sandbox())
    data = bytearray(path.read_bytes())
    data[4] = 1
    path.write_bytes(data)
    assert "GGUF version 1" in refused(path)


def test_not_a_gguf(tmp_path, cache):
    path = tmp_path / "model.gguf"
    path.write_text(json.dumps({"no": "model"}))
    assert "'model.gguf' is not a GGUF file" in refused(path)
