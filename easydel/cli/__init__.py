"""The `easydel` command."""

from easydel.cli.program import main

__all__ = ["main"]
