"""A command whose errors are one line each on stderr, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from skvq.engine.errors import SkvqError


class OneLineGroup(click.Group):
    """A group whose errors are one line each."""

    def main(self, *args: Any, **options: Any) -> Any:
        sys.exit(run_command(lambda: super(OneLineGroup, self).main(*args, **{**options, "standalone_mode": False})))


class OneLineCommand(click.Command):
    """A command whose errors are one line each, when it is run on its own."""

    def main(self, *args: Any, **options: Any) -> Any:
        sys.exit(run_command(lambda: super(OneLineCommand, self).main(*args, **{**options, "standalone_mode": False})))


def run_command(call: Callable[[], Any]) -> int:
    """Exit code of a command; what a user can mend becomes one line on stderr."""
    try:
        call()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        click.echo(f"skvq: error: {' '.join(error.format_message().split())}", err=True)
        return 2
    except SkvqError as error:
        click.echo(f"skvq: error: {error}", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("skvq: interrupted", err=True)
        return 130
    return 0
