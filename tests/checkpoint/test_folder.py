import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError


@pytest.fixture
def folder(sandbox, tmp_path):
    """A transformers folder of the user's, without our notes."""
    path = tmp_path / "My Model"
    shutil.copytree(sandbox().folder, path, ignore=shutil.ignore_patterns(".*"))
    return path


def edit(path, **changes):
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | changes))


def refused(path):
    with pytest.raises(ExportError) as error:
        resolve(str(path)).model()
    assert str(path.parent) not in str(error.value)
    return str(error.value)


def test_resolves(folder, sandbox):
    checkpoint = resolve(str(folder))
    assert (checkpoint.name, checkpoint.spec, checkpoint.family) == ("my-model", "My Model", "qwen2")
    assert checkpoint.digest == sandbox().digest
    assert checkpoint.license == "unknown"
    assert str(folder.parent) not in json.dumps(checkpoint.provenance)
    assert checkpoint.model().lm_head.weight.shape == (512, 64)


def test_license_from_model_card(folder):
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n")
    assert resolve(str(folder)).license == "Apache-2.0"


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
)
def test_digest_sees_every_file(folder, name):
    before = resolve(str(folder)).digest
    data = (folder / name).read_bytes()
    changed = data[:-1] + bytes([data[-1] ^ 1]) if name.endswith("safetensors") else data + b"\n"
    (folder / name).write_bytes(changed)
    assert resolve(str(folder)).digest != before


def test_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = resolve(str(folder)).model().state_dict()
    (folder / "model.safetensors").unlink()
    sharded = resolve(str(folder)).model().state_dict()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors is missing" in refused(folder)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_weights(folder, cut):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:cut])
    assert "damaged or cut short" in refused(folder)


def test_altered_weights_header(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[20] ^= 0xFF
    (folder / "model.safetensors").write_bytes(data)
    assert "damaged" in refused(folder)


def test_pickle_is_never_loaded(folder):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "exploded"),))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "pickle" in refused(folder)
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code(folder, name):
    edit(folder / name, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert "auto_map" in refused(folder)


def test_unsupported_architecture(folder):
    edit(folder / "config.json", model_type="mamba")
    says = refused(folder)
    assert "'mamba'" in says and "llama, qwen2, qwen3" in says


def test_quantized_checkpoint(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    assert "already quantized" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_json(folder, name, text):
    (folder / name).write_text(text)
    assert name in refused(folder)


def test_tokenizer_that_is_no_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match="tokenizer"):
        resolve(str(folder)).tokenizer()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "model.safetensors"])
def test_link_out_of_the_folder(folder, name):
    outside = folder.parent / "secret"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    assert f"'{name}' leads out of its folder" in refused(folder)


def test_shard_out_of_the_folder(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "leads out of its folder" in refused(folder)


def test_the_hubs_own_links_are_fine(folder, tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert resolve(str(snapshot)).digest == resolve(str(folder)).digest


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert "1 missing weights, e.g. model.norm.weight" in refused(folder)


def test_tensor_left_over(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(1)}))
    assert "1 unexpected weights, e.g. model.extra" in refused(folder)


def test_misshapen_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
    assert "1 mismatched weights, e.g. model.norm.weight" in refused(folder)


def test_sizes_of_another_model(folder):
    edit(folder / "config.json", num_hidden_layers=3)
    assert "missing" in refused(folder)


def test_half_precision_becomes_fp32(folder):
    rewrite(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    assert {p.dtype for p in resolve(str(folder)).model().parameters()} == {torch.float32}
