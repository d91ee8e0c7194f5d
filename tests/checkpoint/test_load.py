import dataclasses
import json
import socket

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from mobile_export.checkpoint import load


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_class_comes_from_optimum(family):
    assert load.model_class(family) is AutoModelForCausalLM


def test_optimum_may_name_another_class(monkeypatch):
    from optimum.exporters.tasks import TasksManager

    classes = {("pt", "qwen2", "text-generation"): ("transformers", "Qwen2ForCausalLM")}
    monkeypatch.setattr(TasksManager, "_CUSTOM_CLASSES", classes)
    assert load.model_class("qwen2").__name__ == "Qwen2ForCausalLM"


def test_no_network(sandbox, monkeypatch):
    def refuse(*_):
        raise AssertionError("the loader opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    checkpoint = sandbox()
    assert checkpoint.model() is not None and checkpoint.tokenizer() is not None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(attention, sandbox):
    model = load.load_model(sandbox(), attention=attention)
    assert model.config._attn_implementation == attention


def test_nothing_wants_a_gradient(sandbox):
    assert not any(parameter.requires_grad for parameter in sandbox().model().parameters())


def test_eos_ids(sandbox, tmp_path):
    checkpoint = sandbox()
    ids = GenerationConfig.from_pretrained(checkpoint.folder).eos_token_id
    assert load.eos_ids(checkpoint) == ids == [511, 509]
    bare = dataclasses.replace(checkpoint, folder=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load.eos_ids(bare) == [7]
    (tmp_path / "config.json").write_text("{}")
    assert load.eos_ids(bare) == []
