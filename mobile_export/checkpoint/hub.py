"""A repository on the Hugging Face hub: its snapshot in the hub's own cache is the checkpoint."""

from __future__ import annotations

from pathlib import Path

from mobile_export.checkpoint import Progress, folder
from mobile_export.errors import ExportError
from mobile_export.types import Checkpoint

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "README.md", "LICENSE*"]


def resolve(spec: str, revision: str | None, say: Progress) -> Checkpoint:
    """The checkpoint of `org/name` or `org/name@revision`, downloaded unless it is in the hub's cache.

    `revision` is a branch, tag or commit; the commit it stood for goes into the provenance.
    Raises ExportError when there is no such repository, no access, or no network.
    """
    repository, _, pinned = spec.partition("@")
    if pinned and revision and pinned != revision:
        raise ExportError(f"two revisions: '{pinned}' and '{revision}'", "give one")
    wanted = pinned or revision or "main"
    say(f"looking up {repository} at {wanted}")
    path = _snapshot(repository, wanted)
    return Checkpoint(
        name=folder.safe_name(repository.partition("/")[2]),
        spec=spec,
        folder=path,
        family=folder.validate(path),
        digest=folder.digest(path),
        license=folder.license_of(path),
        provenance={
            "kind": "hub",
            "repository": repository,
            "revision": path.name,  # the hub's cache names a snapshot by its commit
            "requested": wanted,
        },
    )


def _snapshot(repository: str, revision: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        # Files in sub-folders are other formats of the same weights.
        found = snapshot_download(
            repository, revision=revision, allow_patterns=_FILES, ignore_patterns=["*/*"]
        )
    except errors.GatedRepoError:
        raise ExportError(
            f"'{repository}' needs its licence accepted", "accept it, then: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ExportError(
            f"the hub has no model '{repository}'", "check the name, or: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ExportError(f"'{repository}' has no revision '{revision}'", "check --revision") from None
    except errors.HFValidationError:
        raise ExportError(f"'{repository}' is not a hub id", "write it as org/name") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError):
        hint = "connect once, or pass --model FOLDER or FILE.gguf"
        raise ExportError(f"cannot reach the hub, and '{repository}' is not in its cache", hint) from None
    return Path(found)
