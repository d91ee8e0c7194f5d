"""`python -m mobile_export` is the `mobile-export` command."""

from mobile_export.cli import main

main()
