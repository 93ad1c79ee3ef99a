"""Options that several commands share, and the configs and engine they describe.

Whatever needs torch is imported when a command runs: help and option errors do not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from skvq.commands.types import Seed, TokenCount, bits_of, counts_of, schema_of
from skvq.engine.config import METHODS, ON_FULL, PREFILLS, CacheConfig, SamplingConfig
from skvq.engine.filters import AttentionSinks, rule_from_text

if TYPE_CHECKING:
    from skvq.engine.generate import Engine

F = TypeVar("F", bound=Callable[..., Any])


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that adds several options, in this order in the help."""

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


model_option = click.option(
    "--model",
    "-m",
    required=True,
    help="Alias (see `skvq models`), folder, .gguf file, or on the hub org/name or org/name:Q4_K_M; "
    "NAME:Q8_0 rounds weights to 8 bits.",
)
ctx_option = click.option(
    "--ctx",
    type=TokenCount(),
    help="Context to make room for: 131072, 1e6, 128K; default: the trained length.",
)
total_option = click.option(
    "--total-tokens",
    type=TokenCount(),
    help="Tokens that all sequences hold together; default: --ctx, and a few pages for each.",
)
ctxs_option = click.option(
    "--ctx", callback=counts_of, default="4096", show_default=True, help="Context lengths in tokens, such as 4096,32K."
)
calibration_option = click.option("--calibration", type=click.Path(path_type=Path), help="File made by `skvq calibrate`.")
prefill_option = click.option(
    "--prefill", type=click.Choice(PREFILLS), default="exact", show_default=True, help="How prompts are read."
)
on_full_option = click.option(
    "--on-full",
    type=click.Choice(ON_FULL),
    default="stop",
    show_default=True,
    help="When the context is full: end, or drop the oldest packed pages behind the sinks and go on (from a --ctx of about "
    "2,600 on; a long window needs more).",
)
download_option = click.option("--no-download", is_flag=True, help="Use only files already on this machine.")


def use_threads(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    """Click callback: the threads torch, and with it every CPU kernel, computes on."""
    if value is not None:
        from skvq.engine.machine import set_threads

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else value
        if value > cores:
            click.echo(f"skvq: {value} threads on {cores} cores wait for one another: fewer are faster", err=True)
        set_threads(value)


machine_options = stack(
    click.option("--backend", default="auto", show_default=True, help="auto, triton, numba, reference, or a plug-in's name."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N."),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16, bfloat16."),
    click.option(
        "--threads",
        type=click.IntRange(1, 4096),
        callback=use_threads,
        expose_value=False,
        help="CPU threads; use fewer than the core count on a busy machine. Default: torch's.",
    ),
)
rope_scaling_option = click.option(
    "--rope-scaling", help="KIND:FACTOR, to exceed the trained length: chunks:4, yarn:4, dynamic:4, linear:4, or yarn:4:32768."
)
engine_options = stack(
    machine_options,
    rope_scaling_option,
    click.option(
        "--dummy-weights",
        is_flag=True,
        help="Random weights of the model's shape: nothing is downloaded; output is meaningless.",
    ),
    download_option,
)
"""Taken by every command that loads a model; read by ``load_engine``."""

packing_options = stack(
    click.option("--method", type=click.Choice(METHODS), default="rotate", show_default=True, help="How the cache is packed."),
    click.option("--key-bits", callback=bits_of, default="2", show_default=True, help="1.5, 2, 3, 4 or 8."),
    click.option("--value-bits", callback=bits_of, default="2", show_default=True, help="1.5, 2, 3, 4 or 8."),
    click.option(
        "--bits-budget",
        type=float,
        help="Replaces --key-bits/--value-bits: maximum average bits per number including metadata; bits are then chosen per "
        "layer and kv head, for keys and values separately.",
    ),
    click.option("--group-size", type=int, default=64, show_default=True, help="Channels that share a scale: 32, 64, 128."),
)
"""How numbers are quantized: what a calibration depends on."""

cache_options = stack(
    packing_options,
    click.option("--window", type=int, default=128, show_default=True, help="Most recent tokens kept in 16 bits."),
    click.option("--sinks", type=int, default=5, show_default=True, help="First tokens kept in 16 bits."),
    click.option(
        "--filter", "filters", multiple=True, help="Further rules: key-outliers, heavy-hitters(budget=32), pkg.mod:Class."
    ),
)


def sampling_of(most: int, seed: int | str) -> Callable[[F], F]:
    """Options of ``SamplingConfig``; ``most`` tokens and ``seed`` are the defaults."""
    return stack(
        click.option(
            "-n", "--max-new-tokens", type=TokenCount(0), default=most, show_default=True, help="Most tokens that are written."
        ),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option("--top-p", type=float, default=1.0, show_default=True),
        click.option("--top-k", type=int, default=0, show_default=True),
        click.option("--min-p", type=float, default=0.0, show_default=True),
        click.option("--repeat-penalty", type=float, default=1.0, show_default=True),
        click.option("--seed", type=Seed(), default=seed, show_default=True, help="A whole number, or random."),
        click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
        click.option("--json-schema", callback=schema_of, help="A JSON schema or its file: the answer is JSON of this form."),
        click.option("--regex", help="Regular expression that the whole answer matches, such as 'yes|no'."),
        click.option("--ignore-eos", is_flag=True, help="Keep writing past end-of-text tokens, up to the limit."),
        click.option(
            "--prompt-lookup",
            type=int,
            default=0,
            show_default=True,
            help="Tokens guessed from the text before and checked in one step, such as 3: faster where answers quote.",
        ),
    )


sampling_options = sampling_of(256, 0)
json_option = click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON object.")

PACKING_NAMES = ("method", "key_bits", "value_bits", "bits_budget", "group_size")
SAMPLING_NAMES = tuple(field.name for field in fields(SamplingConfig) if field.name != "logprobs")  # for programs


def pick(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """These options by name."""
    return {name: options[name] for name in names}


def is_given(name: str) -> bool:
    """Whether the option was written on the command line, even with its default's value."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def cache_config(options: Mapping[str, Any]) -> CacheConfig:
    """The cache that ``cache_options`` describe."""
    rules = (AttentionSinks(options["sinks"]), *map(rule_from_text, options["filters"]))
    return CacheConfig(**pick(options, PACKING_NAMES), window=options["window"], filters=rules)


def sampling_config(options: Mapping[str, Any]) -> SamplingConfig:
    """How answers are drawn. Raises OptionError for a form that they cannot have: before a model is loaded."""
    from skvq.engine.grammar import require_form

    config = SamplingConfig(**pick(options, SAMPLING_NAMES))
    require_form(config)
    return config


def load_engine(
    options: Mapping[str, Any],
    cache: CacheConfig,
    *,
    context: int | None,
    max_sequences: int = 1,
    prefix_cache: bool = False,
    **more: Any,
) -> Engine:
    """The engine that ``model_option`` and ``engine_options`` describe, with room for ``context`` tokens; ``more`` are other
    arguments of ``Engine.load``.

    Most commands do without prefix reuse: they read one prompt, or measure several with a common prefix that must be read the
    same way.
    """
    from skvq.engine.generate import Engine

    return Engine.load(
        options["model"],
        max_context=context,
        max_sequences=max_sequences,
        cache=cache,
        prefix_cache=prefix_cache,
        download=not options["no_download"],
        **pick(options, ("backend", "device", "dtype", "dummy_weights", "rope_scaling")),
        **more,
    )
