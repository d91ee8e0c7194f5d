"""The committed sets: read, refused, not of what else is measured, and each problem can be solved."""

import re
import tomllib
from pathlib import Path

import pytest

import mobile_export
from mobile_export.errors import ExportError
from mobile_export.prompts import load_prompts
from mobile_export.tasks.confine import execute
from mobile_export.tasks.sets import KINDS, load_problems, load_texts

TEXT = '[[text]]\nname = "a"\nkind = "code"\nlicense = "CC0-1.0"\ntext = "x"\n'
PROBLEM = '[[problem]]\nname = "a"\nask = "x"\ntests = "y"\n'
ANSWERS = tomllib.loads(Path(__file__).with_name("answers.toml").read_text("utf-8"))


@pytest.mark.parametrize(
    ("load", "text", "message"),
    [
        (load_texts, "", "'s.toml': .*missing required field `text`"),
        (load_texts, "text = []", "'s.toml': it is empty"),
        (load_texts, TEXT + TEXT, "'a'"),
        (load_texts, TEXT.replace("code", "prose"), "prose"),
        (load_texts, TEXT.replace("license", "licence"), "licence"),
        (load_texts, "[[text]", "'s.toml'"),
        (load_problems, PROBLEM, "instruction"),
        (load_problems, "problem = []\ninstruction = ''", "it is empty"),
        (load_problems, "instruction = ''\n" + PROBLEM + PROBLEM, "'a'"),
        (load_problems, "instruction = ''\n" + PROBLEM + "x = 1", "unknown field `x`"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, load, text, message):
    path = tmp_path / "s.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(ExportError, match=message) as caught:
        load(path)
    assert str(tmp_path) not in str(caught.value)
    path.unlink()
    with pytest.raises(ExportError, match=r"cannot read 's.toml'"):
        load(path)


def test_the_texts_are_of_every_kind_and_long_enough():
    texts = load_texts()
    sizes = dict.fromkeys(KINDS, 0)
    for text in texts.items:
        assert text.license and len(text.text) > 300
        sizes[text.kind] += len(text.text.encode())
    assert min(sizes.values()) > 3_500
    assert len(texts.sha256) == 64


def runs_of(text, size=40):
    plain = re.sub(r"\s+", " ", text)
    return {plain[at : at + size] for at in range(len(plain) - size + 1)}


def test_they_are_not_what_the_codes_are_rounded_for_nor_what_the_logits_are_compared_on():
    """No 40 characters in common, beyond what any Python file begins and ends with."""
    calibration = Path(mobile_export.__file__).parent / "calibration.toml"
    known = set()
    for other in load_prompts().items + load_prompts(calibration).items:
        for part in [other.text or "", *(message.content for message in other.messages or ())]:
            known |= runs_of(part)
    assert runs_of(load_prompts().items[-1].text) <= known and len(known) > 5_000
    common = runs_of('from dataclasses import dataclass, field from if __name__ == "__main__": print(f"{')
    for text in load_texts().items:
        assert not runs_of(text.text) & known - common, text.name


def problems():
    return [pytest.param(problem, id=problem.name) for problem in load_problems().items]


def test_there_is_an_answer_to_each():
    assert {problem.name for problem in load_problems().items} == set(ANSWERS)
    assert len(ANSWERS) == 20


@pytest.mark.parametrize("problem", problems())
def test_a_right_answer_passes_and_a_wrong_one_fails(problem):
    right = ANSWERS[problem.name]
    assert execute(right, problem.tests) == "passed"
    names = re.findall(r"^(?:def|class) (\w+)", right, re.MULTILINE)
    assert all(f"`{name}" in problem.ask for name in names)
    for wrong in ("lambda *_: None", "lambda *_: True", "lambda *_: 0", "lambda x, *_: x"):
        assert execute(f"{names[0]} = {wrong}", problem.tests) != "passed", wrong
