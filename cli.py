"""The command line. Results on stdout, everything else on stderr.

Exit code 0: success; 2: an error the user can fix (one line: what, with the numbers, and what to do); 130: interrupted; 1:
nobody reads the output any more.
"""

from __future__ import annotations

import click

from skvq import __version__
from skvq.commands.bench import bench
from skvq.commands.calibrate import calibrate
from skvq.commands.errors import HELP, OneLineGroup
from skvq.commands.evaluate import evaluate
from skvq.commands.models import models
from skvq.commands.needle import needle
from skvq.commands.plan import plan
from skvq.commands.run import run
from skvq.commands.serve import serve

__all__ = ["main", "run"]


@click.group(cls=OneLineGroup, context_settings=HELP)
@click.version_option(__version__, prog_name="skvq")
def main() -> None:
    """Read very long contexts with an LLM on one GPU: the KV cache is packed at 1.5 to 4 bits."""


for command in (run, serve, calibrate, evaluate, plan, needle, bench, models):
    main.add_command(command)

if __name__ == "__main__":
    main()
