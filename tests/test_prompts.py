"""Prompt sets: read, refused, rendered."""

import unicodedata

import pytest

from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
from mobile_export.prompts import Message, Prompt, load_prompts, render

GOOD = '[[prompt]]\nname = "a"\nkind = "code"\ntext = "x"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompts 'p.toml'"),
        ("prompt = []", "no prompt"),
        ("[[prompt]", "prompts 'p.toml'"),
        (GOOD + GOOD, "'a'"),
        (GOOD + 'colour = "red"', "colour"),
        (GOOD.replace("code", "prose"), "prose"),
        (GOOD.replace('text = "x"', ""), "needs either text or messages"),
        (GOOD + 'messages = [{ role = "user", content = "x" }]', "needs either text or messages"),
        (GOOD.replace('text = "x"', 'messages = [{ role = "robot", content = "x" }]'), "robot"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    path = tmp_path / "p.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(ExportError, match=message) as caught:
        load_prompts(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"cannot read prompts 'none.toml'"):
        load_prompts(tmp_path / "none.toml")


def test_the_set_holds_decomposed_text():
    texts = {item.name: item.text for item in load_prompts().items}
    for name in ("mixed-japanese-decomposed", "mixed-accents", "mixed-hindi-thai-korean"):
        assert unicodedata.normalize("NFC", texts[name]) != texts[name]


def test_a_chat_goes_through_the_template():
    tokenizer = resolve("sandbox:qwen2?layers=2&hidden=64&vocab=512").tokenizer()
    turns = (Message(role="user", content="Hi"), Message(role="assistant", content="Yes?"))
    text, ids = render(Prompt(name="a", kind="chat", messages=turns), tokenizer)
    assert (
        text
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    tokenizer.chat_template = None
    plain, ids = render(Prompt(name="a", kind="chat", messages=turns), tokenizer)
    assert plain == "user: Hi\nassistant: Yes?" and tokenizer.decode(ids) == plain


def test_a_template_that_writes_the_date_gives_the_same_text_every_day():
    tokenizer = resolve("sandbox:llama?layers=2&hidden=64&vocab=512").tokenizer()
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%s') %}{% endif %}"
        "{{ date_string }}: {{ messages[0]['content'] }}"
    )
    turns = (Message(role="user", content="Hi"),)
    assert render(Prompt(name="a", kind="chat", messages=turns), tokenizer)[0] == "1 January 2026: Hi"


def test_only_plain_text_gets_the_tokenizers_own_first_token():
    from tokenizers.processors import TemplateProcessing

    tokenizer = resolve("sandbox:llama?layers=2&hidden=64&vocab=512").tokenizer()
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", first)]
    )
    plain = Prompt(name="a", kind="code", text="Hi")
    chat = Prompt(name="b", kind="chat", messages=(Message(role="user", content="Hi"),))
    assert render(plain, tokenizer)[1].count(first) == 1
    assert render(chat, tokenizer)[1].count(first) == 0  # a template writes it itself, where it is due
