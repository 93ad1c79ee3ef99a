"""``skvq serve``: answer clients of OpenAI's API."""

from __future__ import annotations

import signal
from pathlib import Path
from threading import Thread
from typing import Any

import click

from skvq.commands.errors import OneLineCommand
from skvq.commands.options import (
    cache_config,
    cache_options,
    calibration_option,
    ctx_option,
    engine_options,
    load_engine,
    model_option,
    on_full_option,
    prefill_option,
    sampling_config,
    sampling_of,
    total_option,
)
from skvq.commands.types import object_of
from skvq.engine.errors import OptionError

MAX_NEW_TOKENS = 2048
"""Of an answer whose length neither the request nor the command says: a place is kept for as many."""


@click.command(cls=OneLineCommand, short_help="Serve a model with OpenAI's API.")
@model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all of this machine's.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--sequences", type=click.IntRange(1, 256), default=8, show_default=True, help="Most answers written together.")
@click.option("--allow-origin", metavar="ORIGIN", help="Web pages that may ask, such as http://localhost:3000; * is all.")
@click.option("--api-key", envvar="SKVQ_API_KEY", help="What clients must send as their key. Default: $SKVQ_API_KEY, or none.")
@click.option(
    "--chat-template-kwargs",
    callback=object_of,
    help="JSON object for the model's chat template: Qwen3 answers at once with '{\"enable_thinking\": false}'.",
)
@click.option(
    "--no-prefix-cache",
    is_flag=True,
    help="Read every prompt in full: answers do not depend on what was asked before, and prompts that begin alike take longer.",
)
@on_full_option
@ctx_option
@total_option
@calibration_option
@prefill_option
@engine_options
@cache_options
@sampling_of(MAX_NEW_TOKENS, "random")
def serve(**options: Any) -> None:
    """Serve a model over HTTP, with OpenAI's API (completions and chat completions, streamed too). Sampling options hold where
    a request says nothing."""
    defaults, origin = sampling_config(options), options["allow_origin"]
    if origin is not None and not (origin.isascii() and origin.isprintable()):
        raise OptionError(
            f"allow_origin {origin!r} is no address of a page: its characters must be those of ASCII (xn--... for others)"
        )
    cache = cache_config(options)
    from skvq.server.handler import Handler
    from skvq.server.listener import Server, Settings
    from skvq.server.service import Service

    calibration: Path | None = options["calibration"]
    with Server(options["host"], options["port"], Handler) as server:
        engine = load_engine(
            options,
            cache,
            context=options["ctx"],
            calibration=calibration,
            prefill=options["prefill"],
            max_sequences=options["sequences"],
            total_tokens=options["total_tokens"],
            prefix_cache=not options["no_prefix_cache"],
            on_full=options["on_full"],
            chat_template_kwargs=options["chat_template_kwargs"],
        )
        engine.sampling_of(defaults)
        service = Service(engine)
        settings = Settings(
            model=options["model"],
            defaults=defaults,
            key=options["api_key"] or None,
            origin=origin,
            report=engine.report,
        )
        signal.signal(signal.SIGTERM, lambda number, frame: service.stop())
        listening = Thread(target=server.serve, args=(service, settings), daemon=True)

        def ready() -> None:
            listening.start()
            context = f"{engine.parts.setup.max_context:,}"
            context += f" ({options['total_tokens']:,} in all)" if options["total_tokens"] else ""
            click.echo(f"skvq: {options['model']}, context {context}, at {server.address}; Ctrl-C ends it", err=True)

        try:
            service.run(ready)
        finally:
            if listening.is_alive():
                server.end()
