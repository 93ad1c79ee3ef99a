"""``skvq calibrate``: make a calibration file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from skvq.calibrate.corpus import BUILT_IN
from skvq.commands.errors import OneLineCommand
from skvq.commands.options import (
    PACKING_NAMES,
    engine_options,
    is_given,
    json_option,
    load_engine,
    model_option,
    packing_options,
    pick,
)
from skvq.commands.text import corpus_text
from skvq.commands.types import TokenCount
from skvq.engine.config import CacheConfig
from skvq.engine.errors import OptionError


@click.command(cls=OneLineCommand, short_help="Make a calibration file.")
@model_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Calibration file to write.")
@click.option("--text", help="Text file to calibrate on; default: Python's bundled documentation.")
@click.option("--tokens", type=TokenCount(32), default=16384, show_default=True, help="Tokens of the text to use.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of --method reorder; others draw nothing.",
)
@click.option("--ctx", type=TokenCount(), default=2048, show_default=True, help="Intended context, if RoPE depends on it.")
@click.option("--window", type=int, default=128, show_default=True, help="With --bits-budget: the cache's window; 256 is most.")
@engine_options
@packing_options
@json_option
def calibrate(**options: Any) -> None:
    """Make a calibration file: transform, groups, units and clip factors for a model and its cache options."""
    output, text = options["output"], options["text"]
    if is_given("window") and options["bits_budget"] is None:
        raise OptionError("--window needs --bits-budget: a calibration for given bits works with every window")
    cache = CacheConfig(**pick(options, PACKING_NAMES), window=options["window"])
    corpus = corpus_text(text)
    from skvq.loaders.artifact import require_replaceable

    require_replaceable(output)
    engine = load_engine(options, CacheConfig(method="fp"), context=options["ctx"])
    header = engine.calibrate(
        cache, corpus, output, corpus_name=BUILT_IN if text is None else text, tokens=options["tokens"], seed=options["seed"]
    )
    from skvq.engine.identity import bits_text

    chosen = "" if header.bits_budget is None else f"; bits by layer: {bits_text(header.layer_bits)}"
    click.echo(f"skvq: wrote {output} ({header.method}, {header.tokens:,} tokens of {header.corpus}{chosen})", err=True)
    if options["as_json"]:
        click.echo(json.dumps({"output": str(output), **asdict(header)}))
