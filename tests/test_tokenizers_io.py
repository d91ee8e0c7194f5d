"""The runner's tokenizer is the C++ one that the ExecuTorch LLM runner of Android and iOS links."""

import json
import random
import unicodedata

import pytest
from pytorch_tokenizers import CppHFTokenizer
from tokenizers import Tokenizer

from mobile_export import checkpoint, tokenizers_io
from mobile_export.bundle import Draft
from mobile_export.errors import ExportError

CHAT = ["<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|endoftext|>", "<|im_end", "|>"]
SCRIPTS = [
    [chr(code) for code in range(0x20, 0x7F)],
    [chr(code) for code in range(0x20)],
    [chr(code) for code in range(0xA0, 0x250)],
    [chr(code) for code in range(0x300, 0x370)],
    [chr(code) for code in range(0x400, 0x500)],
    [chr(code) for code in range(0x600, 0x700)],
    [chr(code) for code in range(0x900, 0x980)],
    [chr(code) for code in range(0xE00, 0xE5C)],
    [chr(code) for code in range(0x3040, 0x3100)],
    [chr(code) for code in range(0x4E00, 0x4F00)],
    [chr(code) for code in range(0xAC00, 0xAD00)],
    [*(chr(code) for code in range(0x1F300, 0x1F600)), "\u200d", "\ufe0f", "👩\u200d👩\u200d👧"],
    [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85"],
    list("0123456789¹²½Ⅷ٣"),
    ["'s", "'LL", "'t", "'ſ", "'Re", " it's"],
    CHAT,
]


def strings(count):
    """Seeded NFC strings, most of mixed scripts."""
    pick = random.Random(20)
    for _ in range(count):
        parts = (pick.choice(pick.choice(SCRIPTS)) for _ in range(pick.randint(0, 24)))
        yield unicodedata.normalize("NFC", "".join(parts))


def differences(folder, count):
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    runner = CppHFTokenizer()
    runner.load(str(folder / "tokenizer_runner.json"))
    found = []
    for text in strings(count):
        wanted = theirs.encode(text, add_special_tokens=False).ids
        if list(runner.encode(text, 0, 0)) != wanted:
            found.append(text)
        assert runner.decode_batch(wanted) == theirs.decode(wanted, skip_special_tokens=False)
    return found


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def make(spec):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOBILE_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
            model = checkpoint.resolve(spec)
            draft = Draft(tmp_path_factory.mktemp("draft"))
            return model, draft, tokenizers_io.write_tokenizers(model, draft)

    return make


@pytest.fixture(scope="module")
def written(make):
    return make("sandbox:qwen2?layers=1&hidden=32&vocab=512")


def test_the_files_of_a_bundle(written):
    model, draft, normalize = written
    assert normalize == "NFC"
    assert tuple(draft.roles) == tokenizers_io.NAMES
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (draft.folder / name).read_bytes() == (model.folder / name).read_bytes()
    before = json.loads((draft.folder / "tokenizer.json").read_bytes())
    after = json.loads((draft.folder / "tokenizer_runner.json").read_bytes())
    assert before["normalizer"] == {"type": "NFC"}
    assert after == {**before, "normalizer": None}
    assert list(after["model"]["vocab"]) == list(before["model"]["vocab"])


def test_hugging_face_reads_the_folder_with_its_chat_template(written):
    from transformers import AutoTokenizer

    model, draft, _ = written
    tokenizer = AutoTokenizer.from_pretrained(draft.folder)
    turns = [{"role": "user", "content": "Grüße, 世界"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == model.tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text) == model.tokenizer().encode(text)


def test_the_runner_gives_hugging_faces_ids(written):
    assert differences(written[1].folder, 3000) == []


def test_llamas_tokenizer_too(make):
    model, draft, normalize = make("sandbox:llama?layers=1&hidden=32&vocab=512")
    assert normalize == ("NFC" if b'"NFC"' in (model.folder / "tokenizer.json").read_bytes() else "none")
    assert differences(draft.folder, 1000) == []


def test_unpatched_the_runner_drops_accents(written):
    """Why we patch. When this fails, pytorch-tokenizers has mended its NFC: drop the patch."""
    runner = CppHFTokenizer()
    runner.load(str(written[1].folder / "tokenizer.json"))
    assert runner.encode("é", 0, 0) == runner.encode("e", 0, 0)


def test_another_normalizer_is_refused():
    lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    with pytest.raises(ExportError, match="normalizes text with Lowercase, which"):
        tokenizers_io.for_runner(json.dumps({"normalizer": lower}).encode())
    assert tokenizers_io.for_runner(b'{"normalizer": null}') == (b'{"normalizer":null}', "none")


@pytest.mark.real
def test_the_real_tokenizer(tmp_path):
    draft = Draft(tmp_path)
    assert tokenizers_io.write_tokenizers(checkpoint.resolve(), draft) == "NFC"
    assert differences(draft.folder, 6000) == []
