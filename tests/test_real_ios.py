"""The default model's Core ML bundle: its size, what it holds, and what the evaluator says it says."""

import pytest

from mobile_export import fp16_ranges
from mobile_export.lint import lint
from mobile_export.mlpackage import open_package
from mobile_export.stages import STAGES, inputs, parity

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def bundle(real_bundles):
    return real_bundles("ios")


@pytest.fixture(scope="module")
def package(bundle):
    return open_package(bundle.path("program"))


def test_it_is_small_and_attention_is_fused(bundle, package):
    files = [file for file in bundle.path("program").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 500e6
    assert set(package.functions) == {"decode", "prefill", "prefill_all"}
    for function in package.functions:
        ops = [op.type for op in package.operations(function)]
        assert ops.count("scaled_dot_product_attention") == 24
        assert ops.count("constexpr_blockwise_shift_scale") == 24 * 7 + 2
    assert not lint(bundle).fails()


def test_its_codes_are_the_ptes(package, real_bundle, missing_codes):
    codes = {name: one.data for name, one in package.codes().items()}
    assert len(codes) == 24 * 7 + 2
    parts = real_bundle.manifest.recipe.table["executorch"]["mlp_parts"]
    assert not missing_codes(real_bundle.path("program"), codes, parts)


def test_both_arithmetics_keep_their_limits_on_the_whole_golden(bundle):
    report = parity(inputs(bundle), STAGES[-1:])
    for line in report.stages:
        print(line.against, line.stage, line.metrics)
    assert report.passed, [line for line in report.stages if not line.passed]
    exact, rounding, rounded = report.stages
    assert (exact.stage, rounding.against, rounded.against) == ("artifact fp32", "artifact fp32", "golden")
    assert exact.metrics.positions >= 2000
    assert exact.metrics.kl_mean <= 0.003 and exact.metrics.top1 >= 0.98
    assert rounded.metrics.kl_mean <= exact.metrics.kl_mean + 0.002


def test_no_op_comes_near_the_end_of_fp16(bundle):
    worst = fp16_ranges.measure(bundle)[0]
    print(worst)
    assert 100 < worst.largest < 0.1 * 65504 and worst.layer is not None


def test_its_code_does_what_was_asked(bundle, writes_right_code):
    writes_right_code(bundle, max_tokens=80)
