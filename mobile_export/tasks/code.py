"""A model's answers to programming problems, executed."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from mobile_export.prompts import Message, Prompt, render
from mobile_export.tasks.confine import execute
from mobile_export.tasks.sets import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mobile_export.types import Runner

PASSED = "passed"
MOST_TOKENS = 320
"""Of an answer; one that is longer is executed as far as it came."""
_BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class CodeResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one answer fared."""

    name: str
    verdict: str
    """`passed`, or why it did not, in one line."""
    tokens: int
    """Generated ones."""
    answer: str


def solve(
    runner: Runner, tokenizer: PreTrainedTokenizerFast, ends: set[int], problem: Problem, instruction: str
) -> CodeResult:
    """Ask by the chat template, generate greedily, execute the first code block with the problem's tests.

    Generation ends at an id of `ends`, when the first code block is closed, after MOST_TOKENS, or
    when the cache is full. ExportError: this machine cannot confine the code.
    """
    turn = Message(role="user", content=f"{problem.ask} {instruction}")
    _, prompt = render(Prompt(name=problem.name, kind="chat", messages=(turn,)), tokenizer)
    made = generate(runner, tokenizer, prompt, ends)
    answer = str(tokenizer.decode(made, skip_special_tokens=True))
    fits = len(prompt) < runner.context
    verdict = execute(extract(answer), problem.tests) if fits else "the prompt leaves no room"
    return CodeResult(name=problem.name, verdict=verdict, tokens=len(made), answer=answer)


def generate(
    runner: Runner, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], ends: set[int]
) -> list[int]:
    """The most likely ids one after another; empty when the prompt leaves no room."""
    runner.reset()
    made: list[int] = []
    tokens, position = list(prompt), 0
    for _ in range(min(MOST_TOKENS, runner.context - len(prompt))):
        token = int(runner.last_logits(tokens, position).argmax())
        if token in ends:
            break
        position += len(tokens)
        tokens = [token]
        made.append(token)
        block = _BLOCK.search(str(tokenizer.decode(made, skip_special_tokens=True)))
        if block and block[2]:
            break
    return made


def extract(answer: str) -> str:
    """The first code block, to the end where it is not closed; the whole answer where there is none.

    Of a block that stands indented, in a list say, the indentation goes.
    """
    found = _BLOCK.search(answer)
    return textwrap.dedent(found[1]) if found else answer
