"""`optimum-cli export mobile`: optimum finds this file in the namespace package it scans.

Installed as `optimum/commands/register/register_mobile.py`. No folder here has an `__init__.py`:
they are shared with optimum's own package.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

# Only optimum imports this file, when it is loaded already.
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo  # noqa: TID253
from optimum.commands.export.base import ExportCommand  # noqa: TID253


class MobileExportCommand(BaseOptimumCLICommand):
    """The same call as `mobile-export PLATFORM`, under the name that optimum's users know."""

    COMMAND = CommandInfo(name="mobile", help="Export a small language model to phones (mobile-export).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The options of `mobile-export PLATFORM`."""
        parser.add_argument(
            "--platform", required=True, choices=["android", "ios", "onnx"], help="Where the model will run."
        )
        parser.add_argument(
            "--model", "-m", help="Name, hub id, folder or GGUF file. Default: the catalog's."
        )
        parser.add_argument("--recipe", help="Recipe by name, or a TOML file. Default: int8.")
        parser.add_argument("--context", type=int, help="Positions in the KV cache. Default: the recipe's.")
        parser.add_argument("--out", type=Path, help="Folder of the bundle. Default: dist/MODEL/PLATFORM.")
        parser.add_argument("--revision", help="Branch, tag or commit of a hub model.")

    def run(self) -> None:
        """Export; a mistake of the user's is one line and exit code 2, Ctrl-C is 130."""
        from mobile_export.errors import ExportError

        try:
            from mobile_export.export import export

            export(
                self.args.platform,
                model=self.args.model,
                recipe=self.args.recipe,
                context=self.args.context,
                out=self.args.out,
                revision=self.args.revision,
                progress=lambda line: print(line, file=sys.stderr),
            )
        except ExportError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None


REGISTER_COMMANDS = [(MobileExportCommand, ExportCommand)]
