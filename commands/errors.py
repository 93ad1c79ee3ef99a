"""Click commands that report errors as one line on stderr and set the exit code."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from skvq.commands.cores import settle_threads
from skvq.engine.errors import CalibrationError, OptionError, SessionError, SkvqError

OUT_OF_MEMORY = ("CUDA error: out of memory", "DefaultCPUAllocator: can't allocate memory")
"""Torch messages that mean memory ran out although the error's class does not say so."""


HELP = {"help_option_names": ["-h", "--help"]}


class OneLineGroup(click.Group):
    """A group whose errors are one line each."""

    def main(self, *args: Any, **options: Any) -> Any:
        sys.exit(run_command(lambda: super(OneLineGroup, self).main(*args, **{**options, "standalone_mode": False})))


class OneLineCommand(click.Command):
    """A command whose errors are one line each, when it is run on its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"context_settings": HELP, **options})

    def main(self, *args: Any, **options: Any) -> Any:
        sys.exit(run_command(lambda: super(OneLineCommand, self).main(*args, **{**options, "standalone_mode": False})))

    def invoke(self, ctx: click.Context) -> Any:
        """Run it. An error tells of options by their own names, where the library has others."""
        try:
            return super().invoke(ctx)
        except (OptionError, SessionError, CalibrationError) as error:
            options = {"AttentionSinks.n": "--sinks"} | {str(p.name): max(p.opts, key=len) for p in self.params}
            names = r"^\w+(\.\w+)?|\w+_\w+" if isinstance(error, OptionError) else r"(?<![\w/.-])\w+_\w+(?![\w/.-])"
            told = re.sub(names, lambda found: options.get(found[0], found[0]), str(error))
            raise type(error)(told.replace("or None,", "or random,") if told.startswith("--seed") else told) from error


class Stderr(io.TextIOWrapper):
    """Standard error. Where it cannot be written any more, what it is told is lost, but nothing else."""

    def write(self, text: str) -> int:
        with _unheard():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with _unheard():
            super().flush()


@contextmanager
def _unheard() -> Iterator[None]:
    try:
        yield
    except OSError:  # what is buffered, and all that follows, goes nowhere
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def run_command(call: Callable[[], Any]) -> int:
    """Run a command and return its exit code; errors a user can fix become one line on stderr."""
    settle_threads()
    is_process = sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper)
    if is_process:
        sys.stderr = Stderr(sys.stderr.buffer, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale may lack characters that a model writes
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
        if is_process:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # pressed again, while threads and files are closed
        click.echo("skvq: interrupted", err=True)
        return 130
    except Exception as error:
        told = machine_error(error) or output_error(error)
        if told is None:
            raise
        click.echo(f"skvq: error: {told}", err=True)
        return 2
    return 0


def output_error(error: Exception) -> str | None:
    """One line if standard output can no longer be written; None for any other error."""
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return f"cannot write to standard output: {os.strerror(error.errno)}"
    return None


def machine_error(error: Exception) -> str | None:
    """One line, with what to do, if memory ran out or a GPU failed; None for any other error: that is a bug, and is raised.

    Classes are matched by name: ``commands`` does not import torch, and Triton is imported only where a GPU is used.
    """
    kinds = {f"{c.__module__.split('.')[0]}.{c.__name__}" for c in type(error).__mro__}
    first = next(iter(str(error).splitlines()), "")
    said = ". ".join(first.split(". ")[:3]).rstrip(".") or "no details"
    if kinds & {"builtins.MemoryError", "torch.OutOfMemoryError"} or any(words in first for words in OUT_OF_MEMORY):
        return f"memory ran out ({said}): choose a smaller --ctx, fewer bits or another --device; `skvq plan` says what fits"
    if "torch.AcceleratorError" in kinds:
        return f"the GPU failed ({said}) and its results are lost: rerun, or use --backend reference (slow but safe)"
    if "triton.OutOfResources" in kinds:
        return f"a kernel does not fit this GPU ({said}): use --backend reference, and please report it"
    return None
