"""Models known by name: catalog.toml in the package."""

from mobile_export.checkpoint import Progress
from mobile_export.types import Checkpoint


def default_name() -> str:
    """The model of an export that names none."""
    return "qwen2.5-coder-0.5b-instruct"


def names() -> list[str]:
    """All names in the catalog."""
    return [default_name()]


def resolve(name: str, revision: str | None, say: Progress) -> Checkpoint:
    """Fetch what the catalog says."""
    raise NotImplementedError
