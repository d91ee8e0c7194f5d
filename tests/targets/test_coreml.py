"""The `.mlpackage` in the evaluator against the quantized program; what it holds; what parity would catch."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch

from mobile_export.bundle import load, verify
from mobile_export.errors import ExportError
from mobile_export.evaluate.ranges import Ranges
from mobile_export.export import export
from mobile_export.inspect import inspect
from mobile_export.mlpackage import open_package
from mobile_export.parity import kl_divergence
from mobile_export.recipe import CoreML
from mobile_export.targets import coreml, coreml_graph, reference

FAMILIES = ("qwen2", "qwen3", "llama")
TOKENS = [3 + 37 * index % 500 for index in range(48)]
ABOUT = {"short": "a test", "license": "Apache-2.0"}


def lower(program, folder, **options):
    out = folder / "model.mlpackage"
    coreml.lower(program, CoreML(chunk=16, **options), ABOUT, out)
    return out


def kl(reference_logits, logits):
    totals = [np.logaddexp.reduce(rows.astype(np.float64), axis=1) for rows in (reference_logits, logits)]
    return kl_divergence(reference_logits, totals[0], logits, totals[1])


@pytest.fixture(scope="module", params=FAMILIES)
def lowered(request, programs_of, spec, tmp_path_factory):
    """(quantized program, package) of a family."""
    quantized = programs_of(spec(request.param))[2]
    return quantized, lower(quantized, tmp_path_factory.mktemp("coreml"))


@pytest.fixture(scope="module")
def qwen2(programs_of, spec):
    return programs_of(spec("qwen2"))[2]


@pytest.fixture(scope="module")
def expected(qwen2):
    return reference.open(qwen2).logits(TOKENS, 0)


@pytest.mark.parametrize(("arithmetic", "limit"), [("fp32", 1e-4), ("fp16", 1e-3)])
def test_it_says_what_the_quantized_program_says(lowered, arithmetic, limit):
    quantized, package = lowered
    wanted = reference.open(quantized).logits(TOKENS, 0)
    runner = coreml.open(package, arithmetic=arithmetic)
    logits = runner.logits(TOKENS, 0)
    assert kl(wanted, logits).mean() <= limit
    runner.reset()
    assert np.abs(runner.last_logits(TOKENS, 0) - logits[-1]).max() <= 0.02


def test_chunks_and_single_tokens_agree_up_to_the_caches_end(lowered):
    quantized, package = lowered
    context = quantized.dims.context
    tokens = [3 + 11 * index % 500 for index in range(context)]
    runner = coreml.open(package, arithmetic="fp32")
    whole = runner.logits(tokens, 0)
    assert whole.shape == (context, quantized.dims.vocab)
    runner.reset()
    for at in range(0, context, 23):
        rows = runner.logits(tokens[at : at + 23], at)
        assert np.abs(rows - whole[at : at + 23]).max() <= 1e-3


def test_what_the_package_holds(lowered):
    quantized, path = lowered
    package = open_package(path)
    assert set(package.functions) == {"decode", "prefill", "prefill_all"}
    layers = quantized.dims.layers
    for function in package.functions:
        ops = [op.type for op in package.operations(function)]
        assert ops.count("scaled_dot_product_attention") == layers
        assert ops.count("write_state") == 2 * layers
        tables = {op.outputs[0].name: op.type for op in package.operations(function) if op.outputs}
        assert tables["rotary_cos"] == tables["rotary_sin"] == "const"
        biases = [
            op.inputs["bias"].arguments[0].name for op in package.operations(function) if op.type == "linear"
        ]
        assert len(biases) == 7 * layers + 1
        assert len([name for name in set(biases) if not name.endswith("_bias")]) <= 4, "zeros, one a width"
    assert len({codes.blob for codes in package.codes().values()}) == len(package.codes())
    for function in package.spec.description.functions:
        assert all(one.shortDescription for one in (*function.input, *function.output, *function.state))


def test_the_codes_are_the_shared_ones_bit_for_bit(lowered):
    quantized, path = lowered
    state = quantized.exported.state_dict | quantized.exported.constants
    ours = {digest(tensor.numpy()) for name, tensor in state.items() if name.endswith("_codes")}
    theirs = [digest(codes.data) for codes in open_package(path).codes().values()]
    assert set(theirs) == ours and len(theirs) == len(ours)


def test_the_pte_and_the_package_hold_the_same_codes(sandbox_bundle, missing_codes, qwen2, tmp_path):
    package = open_package(lower(qwen2, tmp_path))
    codes = {name: one.data for name, one in package.codes().items()}
    assert codes and not missing_codes(sandbox_bundle.path("program"), codes)


def test_one_function_of_any_length(qwen2, expected, tmp_path):
    package = lower(qwen2, tmp_path, flexible=True)
    assert set(open_package(package).functions) == {"main"}
    runner = coreml.open(package, arithmetic="fp32")
    assert kl(expected, runner.logits(TOKENS, 0)).mean() <= 1e-4
    runner.reset()
    runner.last_logits(TOKENS[:31], 0)
    last = [runner.last_logits(TOKENS[at : at + 1], at) for at in range(31, 48)]
    assert kl(expected[31:], np.stack(last)).mean() <= 1e-4


def test_without_a_function_for_every_position_it_goes_token_by_token(qwen2, expected, tmp_path):
    package = lower(qwen2, tmp_path, all_logits=False)
    assert set(open_package(package).functions) == {"decode", "prefill"}
    runner = coreml.open(package, arithmetic="fp32")
    assert kl(expected[:8], runner.logits(TOKENS[:8], 0)).mean() <= 1e-4


def test_two_packages_have_the_same_bytes(qwen2, tmp_path):
    first, second = (lower(qwen2, tmp_path / name) for name in ("a", "b"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 3
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_bundle_that_answers(tmp_path, cli, spec):
    out = tmp_path / "ios"
    result = export("ios", model=spec("qwen2"), out=out)
    bundle = load(out)
    verify(bundle)
    assert bundle.path("program").name == "model.mlpackage"
    assert set(result.manifest.quality) == {
        "source -> artifact fp32, short prompts",
        "source -> artifact fp16, short prompts",
    }
    assert "not on the device" in result.manifest.runtime.notes[0]
    done = cli("inspect", "--ranges", out)
    assert done.returncode == 0 and "layers_1_" in done.stdout
    done = cli("inspect", out)
    assert "Function prefill" in done.stdout and "scaled_dot_product_attention 2" in done.stdout
    assert inspect(bundle.path("program")).package == inspect(out).package
    done = cli("parity", "--quick", "--runtime", "coreml", "--artifact-only", out)
    if sys.platform != "darwin":
        assert done.returncode == 2 and "Core ML runs on a Mac only" in done.stderr
    done = cli("parity", "--quick", "--artifact-only", "--json", out)
    assert "not on the device" in json.loads(done.stdout)["claim"]
    stages = [line["stage"] for line in json.loads(done.stdout)["stages"]]
    assert done.returncode == 0 and stages == ["artifact fp32", "artifact fp16", "artifact fp16"]
    assert cli("run", out, "Hello", "--max-tokens", "3").returncode == 0
    assert cli("lint", out).returncode == 0


def test_an_op_past_fp16_is_named_with_its_layer(qwen2, spec, tmp_path, monkeypatch):
    """A norm whose weight is huge: its own product leaves the range."""
    value = coreml_graph.Functions.value

    def huge(self, name, make, dtype):
        found = value(self, name, make, dtype)
        return np.full_like(found, 6e4) if "layers_1_post_attention" in name else found

    monkeypatch.setattr(coreml_graph.Functions, "value", huge)
    runner = coreml.open(lower(qwen2, tmp_path), arithmetic="fp32")
    runner.tap = ranges = Ranges()
    runner.logits(TOKENS, 0)
    worst = ranges.overflowing()[0]
    assert worst.layer == 1 and worst.name == "layers_1_post_attention_layernorm"
    with pytest.raises(ExportError, match="mul 'layers_1_post_attention_layernorm' of layer 1 reaches"):
        export("ios", model=spec("qwen2"), out=tmp_path / "ios")
    assert not (tmp_path / "ios").exists()


class TestNegativeControls:
    """What is broken is seen, far beyond what parity allows; or in the codes, where logits cannot see it."""

    def broken(self, qwen2, folder):
        return coreml.open(lower(qwen2, folder), arithmetic="fp32").logits(TOKENS, 0)

    def test_keys_and_values_swapped(self, qwen2, expected, tmp_path, monkeypatch):
        attention = coreml_graph._Writer._attention
        monkeypatch.setattr(
            coreml_graph._Writer,
            "_attention",
            lambda self, node, q, k, v, *rest: attention(self, node, q, v, k, *rest),
        )
        assert kl(expected, self.broken(qwen2, tmp_path)).mean() > 0.01

    def test_no_mask(self, qwen2, expected, tmp_path, monkeypatch):
        positions = coreml_graph._Writer._positions

        def open_mask(self):
            positions(self)
            self.mask = self._op("logical_or", "open", x=self.mask, y=True)

        monkeypatch.setattr(coreml_graph._Writer, "_positions", open_mask)
        assert kl(expected, self.broken(qwen2, tmp_path)).mean() > 0.01

    def test_sigmoid_for_silu(self, qwen2, expected, tmp_path, monkeypatch):
        forms = coreml_graph._Writer._forms

        def changed(self):
            silu = torch.ops.aten.silu.default
            return forms(self) | {silu: lambda node, x: self._op("sigmoid", "silu", x=self._of(x))}

        monkeypatch.setattr(coreml_graph._Writer, "_forms", changed)
        assert kl(expected, self.broken(qwen2, tmp_path)).mean() > 0.01

    def test_another_rope_base(self, qwen2, expected, tmp_path, monkeypatch):
        tables = coreml_graph.rotary_tables

        def stretched(program):
            cos, sin = tables(program)
            rows = torch.arange(len(cos)) // 2
            return [cos[rows], sin[rows]]

        monkeypatch.setattr(coreml_graph, "rotary_tables", stretched)
        assert kl(expected, self.broken(qwen2, tmp_path)).mean() > 0.003

    def test_state_not_carried(self, qwen2, expected, tmp_path):
        runner = coreml.open(lower(qwen2, tmp_path), arithmetic="fp32")
        rows = []
        for at in range(0, len(TOKENS), 24):
            runner.reset()
            rows.append(runner.logits(TOKENS[at : at + 24], at))
        assert kl(expected[24:], rows[1]).mean() > 0.01

    def test_a_scale_flipped_and_weights_zeroed(self, qwen2, tmp_path):
        """In the package's own file: hashes of codes and scales see what logits may not."""
        path = lower(qwen2, tmp_path)
        before = seen(path)
        name, codes = sorted(open_package(path).codes().items())[0]
        weights = path / "Data/com.apple.CoreML" / codes.blob.file
        whole = bytearray(weights.read_bytes())
        at = whole.find(np.ascontiguousarray(codes.data).tobytes())
        whole[at : at + 4096] = bytes(4096)
        weights.write_bytes(whole)
        after = seen(path)
        assert [one for one in before if before[one] != after[one]] == [name]
        other, scaled = next((n, c) for n, c in sorted(open_package(path).codes().items()) if n != name)
        at = whole.find(np.ascontiguousarray(scaled.scale).tobytes())
        whole[at + 1] ^= 0x80
        weights.write_bytes(whole)
        assert [one for one in before if before[one] != seen(path)[one]] == sorted([name, other])


def seen(path):
    return {
        name: (digest(one.data), digest(one.scale))
        for name, one in sorted(open_package(path).codes().items())
    }


def digest(data):
    return hashlib.sha256(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data).hexdigest()
