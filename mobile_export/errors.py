"""The one error that reaches a user: what went wrong, and what to do next."""

import difflib
from collections.abc import Iterable


class ExportError(Exception):
    """A mistake or a limit the user can act on. The CLI prints it in one line and exits with 2.

    `message` says what is wrong; `hint` says what to do next. Neither holds an absolute path
    that the user did not type.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.message = message
        self.hint = hint


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint for a name nobody knows: the nearest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
