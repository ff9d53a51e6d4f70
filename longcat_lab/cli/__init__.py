"""`longcat-lab`: thin, one function a command."""

from longcat_lab.cli.main import main

__all__ = ["main"]
