"""``skvq calibrate``: make a calibration file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from skvq.commands.errors import OneLineCommand
from skvq.commands.options import cache_config, cache_options, engine_options, load_engine, model_option
from skvq.commands.text import corpus_text
from skvq.engine.calibration import BUILT_IN
from skvq.engine.identity import bits_text


@click.command(cls=OneLineCommand)
@model_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the calibration goes.")
@click.option("--text", help="Text file to calibrate on; default: reference prose that comes with Python.")
@click.option("--tokens", type=click.IntRange(min=32), default=16384, show_default=True, help="Tokens of it to use.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@engine_options
@cache_options
def calibrate(**options: Any) -> None:
    """Make a calibration file: the transform, groups, units and clip factors for a model and cache options."""
    output, text = options["output"], options["text"]
    cache = cache_config(options)
    corpus = corpus_text(text)
    engine = load_engine({**options, "ctx": options["ctx"] or 2048}, replace(cache, method="fp"))
    header = engine.calibrate(
        cache, corpus, output, corpus_name=BUILT_IN if text is None else text, tokens=options["tokens"], seed=options["seed"]
    )
    chosen = "" if header.bits_budget is None else f"; bits by layer: {bits_text(header.layer_bits)}"
    click.echo(f"skvq: wrote {output} ({header.method}, {header.tokens:,} tokens of {header.corpus}{chosen})", err=True)
