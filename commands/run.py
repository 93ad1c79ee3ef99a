"""``skvq run``: read a text and go on from it."""

from __future__ import annotations

import json
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skvq.commands.conversation import converse, save_whole
from skvq.commands.errors import OneLineCommand
from skvq.commands.options import (
    cache_config,
    cache_options,
    calibration_option,
    ctx_option,
    engine_options,
    is_given,
    json_option,
    load_engine,
    model_option,
    on_full_option,
    prefill_option,
    sampling_config,
    sampling_options,
)
from skvq.commands.questions import TOGETHER, answer_each, questions_of
from skvq.commands.text import joined, questions, read_text
from skvq.commands.types import TokenCount, object_of
from skvq.engine.config import CacheConfig
from skvq.engine.errors import OptionError
from skvq.loaders.files import require_writable

if TYPE_CHECKING:
    from skvq.engine.cache import SequenceCache
    from skvq.engine.generate import Engine


LONG_TEXT = 4_000_000
"""Characters; more take seconds before anything is read."""


@click.command(cls=OneLineCommand)
@model_option
@click.option("-p", "--prompt", help="Text to continue or, with --chat, to answer.")
@click.option(
    "-f", "--file", "files", multiple=True, help="File with the text, - for standard input; may be repeated, -p follows."
)
@click.option("--chat", is_flag=True, help="Use the model's chat format.")
@click.option(
    "-i",
    "--interactive",
    is_flag=True,
    help="Each line of standard input is the next prompt, the first one too unless -p is given; until Ctrl-D.",
)
@click.option(
    "--questions",
    help="File with a question per line: each is answered from the text or the session alone, several together.",
)
@click.option("--system", help="System message, with --chat.")
@click.option(
    "--chat-template-kwargs",
    callback=object_of,
    help="JSON object for the model's chat template, with --chat: Qwen3 answers at once with '{\"enable_thinking\": false}'.",
)
@click.option(
    "--session",
    type=click.Path(path_type=Path),
    help="Resume from this file if it exists, with the cache, context and RoPE scaling it was saved with; write it at the end, "
    "on Ctrl-C and on SIGTERM.",
)
@click.option("--read-only", is_flag=True, help="Answer from --session and leave its file as it is: for the next question.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Keep a half-read prompt here, every minute, on Ctrl-C and SIGTERM; go on from it if it exists.",
)
@on_full_option
@click.option("--fill", type=TokenCount(0), default=0, help="Random tokens put into the cache before the text.")
@ctx_option
@calibration_option
@prefill_option
@engine_options
@cache_options
@sampling_options
@json_option
def run(**options: Any) -> None:
    """Read a text and go on from it."""
    session: Path | None = options["session"]
    resumes = session if session is not None and session.exists() else None
    require_consistent(options, goes_on=resumes is not None)
    asked_each = None if options["questions"] is None else questions_of(options["questions"])
    kept = None if options["read_only"] or asked_each else session
    for path in (kept, options["checkpoint"]):
        if path is not None:
            require_writable(path)
    text = first_text(options, goes_on=resumes is not None)
    sampling = sampling_config(options)
    if resumes is not None:
        options = resumed(options, resumes)
    engine = load_engine(
        options,
        run_cache(options),
        max_sequences=1 if asked_each is None else 1 + min(TOGETHER, len(asked_each)),
        prefix_cache=asked_each is not None,
        context=options["ctx"],
        calibration=options["calibration"],
        prefill=options["prefill"],
        on_full=options["on_full"],
        chat_template_kwargs=options["chat_template_kwargs"],
    )
    sequence = begun(engine, resumes, options)
    if options["fill"]:
        engine.fill(sequence, options["fill"], seed=sampling.seed or 0)
    if len(text) > LONG_TEXT:
        engine.report.message(f"turning {len(text) / 1e6:,.0f} million characters into tokens")
    if asked_each is not None:
        answers = answer_each(engine, sequence, text, asked_each, sampling, options)
        if options["as_json"]:
            click.echo(json.dumps({"answers": answers}))
        return
    asked = questions() if options["interactive"] else iter(())
    if options["interactive"] and options["prompt"] is None:
        question = next(asked, None)
        if question is None:
            engine.report.message("nothing was asked" + (", so the text was not read" if text else ""))
            return
        text = joined(text, question)
    written = converse(engine, sequence, text, asked, sampling, {**options, "session": kept})
    if kept is not None:
        save_whole(sequence, kept)
    summary = engine.summary(sequence)
    click.echo(f"skvq: {summary.line()}", err=True)
    if options["as_json"]:
        click.echo(json.dumps({"text": written, **summary.as_dict()}))


def begun(engine: Engine, session: Path | None, options: dict[str, Any]) -> SequenceCache:
    """An empty sequence, or that of a session."""
    if session is None:
        return engine.new_sequence()
    sequence = engine.restore(session)
    if options["files"]:
        engine.report.message(
            f"{session} holds {sequence.length:,} tokens, and {', '.join(options['files'])} is read after them: to ask about "
            "what it holds, leave -f out"
        )
    return sequence


def require_consistent(options: dict[str, Any], *, goes_on: bool) -> None:
    """Raise OptionError for options of ``skvq run`` that contradict each other; ``goes_on``: from a session that is there."""
    if options["system"] is not None and not options["chat"]:
        raise OptionError("--system goes with --chat: without it the model reads the text as it is")
    if options["chat_template_kwargs"] is not None and not options["chat"]:
        raise OptionError("--chat-template-kwargs goes with --chat: without it the model reads the text as it is")
    if options["read_only"] and not goes_on:
        raise OptionError("--read-only answers from a session that is there: give its file with --session")
    if options["questions"] is not None:
        has_text, others = bool(options["files"] or options["prompt"]), ("interactive", "checkpoint", "fill")
        if has_text == goes_on or (options["session"] and not goes_on) or any(options[name] for name in others):
            raise OptionError(
                "--questions are answered from a text (-f, -p) or from a session that is there, without --interactive, "
                "--checkpoint and --fill"
            )
    if options["interactive"] and options["as_json"]:
        raise OptionError("--json prints one answer, --interactive asks for more: give one or the other")
    if None not in (files := (options["session"], options["checkpoint"])) and realpath(files[0]) == realpath(files[1]):
        raise OptionError("--session and --checkpoint are two files: give each a name of its own")
    if options["interactive"] and "-" in options["files"]:
        raise OptionError("--interactive reads questions from standard input, so -f - cannot: give the text in a file")


def first_text(options: dict[str, Any], *, goes_on: bool) -> str:
    """What is known of the first text before a model is loaded; empty if a sequence goes on, or a question is to come."""
    if options["prompt"] is None and not options["files"] and (goes_on or options["fill"] or options["interactive"]):
        return ""
    if options["session"] is not None and options["prompt"] is None and not options["files"]:
        raise OptionError(
            f"{options['session']} does not exist yet, and there is no text to begin it with: use -p TEXT or -f FILE"
        )
    return read_text(options["prompt"], options["files"])


def resumed(options: dict[str, Any], session: Path) -> dict[str, Any]:
    """The options, where they are left open those of the session that is gone on from.

    Raises SessionError where they contradict it, CapacityError if it does not fit.
    """
    from skvq.engine.session import require_fits, require_options, saved_options, session_header

    header = session_header(session)
    saved = {name: value for name, value in saved_options(header).items() if not is_given(name)}
    if is_given("key_bits") or is_given("value_bits"):  # they replace a budget, so they contradict one
        saved.pop("bits_budget", None)
    options = {**options, **saved}
    if options["ctx"] is not None:
        require_fits(header["length"], options["ctx"])
    require_options(header, session, cache_config(options))
    return options


def run_cache(options: dict[str, Any]) -> CacheConfig:
    """The cache of ``skvq run``. Raises SessionError where a checkpoint contradicts it."""
    cache = cache_config(options)
    if options["checkpoint"] is not None and options["checkpoint"].exists():
        require_checkpoint(options["checkpoint"], cache)
    return cache


def require_checkpoint(path: Path, cache: CacheConfig) -> None:
    """Raise SessionError if a checkpoint is of other cache options: before a model is loaded and calibrated."""
    from skvq.engine.checkpoint import KIND
    from skvq.engine.container import read_header
    from skvq.engine.session import require_options

    require_options(read_header(path, KIND), path, cache, KIND)
