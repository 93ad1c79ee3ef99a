"""``skvq bench``: speed and stress tests of the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import click

from skvq import __version__
from skvq.commands.conversation import ended_like_interrupted
from skvq.commands.errors import OneLineCommand, OneLineGroup
from skvq.commands.options import (
    cache_config,
    cache_options,
    calibration_option,
    ctxs_option,
    download_option,
    engine_options,
    json_option,
    load_engine,
    machine_options,
    prefill_option,
    stack,
)
from skvq.commands.types import depths_of
from skvq.engine.errors import OptionError

if TYPE_CHECKING:
    from skvq.engine.cache_setup import CacheSetup
    from skvq.engine.config import CacheConfig
    from skvq.engine.model_config import ModelConfig
    from skvq.engine.trials.bench import Bench


@click.group(cls=OneLineGroup)
def bench() -> None:
    """Measure speed and stress-test the cache."""


@bench.command("soak", cls=OneLineCommand, short_help="Append, fork, cut, save, restore, free at random.")
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Number of random operations.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--backend", default="auto", show_default=True, help="numba, reference, or a plug-in's name.")
@json_option
def soak_command(steps: int, seed: int, backend: str, as_json: bool) -> None:
    """Append, fork, truncate, save, restore and free at random, checking every invariant after each step."""
    from skvq.engine.machine import find_backend, pick_device
    from skvq.engine.report import StderrReporter
    from skvq.engine.trials.soak import soak

    with ended_like_interrupted():  # what it has saved is removed
        result = soak(steps, seed, find_backend(backend, pick_device("cpu")), StderrReporter())
    operations = ", ".join(f"{count:,} {name}" for name, count in result["operations"].items())
    click.echo(f"{steps:,} steps of seed {seed}, nothing lost: {operations}; {result['seconds']:.1f} s", err=as_json)
    if as_json:
        click.echo(json.dumps(result))


bench_options = stack(
    click.option("--model", "-m", help="Alias, folder, .gguf file or org/name; its weights are loaded."),
    click.option(
        "--shape", help="Like --model, with random weights: only its config is read. NAME:Q4_K makes them in such blocks."
    ),
    ctxs_option,
    calibration_option,
    engine_options,
    cache_options,
    json_option,
)


def _with_model(options: dict[str, Any]) -> dict[str, Any]:
    """The options with ``model`` and ``dummy_weights`` set from --model or --shape, of which one must be given."""
    model, shape = options["model"], options["shape"]
    if (model is None) == (shape is None):
        raise OptionError("give either --model (real weights) or --shape (random weights)")
    return {**options, "model": model or shape, "dummy_weights": options["dummy_weights"] or shape is not None}


def _show_bench(measured: Bench, options: Mapping[str, Any], cache: CacheConfig, config: ModelConfig) -> None:
    as_json, shown = options["as_json"], []
    click.echo(measured.ceiling(), err=as_json)
    for row in measured.rows:
        click.echo(row.line(), err=as_json)
        shown.append(row)
    if as_json:
        told = {name: options[name] for name in ("model", "dummy_weights", "rope_scaling", "prefill") if name in options}
        click.echo(json.dumps({**told, **_told(cache, config), "version": __version__, **measured.as_dict(shown)}))


def _told(cache: CacheConfig, config: ModelConfig) -> dict[str, Any]:
    """What was measured, for programs; bits are means over layers and heads."""
    told: dict[str, Any] = {"layers": config.num_layers, "method": cache.method, "window": cache.window}
    if cache.is_packed:
        told |= dict(zip(("key_bits", "value_bits"), cache.mean_bits(config), strict=True))
        told |= {"bits_budget": cache.bits_budget, "group_size": cache.group_size}
    return told


def _bare(config: ModelConfig, options: Mapping[str, Any], context: int) -> tuple[CacheSetup, ModelConfig, CacheConfig]:
    """A cache without a model, its shape (``config`` with ``--layers`` layers) and its bits: of a budget some within it."""
    from skvq.engine.machine import find_backend, pick_device, pick_dtype
    from skvq.engine.sizes import with_longest_tile
    from skvq.engine.stress import bare_setup

    device = pick_device(options["device"])
    layers = options["layers"] or config.num_layers
    spans = islice(cycle(config.attention_spans), layers)
    config = replace(config, num_layers=layers, attention_spans=tuple(spans))
    backend, dtype = find_backend(options["backend"], device), pick_dtype(options["dtype"], device)
    config = config.with_heads_of(backend.head_size_for(config.head_size))
    cache = with_longest_tile(cache_config(options).fitted(config), config)
    setup = bare_setup(config, cache, max_context=context, max_sequences=1, backend=backend, dtype=dtype, device=device)
    return setup, config, cache


@bench.command("decode", cls=OneLineCommand)
@bench_options
@click.option("--attention-only", is_flag=True, help="Measure only attention over the cache, without weights or a whole step.")
@click.option("--layers", type=click.IntRange(1, 1024), help="With --attention-only: layers to fill; default: the model's.")
def decode_command(**options: Any) -> None:
    """Time a decode step, and its attention, at each context length."""
    from skvq.engine.report import StderrReporter
    from skvq.engine.rope_scaling import scaled
    from skvq.engine.trials.bench import SPARE, bench_attention, bench_decode
    from skvq.loaders.hub import config_of

    options, contexts = _with_model(options), options["ctx"]
    if options["attention_only"]:
        if options["calibration"] is not None:
            raise OptionError("--calibration does not apply to --attention-only: without weights, calibration is made up")
        config = config_of(options["model"], download=not options["no_download"])
        if options["rope_scaling"] is not None:
            config = scaled(config, options["rope_scaling"])
        setup, config, cache = _bare(config, options, max(contexts))
        _show_bench(bench_attention(setup, config, contexts, StderrReporter()), options, cache, config)
        return
    if options["layers"] is not None:
        raise OptionError("--layers needs --attention-only: a model's number of layers is fixed")
    engine = load_engine(options, cache_config(options), context=max(contexts) + SPARE, calibration=options["calibration"])
    _show_bench(bench_decode(engine, contexts), options, engine.parts.cache, engine.parts.model.config)


@bench.command("prefill", cls=OneLineCommand)
@bench_options
@prefill_option
def prefill_command(**options: Any) -> None:
    """Time reading a prompt, and its attention, at each length."""
    from skvq.engine.trials.bench import bench_prefill

    options, contexts = _with_model(options), options["ctx"]
    engine = load_engine(
        options,
        cache_config(options),
        context=max(contexts),
        calibration=options["calibration"],
        prefill=options["prefill"],
    )
    _show_bench(bench_prefill(engine, contexts), options, engine.parts.cache, engine.parts.model.config)


@bench.command("planted", cls=OneLineCommand, short_help="Plant keys in a random cache and look for them.")
@click.option("--shape", default="smollm2-135m", show_default=True, help="Alias, folder or file; only its config is read.")
@ctxs_option
@click.option("--depths", callback=depths_of, default="0,25,50,75,100", show_default=True, help="Per cent of the context.")
@click.option("--layers", type=click.IntRange(1, 1024), help="Layers to fill; default: the model's.")
@click.option("--seed", type=int, default=0, show_default=True)
@machine_options
@download_option
@cache_options
@json_option
def planted_command(**options: Any) -> None:
    """Plant keys at chosen depths of a random cache and check that attention finds them."""
    from skvq.engine.machine import find_backend, pick_device
    from skvq.engine.report import StderrReporter
    from skvq.engine.trials.planted import planted, require_found, require_places, rows
    from skvq.loaders.hub import config_of

    device, contexts, depths = pick_device(options["device"]), options["ctx"], options["depths"]
    shape = config_of(options["shape"], download=not options["no_download"])
    for context in contexts:
        require_places(depths, context)
    setup, config, cache = _bare(replace(shape, chunks=None), options, max(contexts))  # keys are met as they are planted
    found = []
    for context in contexts:
        some = planted(setup, config.num_heads, context, depths, seed=options["seed"], report=StderrReporter())
        for one in some:
            click.echo(one.line(), err=options["as_json"])
        found += some
    if options["as_json"]:
        backend = find_backend(options["backend"], device).name
        where = {"shape": options["shape"], "seed": options["seed"], "device": str(device), "backend": backend}
        click.echo(json.dumps({**where, **_told(cache, config), "results": rows(found)}))
    require_found(found)
