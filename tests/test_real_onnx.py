"""The default model's ONNX bundle: its size, its codes, and what ONNX Runtime says with it."""

import hashlib

import numpy as np
import onnx
import pytest

from mobile_export.lint import lint
from mobile_export.mlpackage import open_package
from mobile_export.stages import STAGES, inputs, parity
from mobile_export.targets.onnx_file import data_file
from mobile_export.targets.onnx_weights import codes_of

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def bundle(real_bundles):
    return real_bundles("onnx")


def test_it_is_small_and_valid(bundle):
    model = bundle.path("program")
    assert model.stat().st_size + data_file(model).stat().st_size <= 515e6
    onnx.checker.check_model(model)
    ops = [node.op_type for node in onnx.load(model, load_external_data=False).graph.node]
    assert ops.count("GroupQueryAttention") == 24
    assert not lint(bundle).fails()


def test_all_three_artefacts_hold_the_same_codes(bundle, real_bundles, missing_codes):
    codes = codes_of(bundle.path("program"))
    assert len(codes) == 24 * 7 + 2
    package = open_package(real_bundles("ios").path("program"))
    assert {sha256(one) for one in codes.values()} == {sha256(one.data) for one in package.codes().values()}
    android = real_bundles("android")
    parts = android.manifest.recipe.table["executorch"]["mlp_parts"]
    assert not missing_codes(android.path("program"), codes, parts)


def sha256(codes):
    return hashlib.sha256(np.ascontiguousarray(codes)).hexdigest()


def test_it_keeps_its_limits_on_the_whole_golden(bundle):
    report = parity(inputs(bundle), STAGES[-1:])
    (line,) = report.stages
    print(line.metrics)
    assert report.passed, report
    assert line.metrics.positions >= 2000
    assert 0 < line.metrics.kl_mean <= 0.003


def test_its_code_does_what_was_asked(bundle, writes_right_code):
    writes_right_code(bundle, max_tokens=200)


def test_genai_says_what_our_runner_says(bundle):
    from mobile_export.targets import onnx as target
    from mobile_export.tokenizers_io import chat_ids

    target.runtime()  # telemetry off before genai loads the same library
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai does not import here")
    prompt = chat_ids(bundle, "Name three primary colours.")
    model = genai.Model(str(bundle.folder))
    generator = genai.Generator(model, genai.GeneratorParams(model))
    generator.append_tokens(np.array(prompt, np.int32))
    runner = target.open(bundle.path("program"))
    row, expected, theirs = runner.last_logits(prompt, 0), [], []
    for at in range(len(prompt), len(prompt) + 24):
        expected.append(int(row.argmax()))
        row = runner.last_logits(expected[-1:], at)
        if not generator.is_done():
            generator.generate_next_token()
            theirs.append(int(generator.get_next_tokens()[0]))
    assert theirs == expected[: len(theirs)] and len(theirs) >= 4
