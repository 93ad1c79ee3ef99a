"""``skvq needle``: retrieval through the packed cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skvq.commands.errors import OneLineCommand
from skvq.commands.options import (
    cache_config,
    cache_options,
    calibration_option,
    ctxs_option,
    engine_options,
    json_option,
    load_engine,
    model_option,
    prefill_option,
)
from skvq.commands.text import corpus_text
from skvq.commands.types import depths_of
from skvq.engine.errors import OptionError
from skvq.engine.trials.plots import heat_map, require_plot, shown_name

if TYPE_CHECKING:
    from skvq.engine.trials.needle import Needle


@click.command(cls=OneLineCommand, short_help="Hide facts in long texts and ask for them.")
@model_option
@click.option("--haystack", help="Text file to hide the needle in; default: Python's bundled documentation.")
@click.option("--depths", callback=depths_of, default="0,25,50,75,100", show_default=True, help="Per cent of text before it.")
@click.option("--no-reference", is_flag=True, help="Skip the comparison with a 16-bit cache.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a heat map, as PNG, PDF or SVG (needs skvq[plot]).")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for the hidden numbers.")
@ctxs_option
@calibration_option
@prefill_option
@engine_options
@cache_options
@json_option
def needle(**options: Any) -> None:
    """Hide a fact at several depths of texts of several lengths and ask for it through the packed cache."""
    from skvq.engine.sizes import widest_regions
    from skvq.engine.trials.needle import needles, reference_of, require_packed, summary, total
    from skvq.loaders.hub import config_of

    contexts, depths, plot = *(list(dict.fromkeys(options[name])) for name in ("ctx", "depths")), options["plot"]
    if plot is not None:
        require_plot(plot)
    haystack, cache = corpus_text(options["haystack"]), cache_config(options)
    if not haystack.strip():
        raise OptionError(f"{options['haystack']} holds no text to hide a needle in")
    if cache.is_packed:  # calibration may take minutes
        shape = config_of(options["model"], download=not options["no_download"])
        require_packed(widest_regions(cache.fitted(shape), shape), min(contexts))
    engine = load_engine(
        options,
        cache,
        context=max(contexts),
        calibration=options["calibration"],
        prefill=options["prefill"],
        max_sequences=2,
    )
    reference = None if options["no_reference"] else reference_of(engine)

    def seen(one: Needle) -> None:
        click.echo(one.line(), err=options["as_json"])

    found = needles(engine, reference, haystack, contexts, depths, seed=options["seed"], seen=seen)
    click.echo(total(found), err=options["as_json"])
    if options["as_json"]:
        click.echo(json.dumps({"model": options["model"], **summary(found)}))
    if plot is not None:
        heat_map([n.as_dict() for n in found], f"{shown_name(options['model'])}, {engine.parts.cache.name}", plot)
        click.echo(f"skvq: wrote {plot}", err=True)
