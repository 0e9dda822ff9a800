"""The command `qlip`. Thin: it parses, calls a function elsewhere, and prints.

Exit codes: 0 it worked, 1 it did not, 2 the arguments are wrong. Torch is imported when a command runs, so that
`--help` answers at once.
"""

from qlip.cli.main import main

__all__ = ["main"]
