"""`python -m qlip.cli`, as torchrun starts it."""

from qlip.cli.main import main

main()
