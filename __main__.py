"""``python -m skvq`` is ``skvq``."""

from skvq.cli import main

main(prog_name="skvq")
