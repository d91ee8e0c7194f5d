"""A report's data: what belongs together, and what is refused."""

import json
import shutil

import jsonschema
import msgspec
import pytest

from mobile_export import schemas
from mobile_export.errors import ExportError
from mobile_export.export import export
from mobile_export.parity import ParityReport
from mobile_export.report import data
from mobile_export.report.data import gather


def test_the_committed_schema_accepts_a_report(whole, folders, bench_file):
    schema = json.loads((schemas.FOLDER / "report.schema.json").read_bytes())
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(json.loads(data.encode(whole)))
    validator.validate(json.loads(data.encode(gather([folders["android"]], bench=[bench_file()]))))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**json.loads(data.encode(whole)), "schema_version": 2})


def test_the_same_inputs_give_the_same_bytes(whole, folders, parity_file, blame_file):
    again = gather(list(folders.values()), parity=[parity_file], blame=[blame_file], ranges=True)
    assert data.encode(again) == data.encode(whole)
    assert msgspec.json.decode(data.encode(whole), type=data.Report) == whole


def test_bundles_are_named_by_their_folders(whole, folders, tmp_path):
    assert [one.name for one in whole.bundles] == ["android", "ios", "onnx"]
    shutil.copytree(folders["onnx"], tmp_path / "new" / "onnx")
    twins = gather([folders["onnx"], tmp_path / "new" / "onnx"]).bundles
    assert [one.name for one in twins] == [f"{folders['onnx'].parent.name}/onnx", "new/onnx"]


def test_a_bundle_is_told_with_its_claim(whole):
    claims = {one.name: one.claim for one in whole.bundles}
    assert claims == {
        "android": "",
        "ios": "Verified against the documented semantics of the program, not on the device.",
        "onnx": "",
    }


def test_parity_goes_to_the_bundle_it_is_of(whole, folders, parity_file):
    (found,) = whole.parity
    assert found.bundle == "ios"
    assert found.report.stages[0].by_position
    with pytest.raises(ExportError, match=r"'ios\.json' is of none of these bundles"):
        gather([folders["android"]], parity=[parity_file])


def test_blame_goes_to_the_bundle_it_is_of(whole, folders, blame_file):
    (found,) = whole.blames
    assert found.bundle == "ios" and found.report.taps
    with pytest.raises(ExportError, match=r"'ios\.json' is of none of these bundles"):
        gather([folders["onnx"]], blame=[blame_file])


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"stages": 1}'])
def test_a_file_that_is_no_parity_report_is_refused(text, folders, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ExportError, match=r"'other\.json' is no parity report"):
        gather([folders["android"]], parity=[path])
    with pytest.raises(ExportError, match=r"'other\.json' is no blame report"):
        gather([folders["android"]], blame=[path])
    with pytest.raises(ExportError, match=r"cannot read 'none\.json'"):
        gather([folders["android"]], parity=[tmp_path / "none.json"])


def test_fp16s_range_is_that_of_each_layers_largest_op(whole):
    of = {one.name: one.fp16 for one in whole.bundles}
    assert not of["android"] and not of["onnx"]
    assert [one.layer for one in of["ios"]] == [0, 1, None]
    assert all(0 < one.largest < 65504 and one.op for one in of["ios"])


def test_a_bench_comes_to_medians(folders, bench_file):
    (bench,) = gather([folders["android"]], bench=[bench_file()]).benches
    found = {(one.contender, one.what): one for one in bench.figures}
    prefill = found["android", "prefill 32"]
    assert (prefill.unit, prefill.samples) == ("tokens/s", 3)
    assert prefill.median == pytest.approx(32 / 0.11)
    assert (prefill.low, prefill.high) == pytest.approx((32 / 0.12, 32 / 0.1))
    assert found["peer.gguf", "decode at 0"].median == pytest.approx(50)
    assert found["peer.gguf", "cold load"].median == pytest.approx(0.6)
    assert found["android", "first token of a text"].median == pytest.approx(0.1)
    assert (found["android", "peak memory"].unit, found["android", "peak memory"].median) == ("bytes", 6e8)


def test_what_is_no_speed_has_no_figures(folders, bench_file):
    (bench,) = gather([folders["android"]], bench=[bench_file()]).benches
    assert {one.contender for one in bench.figures} == {"android", "peer.gguf"}
    assert any("ios on host: not a speed (evaluated, not run)" in note for note in bench.notes)
    (bench,) = gather([folders["android"]], bench=[bench_file("emulated by qemu")]).benches
    assert not bench.figures
    assert sum("not a speed (" in note for note in bench.notes) == 3


def test_a_bench_of_another_model_is_refused(folders, bench_file):
    path = bench_file()
    digest = json.loads(path.read_bytes())["contenders"][0]["model"]
    path.write_text(path.read_text().replace(digest, "0" * 64))
    with pytest.raises(ExportError, match=r"'bench\.json' measured another model"):
        gather([folders["android"]], bench=[path])


def test_bundles_of_two_models_are_refused(folders, spec, tmp_path):
    other = tmp_path / "android"
    export("onnx", model=spec("llama"), context=64, out=other)
    with pytest.raises(ExportError, match="of several models: sandbox"):
        gather([folders["android"], other])


def test_an_altered_bundle_is_refused(folders, tmp_path):
    copy = tmp_path / "android"
    shutil.copytree(folders["android"], copy)
    (copy / "NOTICE").write_text("other")
    with pytest.raises(ExportError, match="NOTICE"):
        gather([copy])


def test_older_parity_reports_name_no_artefact(folders, parity_file, tmp_path):
    report = msgspec.json.decode(parity_file.read_bytes(), type=ParityReport)
    path = tmp_path / "old.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(report, target="", recipe="")))
    with pytest.raises(ExportError, match="is of none of these bundles"):
        gather(list(folders.values()), parity=[path])
