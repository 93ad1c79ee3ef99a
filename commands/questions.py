"""Many questions about one text, each answered on its own and several together (``skvq run --questions``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from skvq.commands.conversation import run_prompt
from skvq.commands.text import file_text, joined
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError

if TYPE_CHECKING:
    from skvq.engine.cache import SequenceCache
    from skvq.engine.generate import Engine
    from skvq.engine.request import Request

TOGETHER = 8
"""Most answers that are written together: each has a window of its own in memory."""


def questions_of(file: str) -> list[str]:
    """Lines of a file that are not blank. Raises OptionError if there are none."""
    asked = [line.strip() for line in file_text(file).splitlines() if line.strip()]
    if not asked:
        raise OptionError(f"{file} holds no question: give one a line")
    return asked


def answer_each(
    engine: Engine, sequence: SequenceCache, text: str, asked: Sequence[str], sampling: SamplingConfig, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Answer each question after the text, or in a fork of the sequence where that holds one: what is asked first changes no
    other answer. Written in their order, as soon as they are whole, unless they are for JSON."""
    found = list[dict[str, Any]]()
    with engine.batch(interleaved=False) as batch:
        requests = [
            batch.add(run_prompt(question, options), sampling, sequence=sequence, fork=True)
            if sequence.length
            else batch.add(run_prompt(joined(text, question), options), sampling)
            for question in asked
        ]
        for question, request in zip(asked, requests, strict=True):
            while not request.finish:
                batch.step()
            found.append(_told(question, request, options))
    timing = engine.timing
    click.echo(
        f"skvq: {len(asked):,} questions: read {timing.prompt_tokens:,} tokens, reused {timing.reused_tokens:,}, wrote "
        f"{timing.new_tokens:,}",
        err=True,
    )
    return found


def _told(question: str, request: Request, options: dict[str, Any]) -> dict[str, Any]:
    if not options["as_json"]:
        click.echo(f"> {question}\n{request.text.strip()}\n")
    return {"question": question, "text": request.text, "finish": request.finish}
