"""The real bundle of the small model; where a rule must fire, its summary altered in that one place."""

from dataclasses import replace

import msgspec
import pytest

from mobile_export.lint import executorch, lint


@pytest.fixture(scope="module")
def looked(sandbox_bundle):
    return executorch.look(sandbox_bundle)


def altered(looked, *, drop=(), constants=None, **forward):
    method = msgspec.structs.replace(looked.forward, **forward)
    others = [one for one in looked.program.methods if one.name != "forward"]
    kept = {name: value for name, value in looked.program.constants.items() if name not in drop}
    program = msgspec.structs.replace(
        looked.program, methods=[method, *others], constants={**kept, **(constants or {})}
    )
    return replace(looked, program=program)


def said(rule, looked):
    [one] = [one for one in executorch.RULES if one.id == rule]
    return list(one.check(looked))


def test_the_stock_export_has_no_warning(sandbox_bundle):
    report = lint(sandbox_bundle)
    quiet = [one for one in report.findings if one.rule != "executorch-context-memory"]
    assert {one.severity for one in quiet} == {"info"}
    assert not report.fails()


def test_methods_the_runner_needs(looked):
    rule = "executorch-runner-methods"
    assert not said(rule, looked)
    assert "get_eos_ids" in said(rule, altered(looked, drop=["get_eos_ids"]))[0]
    assert said(rule, altered(looked, constants={"get_max_seq_len": 32})) == [
        "get_max_seq_len is 32 and get_max_context_len 64"
    ]


def test_kernels_in_no_stock_package(looked):
    rule = "executorch-unknown-kernels"
    assert not said(rule, looked)
    other = altered(looked, operators={**looked.forward.operators, "mine::attention.out": 2})
    assert "mine" in said(rule, other)[0]


def test_no_delegate(looked):
    rule = "executorch-no-delegate"
    assert not said(rule, looked)
    assert said(rule, altered(looked, delegates={}))


@pytest.mark.parametrize(
    "operator", ["aten::linear.out", "aten::_softmax.out", "quantized_decomposed::dequantize_per_channel.out"]
)
def test_arithmetic_that_fell_out(looked, operator):
    rule = "executorch-arithmetic-outside"
    assert not said(rule, looked)
    one = altered(looked, operators={**looked.forward.operators, operator: 1})
    assert f"{operator} x1" in said(rule, one)[0]


def test_an_op_that_each_layer_calls_fell_out(looked):
    layers = looked.program.constants["get_n_layers"]
    once = altered(looked, operators={**looked.forward.operators, "aten::where.self_out": layers - 1})
    each = altered(looked, operators={**looked.forward.operators, "aten::where.self_out": layers})
    assert not said("executorch-arithmetic-outside", once)
    assert said("executorch-arithmetic-outside", each)


def test_a_normalizer_in_the_runners_tokenizer(looked):
    assert not said("executorch-normalizer", looked)
    assert said("executorch-normalizer", replace(looked, normalizer=True))


def test_planned_memory_against_the_program(looked):
    small = altered(looked, planned_bytes=looked.program_bytes // 2)
    large = altered(looked, planned_bytes=looked.program_bytes * 2)
    assert not said("executorch-context-memory", small)
    assert "context of 64" in said("executorch-context-memory", large)[0]
    assert "(50%)" in said("executorch-planned-memory", small)[0]


def test_forward_all(looked):
    assert "plans" in said("executorch-forward-all", looked)[0]
    program = msgspec.structs.replace(looked.program, methods=[looked.forward])
    assert not said("executorch-forward-all", replace(looked, program=program))


def test_what_runs_outside_and_what_to_link(looked):
    [outside] = said("executorch-outside", looked)
    assert "4 cache" in outside and "2 attention" in outside and "3 lookup" in outside
    assert not said("executorch-outside", altered(looked, operators={}))
    [linked] = said("executorch-libraries", looked)
    assert all(name in linked for name in ("backend_xnnpack", "kernels_llm", "kernels_quantized"))
    alone = msgspec.structs.replace(
        looked.program, methods=[msgspec.structs.replace(looked.forward, operators={})]
    )
    assert "kernels_llm" not in said("executorch-libraries", replace(looked, program=alone))[0]


def test_normalize(looked):
    assert "NFC" in said("executorch-normalize", looked)[0]
    io = msgspec.structs.replace(looked.manifest.io, normalize="none")
    plain = replace(looked, manifest=msgspec.structs.replace(looked.manifest, io=io))
    assert not said("executorch-normalize", plain)


def test_kernels_that_depend_on_the_cpu(looked):
    assert said("executorch-matmul-extensions", looked)
    assert not said("executorch-matmul-extensions", altered(looked, delegates={"CoreMLBackend": 1}))
