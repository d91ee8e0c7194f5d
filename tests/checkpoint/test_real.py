"""The models that the catalog's wheels carry, in the cache or fetched."""

import pytest
import torch
from transformers import AddedToken, Qwen2Tokenizer

from mobile_export.checkpoint import resolve
from mobile_export.checkpoint.folder import read_json
from mobile_export.checkpoint.load import eos_ids

pytestmark = pytest.mark.real

TEXTS = [
    "def reverse(s: str) -> str:\n    return s[::-1]\n",
    "Hello, world! It's 12345 o'clock, isn't it?  \n\n\tx",
    "你好，世界。ドラえもん",
    "naïve façade Ångström e\u0301",
    "مرحبا بالعالم हिन्दी 한국어",
    "👩‍👩‍👧‍👦🇨🇭👍🏽\u200d\ufeff",
    "<|im_start|>user\n<tool_call>x</tool_call><|fim_prefix|><|im_end|><|endoftext|>",
]


@pytest.fixture(scope="module")
def default():
    return resolve()


def test_default_is_exactly_the_model_and_chats(default):
    model, tokenizer = default.model(), default.tokenizer()
    assert model.num_parameters() == 494_032_768
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == 1e-6
    chat = [{"role": "user", "content": "What is 2 + 2? Answer with one digit."}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "4<|im_end|>"


def test_default_stops_where_qwen_stops(default):
    assert eos_ids(default) == [151645, 151643]
    tokenizer = default.tokenizer()
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )


def test_default_tokenizes_as_qwens_own_class(default):
    table = read_json(default.folder, "tokenizer.json")
    merges = [tuple(merge) for merge in table["model"]["merges"]]
    reference = Qwen2Tokenizer(vocab=table["model"]["vocab"], merges=merges)
    for token in table["added_tokens"]:
        reference.add_tokens([AddedToken(token["content"], special=token["special"], normalized=False)])
    tokenizer = default.tokenizer()
    assert len(tokenizer) == 151_665
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text)
    # Ids that anyone can look up for the published Qwen2 tokenizer.
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("<|im_start|>user\n") == [151644, 872, 198]


def test_smollm2_is_the_whole_llama_and_answers():
    checkpoint = resolve("smollm2-135m-instruct")
    model, tokenizer = checkpoint.model(), checkpoint.tokenizer()
    assert (checkpoint.family, model.num_parameters()) == ("llama", 134_515_008)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("a 123") == ["a", "Ġ", "1", "2", "3"]
