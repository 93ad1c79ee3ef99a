"""``skvq plan``: what a run would need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from skvq.commands.errors import OneLineCommand
from skvq.commands.options import (
    cache_config,
    cache_options,
    ctx_option,
    json_option,
    model_option,
    prefill_option,
    rope_scaling_option,
    total_option,
)
from skvq.engine.errors import OptionError


@click.command(cls=OneLineCommand, short_help="Show memory, the largest context, and times.")
@model_option
@ctx_option
@click.option(
    "--sequences",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sequences alive at once, which share the pages of one context unless --total-tokens says more.",
)
@total_option
@click.option("--memory", help="Memory to fit in, such as 80GiB; default: the device's.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="a100, a100-40, h100, h200, l40s, 3090, 4090; cpu, cuda, cuda:N or auto of this machine.",
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: the one the device would use.")
@prefill_option
@click.option("--calibration", type=click.Path(path_type=Path), help="With --bits-budget: exact for the bits this file chose.")
@rope_scaling_option
@cache_options
@json_option
def plan(**options: Any) -> None:
    """Show what a run would need, from the model's shape alone: memory by part, largest context per width, times."""
    if options["calibration"] is not None and options["bits_budget"] is None:
        raise OptionError("--calibration needs --bits-budget: with given bits, memory does not depend on the calibration")
    cache = cache_config(options)
    from skvq.engine.plan_report import plan_report

    report = plan_report(
        options["model"],
        cache,
        context=options["ctx"],
        sequences=options["sequences"],
        total_tokens=options["total_tokens"],
        memory=options["memory"],
        device=options["device"],
        dtype=options["dtype"],
        prefill=options["prefill"],
        calibration=options["calibration"],
        rope_scaling=options["rope_scaling"],
    )
    click.echo(json.dumps(report.as_dict()) if options["as_json"] else report.table())
    report.check()
