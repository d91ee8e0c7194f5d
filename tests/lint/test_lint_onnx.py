"""The rules for ONNX, each where it applies and where it does not."""

import json
from dataclasses import replace

import msgspec
import onnx as onnx_package
import pytest
from test_bundle import make_manifest

from mobile_export import bundle, manifest
from mobile_export.checkpoint.load import eos_ids
from mobile_export.errors import ExportError
from mobile_export.lint import lint
from mobile_export.lint.onnx import RULES, look
from mobile_export.recipe import ONNX as Options
from mobile_export.targets import onnx
from mobile_export.targets.onnx_deploy import (
    GENAI_CONFIG,
    GENAI_MODEL,
    OPERATORS,
    cpu_features,
    genai_config,
    genai_model,
    required_operators,
)

changed = msgspec.structs.replace


@pytest.fixture(scope="module")
def make(programs_of, spec, tmp_path_factory):
    """A bundle as the target writes one; `also(folder)` may alter its files before it is sealed."""
    checkpoint, _, quantized = programs_of(spec())

    def made(options=None, also=None, version="1.32.0", **fields):
        options = options or Options()
        out = tmp_path_factory.mktemp("lint") / "onnx"
        with bundle.create(out) as draft:
            for name in ("model.onnx", "model.onnx.data"):
                draft.path(name, "program")
            model = draft.folder / "model.onnx"
            onnx.lower(quantized, options, model)
            genai_model(model, draft.path(GENAI_MODEL, "runtime-config"))
            config = genai_config(
                quantized.dims,
                family="qwen2",
                eos_ids=eos_ids(checkpoint),
                bos_id=None,
                pad_id=None,
                chunk=128,
            )
            draft.path(GENAI_CONFIG, "runtime-config").write_bytes(config)
            draft.path(OPERATORS, "runtime-config").write_text(required_operators(model))
            if also:
                also(draft.folder)
            draft.roles = {name: role for name, role in draft.roles.items() if (draft.folder / name).exists()}
            draft.finish(described(model, options, version, fields))
        return bundle.load(out)

    def described(model, options, version, fields):
        from mobile_export.onnx_look import read

        found = read(model)
        inputs, outputs = (
            [manifest.TensorInfo(name=one.name, dtype=one.dtype, shape=one.shape) for one in values]
            for values in (found.inputs, found.outputs)
        )
        method = manifest.Method(name="main", inputs=inputs, outputs=outputs)
        io = changed(
            make_manifest().io,
            methods=[method],
            constant_methods={},
            context=64,
            vocab=1024,
            kv_cache=options.kv_cache,
        )
        runtime = manifest.Runtime(
            name="ONNX Runtime",
            minimum_version=version,
            cpu_features=cpu_features(options.accuracy_level),
        )
        plain = changed(make_manifest(), platform="onnx", target="onnx", io=io, runtime=runtime, tools={})
        return changed(plain, **fields)

    return made


@pytest.fixture(scope="module")
def plain(make):
    return make()


@pytest.fixture(scope="module")
def looked(plain):
    return look(plain)


def found(made, rule):
    return [one.message for one in lint(made).findings if one.rule == rule]


def said(rule, looked):
    return list(next(one for one in RULES if one.id == rule).check(looked))


def runtime_of(looked, **fields):
    held = looked.manifest
    return replace(looked, manifest=changed(held, runtime=changed(held.runtime, **fields)))


def io_of(looked, **fields):
    return replace(looked, manifest=changed(looked.manifest, io=changed(looked.manifest.io, **fields)))


def test_what_the_target_writes_has_no_error_and_one_warning(plain):
    report = lint(plain)
    assert report.target == "onnx"
    assert [one.rule for one in report.findings if one.severity == "error"] == []
    assert [one.rule for one in report.findings if one.severity == "warning"] == ["onnx-dot-product"]


def test_fp32_products_run_on_any_arm(make):
    level = make(Options(accuracy_level=0))
    assert not found(level, "onnx-dot-product") and not found(level, "onnx-cpu-features")


def test_int8_products_ask_for_dot_product(plain, looked):
    assert found(plain, "onnx-dot-product") == ["9 of 9 products take int8 activations (accuracy_level 4)"]
    [message] = said("onnx-cpu-features", runtime_of(looked, cpu_features=["arm64:sve"]))
    assert "9 products" in message and "arm64:asimddp" in message


@pytest.mark.parametrize(
    ("kv_cache", "version", "asked"),
    [
        ("fp32", "1.22.1", ["IR version 11 (1.23)", "opset 23 (1.23)", "an int8 lookup (1.23)"]),
        ("fp32", "1.23.0", []),
        ("fp16", "1.31.2", ["an fp16 KV cache (1.32)"]),
        ("fp16", "1.32.0", []),
        ("fp32", "any", ["IR version 11 (1.23)"]),
    ],
)
def test_a_runtime_that_is_too_old(make, kv_cache, version, asked):
    messages = found(make(Options(kv_cache=kv_cache), version=version), "onnx-runtime-version")
    assert bool(messages) == bool(asked)
    for part in asked:
        assert part in messages[0]
    assert not messages or f"ONNX Runtime {version} or later" in messages[0]


def test_an_older_format_asks_for_nothing(looked):
    model = changed(looked.model, ir_version=10, opsets={"ai.onnx": 21, "com.microsoft": 1})
    old = replace(runtime_of(looked, minimum_version="1.18"), model=model)
    assert said("onnx-runtime-version", old) == [
        "the manifest says ONNX Runtime 1.18 or later, and the model has an int8 lookup (1.23)"
    ]
    assert not said("onnx-runtime-version", replace(old, attributes={}))


def test_a_manifest_of_another_model(looked):
    assert not said("onnx-contract", looked)
    [method] = looked.manifest.io.methods
    short = changed(method, inputs=method.inputs[1:])
    assert said("onnx-contract", io_of(looked, methods=[short])) == [
        "the manifest's inputs are not the model's: input_ids int64"
    ]
    other = changed(method, outputs=[changed(method.outputs[0], dtype="fp16"), *method.outputs[1:]])
    assert "logits" in said("onnx-contract", io_of(looked, methods=[other]))[0]
    assert "2 methods" in said("onnx-contract", io_of(looked, methods=[method, method]))[0]


def test_genai_without_its_model(make, plain):
    assert not found(plain, "onnx-genai")
    missing = make(also=lambda folder: (folder / GENAI_MODEL).unlink())
    assert found(missing, "onnx-genai") == [
        f"genai_config.json names '{GENAI_MODEL}', which the bundle does not have"
    ]
    neither = make(also=lambda folder: [(folder / name).unlink() for name in (GENAI_MODEL, GENAI_CONFIG)])
    assert not found(neither, "onnx-genai")


def test_genai_with_a_model_that_it_cannot_call(make):
    def point_elsewhere(folder):
        config = json.loads((folder / GENAI_CONFIG).read_bytes())
        config["model"]["decoder"]["filename"] = "model.onnx"
        (folder / GENAI_CONFIG).write_text(json.dumps(config))

    [message] = found(make(also=point_elsewhere), "onnx-genai")
    assert "[1, 'read', 1024]" in message


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"model": {"decoder": {"filename": 1}}}'])
def test_a_genai_config_that_is_none(make, text):
    made = make(also=lambda folder: (folder / GENAI_CONFIG).write_text(text))
    with pytest.raises(ExportError, match="'genai_config.json' is damaged"):
        lint(made)


def test_an_operator_list_that_lacks_one(make, plain):
    assert not found(plain, "onnx-operator-list")

    def shorten(folder):
        text = (folder / OPERATORS).read_text().replace("Concat,Gather", "Gather").replace(";14;", ";13;")
        (folder / OPERATORS).write_text("# a comment; with; semicolons\n" + text)

    assert found(make(also=shorten), "onnx-operator-list") == [
        "required_operators.config lacks ai.onnx;13;Concat, ai.onnx;14;Mul, ai.onnx;14;Sub"
    ]
    assert not found(make(also=lambda folder: (folder / OPERATORS).unlink()), "onnx-operator-list")


def test_operators_of_another_domain(make, plain):
    def rename(folder):
        model = onnx_package.load(folder / "model.onnx", load_external_data=False)
        next(node for node in model.graph.node if node.op_type == "Mul").domain = "org.example"
        model.opset_import.append(onnx_package.helper.make_opsetid("org.example", 1))
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    assert found(make(also=rename), "onnx-foreign-operators") == ["no stock package holds org.example:Mul"]
    assert not found(plain, "onnx-foreign-operators")


def test_the_cache_against_the_weights(looked):
    assert looked.cache_bytes == 4 * 2 * 64 * 16 * 4, "caches, heads, positions, width, fp32"
    assert not said("onnx-context-memory", looked)
    [message] = said("onnx-context-memory", io_of(looked, context=4096))
    assert "2.1 MB for a context of 4096" in message
    [message] = said("onnx-memory", looked)
    assert "64 positions 32.8 kB in fp32, in fp16 16.4 kB" in message


def test_an_fp16_cache_is_half(make, looked):
    half = look(make(Options(kv_cache="fp16")))
    assert half.cache_bytes == looked.cache_bytes // 2
    assert "in fp16;" in said("onnx-memory", half)[0]


def test_weights_are_counted_once(looked, plain):
    stored = plain.path("program").with_name("model.onnx.data").stat().st_size
    assert stored - 20 * 4096 < looked.weight_bytes < stored + 4096


def test_what_a_small_phone_gives(looked):
    assert not said("onnx-memory-limit", looked)
    assert "GB" in said("onnx-memory-limit", io_of(looked, context=5_000_000))[0]


def test_shared_buffers_and_the_data_file(looked):
    assert "4 caches" in said("onnx-cache-buffers", looked)[0]
    assert "32.8 kB" in said("onnx-cache-buffers", looked)[0]
    assert not said("onnx-cache-buffers", replace(looked, model=changed(looked.model, inputs=[])))
    assert said("onnx-data-file", looked)[0].startswith("model.onnx.data (")
    assert not said("onnx-data-file", replace(looked, model=changed(looked.model, data_files={})))


def test_what_the_store_takes(looked):
    assert not said("onnx-play-size", looked)
    large = changed(looked.model, data_files={"model.onnx.data": 510_000_000})
    assert said("onnx-play-size", replace(looked, model=large)) == [
        "510.0 MB of weights; Google Play takes 200 MB in a base module"
    ]


@pytest.mark.parametrize(
    ("minimum", "proven", "reports"),
    [
        ("1.32.0", None, True),
        ("1.23.0", "1.32.0", True),
        ("1.23.0", "1.28.0", False),
        ("1.23.0", None, False),
    ],
)
def test_telemetry(looked, minimum, proven, reports):
    tools = {"onnxruntime": proven} if proven else {}
    with_tools = replace(looked, manifest=changed(looked.manifest, tools=tools))
    assert bool(said("onnx-telemetry", runtime_of(with_tools, minimum_version=minimum))) == reports


def test_operators_and_who_takes_them(looked):
    [message] = said("onnx-operators", looked)
    assert "5 of them contrib" in message and "ai.onnx 23" in message
    [message] = said("onnx-providers", looked)
    assert "9 com.microsoft:MatMulNBits, 2 com.microsoft:GroupQueryAttention" in message
    plain = replace(looked, model=changed(looked.model, operators={"Mul": 1}))
    assert not said("onnx-providers", plain)
    assert "0 of them contrib" in said("onnx-operators", plain)[0]


def test_a_bundle_whose_program_is_no_onnx(tmp_path):
    with bundle.create(tmp_path / "onnx") as draft:
        draft.path("model.pte", "program").write_bytes(b"program")
        draft.finish(changed(make_manifest(), target="onnx"))
    with pytest.raises(ExportError, match=r"'model.pte', not a .onnx"):
        lint(bundle.load(tmp_path / "onnx"))
