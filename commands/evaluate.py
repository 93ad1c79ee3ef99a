"""``skvq eval``: how far a cache's output is from the 16-bit one's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from skvq.calibrate.corpus import BUILT_IN
from skvq.commands.errors import OneLineCommand
from skvq.commands.options import (
    cache_config,
    cache_options,
    calibration_option,
    engine_options,
    is_given,
    json_option,
    load_engine,
    model_option,
)
from skvq.commands.text import corpus_text
from skvq.commands.types import TokenCount
from skvq.engine.config import CacheConfig
from skvq.engine.errors import OptionError
from skvq.engine.trials.plots import depth_plot, require_plot, shown_name


@click.command("eval", cls=OneLineCommand, short_help="Measure a cache against the 16-bit one.")
@model_option
@click.option("--text", help="Text file to score; default: Python's bundled documentation.")
@click.option("--tokens", type=TokenCount(2), default=2048, show_default=True, help="Tokens of the text to score.")
@click.option("--stride", type=TokenCount(2), help="Score segments of this many tokens, each independently.")
@click.option("--methods", help="Several caches in one pass: rotate,reorder,plain,fp; with key and value bits: rotate:2:1.5.")
@click.option("--by-position", is_flag=True, help="Also report the error by depth.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the error by depth, as PNG, PDF or SVG (needs skvq[plot]).")
@click.option("--exact-window", is_flag=True, help="Keep exactly --window tokens, as papers simulate, not whole tiles.")
@calibration_option
@engine_options
@cache_options
@json_option
def evaluate(**options: Any) -> None:
    """Measure a cache against the 16-bit one: perplexity, KL divergence in nats per token, top-1 agreement."""
    if options["plot"] is not None:
        require_plot(options["plot"])
    if options["methods"] is not None and is_given("method"):
        raise OptionError("--method and --methods cannot be combined: give one or the other")
    cache = cache_config(options)
    caches = [cache] if options["methods"] is None else [_variant(cache, part) for part in options["methods"].split(",")]
    own = options["methods"] is not None and all(":" in part for part in options["methods"].split(",") if part.strip() != "fp")
    if own and (is_given("key_bits") or is_given("value_bits")):
        raise OptionError("--methods gives bits for each of its methods: leave --key-bits and --value-bits out")
    text = corpus_text(options["text"])
    if not text.strip():
        raise OptionError(f"{options['text']} holds no text to score")
    most = min(options["tokens"], len(text.encode()) + 1)  # a token is a byte or more
    stride = min(options["stride"] or most, most)
    engine = load_engine(options, replace(cache, method="fp"), context=stride)
    rows = engine.evaluate(
        text,
        caches,
        tokens=options["tokens"],
        stride=stride,
        calibration=options["calibration"],
        exact_window=options["exact_window"],
    )
    if (
        options["text"] is None
        and options["calibration"] is None
        and any(one.method in ("rotate", "reorder") for one in caches)
    ):
        engine.report.message(f"without --text, {BUILT_IN} is scored, on which calibrations are made: other texts do worse")
    for row in rows:
        click.echo(_eval_line(row), err=options["as_json"])
        if options["by_position"]:
            for part in row["by_position"]:
                line = f"    {part['first']:>7,} - {part['last']:>7,}   KL {part['kl']:.4f}   top-1 {part['top1']:.3f}"
                click.echo(line, err=options["as_json"])
    if options["as_json"]:
        shown = [{k: v for k, v in r.items() if options["by_position"] or k != "by_position"} for r in rows]
        told = {"model": options["model"], "text": options["text"] or BUILT_IN, "stride": stride}
        told |= {name: options[name] for name in ("exact_window", "rope_scaling")}
        click.echo(json.dumps({**told, **(shown[0] if options["methods"] is None else {"results": shown})}))
    if options["plot"] is not None:
        title = f"{shown_name(options['model'])}, {rows[0]['tokens']:,} tokens"
        depth_plot(rows, [row["name"] for row in rows], title, options["plot"])
        click.echo(f"skvq: wrote {options['plot']}", err=True)


def _variant(cache: CacheConfig, text: str) -> CacheConfig:
    """A cache from ``method[:key bits:value bits]``."""
    name, *bits = text.strip().split(":")
    try:
        widths = [float(b) for b in bits]
        if len(widths) not in (0, 2):
            raise ValueError(text)
    except ValueError:
        raise OptionError(f"--methods: {text!r} is not METHOD or METHOD:KEY_BITS:VALUE_BITS, such as rotate:2:1.5") from None
    chosen = replace(cache, method=name)
    if widths and not chosen.is_packed:
        raise OptionError(f"--methods: {text!r}: method {name} has 16 bits, leave the others out")
    return chosen if not widths else chosen.with_bits(*widths)


def _eval_line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:16}  {row['bits_per_element']:5.2f} bits   ppl {row['ppl']:.3f} (16-bit {row['ppl_fp']:.3f})   "
        f"KL {row['kl']:.4f}   top-1 {row['top1']:.3f}   {row['tokens']:,} tokens"
    )
