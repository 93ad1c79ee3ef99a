"""``skvq plan``: memory by part, the largest context at each bit width, and times predicted from the card's limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skvq.engine.calibration import needs_none, with_chosen_bits
from skvq.engine.cards import CARDS, OF_BLOCKS, Machine, card_of
from skvq.engine.config import CacheConfig
from skvq.engine.dual_chunks import require_chunkable
from skvq.engine.errors import ModelError, OptionError, counted
from skvq.engine.machine import cuda_bytes
from skvq.engine.model_config import ModelConfig
from skvq.engine.planner import Plan, Planner, Room
from skvq.engine.prefill_form import CHUNK_TOKENS, PrefillForm
from skvq.engine.rope_scaling import beyond_training, scaled
from skvq.engine.sizes import fullest_choices, gib, layer_token_bytes
from skvq.engine.weight_forms import form_of
from skvq.kernels.layout import gpu_head_size
from skvq.loaders.dummy import DummySource
from skvq.loaders.hub import config_of, resolve
from skvq.loaders.open import dummy_source, open_source
from skvq.loaders.source import WeightSource

WIDTHS = ((1.5, 1.5), (2.0, 1.5), (2.0, 2.0), (3.0, 2.0), (4.0, 4.0))
SEGMENT_OVERHEAD = 1.05
"""Streaming prefill also unpacks what it attends to: about a twentieth more time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A plan, what else would fit, and how long it would take."""

    model: str
    cache: CacheConfig
    card: Machine
    sequences: int
    total_tokens: int | None
    plan: Plan
    largest: dict[str, int]
    prefill_seconds: float
    decode_ms: float
    trained_context: int
    beyond: str  # what is to be said of a context that exceeds it
    advice: str  # where it does not fit

    def check(self) -> None:
        """Raise CapacityError unless the plan fits."""
        self.plan.check(self.advice)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "model": self.model,
            "context": self.plan.context,
            "trained_context": self.trained_context,
            "sequences": self.sequences,
            "total_tokens": self.total_tokens,
            "method": self.cache.method,
            "bits_per_element": self.plan.bits_per_element,
            "group_size": self.cache.group_size,
            "window": self.cache.window,
            "bits_budget": self.cache.bits_budget if self.cache.is_packed else None,
            "upper_bound": self.cache.is_open,
            "device": self.card.name,
            "dtype": str(self.card.dtype).removeprefix("torch."),
            "memory": self.plan.memory,
            "parts": self.plan.parts,
            "total": self.plan.total,
            "prefill": str(self.plan.form),
            "host_parts": self.plan.host_parts,
            "host_memory": self.plan.host_memory,
            "arena": sum(v for k, v in self.plan.parts.items() if k.startswith("cache")),
            "fits": self.plan.fits,
            "largest_context": self.largest,
            "predicted_prefill_seconds": self.prefill_seconds,
            "predicted_decode_ms_per_token": self.decode_ms,
            "beyond_training": self.beyond,
            "assumed_efficiency": {
                "weights": self.card.weight_efficiency,
                "cache": self.card.cache_efficiency,
                "matrix": self.card.matrix_efficiency,
            },
        }

    def table(self) -> str:
        """For people."""
        card, plan = self.card, self.plan
        most = "at most " if self.cache.is_open else ""
        what = f"{self.model}, {plan.context:,} tokens"
        if self.sequences > 1:
            what += f" at most in each of {self.sequences} sequences, {self.total_tokens or plan.context:,} in all"
        lines = [f"{what}, {self.cache.method}, {most}{plan.bits_per_element:.3f} bits per element"]
        if self.cache.is_open:
            lines += [
                "upper bound: calibration chooses the bits of each layer; pass its file with --calibration for exact figures"
            ]
        lines += [f"  {name:32} {gib(size):>12}" for name, size in plan.parts.items()]
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        lines += [f"  {'total':32} {gib(plan.total):>12}   {verdict} {gib(plan.memory)} of {card.name}", ""]
        lines += [f"prefill: {plan.form}"]
        lines += [f"  {name + ', host':32} {gib(size):>12}" for name, size in plan.host_parts.items()]
        lines += [""]
        lines += ["largest context"]
        lines += [f"  {name:32} {tokens:>12,} tokens" for name, tokens in self.largest.items()]
        lines += [
            "",
            f"predicted, at {card.weight_efficiency:.0%} / {card.cache_efficiency:.0%} of {card.bandwidth / 1e9:,.0f} GB/s for "
            f"weights / cache and {card.matrix_efficiency:.0%} of {_flops(card.flops)}:",
            f"  {'prefill of the whole context':32} {_duration(self.prefill_seconds):>12}",
            f"  {'per token, at full context':32} {self.decode_ms:>9,.1f} ms",
        ]
        lines += ["", self.beyond] if self.beyond else []
        return "\n".join(lines)


def plan_report(
    model: str,
    cache: CacheConfig,
    *,
    context: int | None,
    sequences: int,
    total_tokens: int | None = None,
    memory: str | None,
    device: str,
    dtype: str | None,
    prefill: str,
    calibration: Path | None = None,
    rope_scaling: str | None = None,
) -> PlanReport:
    """The report for a model by name: only its config is read, and the header of ``calibration`` if there is one to say how a
    budget of bits was spent. Raises OptionError, ModelError or CalibrationError."""
    source = config_of(model)
    config = source if rope_scaling is None else scaled(source, rope_scaling)
    if context is None:
        context = config.trained_context
    if context >= 2**31:
        raise OptionError(f"a context has at most {2**31 - 1:,} tokens, got {context:,}")
    card = card_of(device, dtype)
    if card.name != "cpu":
        config = config.with_heads_of(gpu_head_size(config.head_size))
    weights = _weights_of(model, config)
    if calibration is not None and not cache.is_packed:
        raise needs_none(calibration)
    if calibration is not None:
        known = {} if isinstance(weights, DummySource) else {"fingerprint": weights.fingerprint}
        cache = with_chosen_bits(cache, calibration, config, **known)
    cache = cache.fitted(config)
    require_chunkable(config.cut_at(context), cache, shift=False)
    if memory is not None:
        card = replace(card, memory=parse_bytes(memory))
        if card.memory < 2**20:
            raise OptionError(f"memory {memory!r} is {counted(card.memory, 'byte')}: give more, with its unit, such as 80GiB")
    device = "cuda" if card.name in CARDS else card.name
    form = form_of("numba" if card.name == "cpu" else "triton", torch.device(device), card.dtype)
    weight_bytes, expanded_bytes = form.held_bytes(weights), form.expanded_bytes(weights)
    if expanded_bytes:
        card = replace(card, weight_efficiency=min(card.weight_efficiency, OF_BLOCKS))
    room = Room(
        memory=card.memory,
        weight_bytes=weight_bytes,
        expanded_bytes=expanded_bytes,
        host_memory=card.host_memory,
        cuda_bytes=cuda_bytes(device),
    )
    moved = weight_bytes + (4 * config.num_parameters if expanded_bytes else 0)
    planner = Planner(
        model=config, cache=cache, room=room, sequences=sequences, dtype=card.dtype, prefill=prefill, total_tokens=total_tokens
    )
    planner.require_total(context)
    plan = planner.plan(context)
    tables = [cache, replace(cache, method="fp"), *_other_widths(cache, config)]
    largest = {_name(c): replace(planner, cache=c).largest_context() for c in tables}
    return PlanReport(
        model=model,
        cache=cache,
        card=card,
        sequences=sequences,
        total_tokens=total_tokens,
        plan=plan,
        largest=largest,
        prefill_seconds=predicted_prefill(config, card, context, plan.form, moved),
        decode_ms=1e3 * predicted_decode(config, cache, card, context, weight_bytes - form.idle_bytes(weights)),
        trained_context=source.trained_context,
        beyond=beyond_training(context, source, config) if context > source.trained_context else "",
        advice="" if plan.fits else planner.advice(),
    )


def _other_widths(cache: CacheConfig, config: ModelConfig) -> list[CacheConfig]:
    """Packed caches of all widths; none where the groups do not fit the model's heads."""
    packed = cache if cache.is_packed else replace(cache, method="rotate")
    try:
        return [packed.with_bits(*widths).fitted(config) for widths in WIDTHS]
    except OptionError:
        return []


def predicted_prefill(config: ModelConfig, card: Machine, context: int, form: PrefillForm, moved: int = 0) -> float:
    """Seconds to read ``context`` tokens: two operations per weight and token, four per query channel and visible token; what
    groups of heads project again, and what passes between host and device.

    moved: bytes of weights that a chunk reads and writes: with experts that may take longer than to multiply by the chosen.
    """
    read = -(-context // CHUNK_TOKENS) * moved / (card.bandwidth * card.weight_efficiency)
    q = config.num_heads * config.head_size
    attention = sum(4 * q * min(context / 2, span) * context for span in config.attention_spans)
    groups = form.head_groups
    projected = (config.num_heads + 2 * config.num_kv_heads) * config.own_head_size
    again = 2 * config.hidden_size * projected * context * config.num_layers * (groups if groups > 1 else 0)
    rate = card.flops * card.matrix_efficiency
    seconds = max(2 * config.active_parameters * context / rate, read) + (attention + again) / rate
    passes = config.hidden_size * (groups + (2 if groups > 1 else 1)) + (2 * q if groups > 1 else 0)  # numbers a token
    copied = passes * context * config.num_layers * card.dtype.itemsize * form.host_states
    return (seconds + copied / card.host_bandwidth) * (SEGMENT_OVERHEAD if form.prefill == "streaming" else 1.0)


def predicted_decode(config: ModelConfig, cache: CacheConfig, card: Machine, context: int, weights: int) -> float:
    """Seconds per token: ``weights``, the bytes of all but an embedding table, and every packed byte in sight are read once."""
    layers = max((layer_token_bytes(choice, config) for choice in fullest_choices(cache, config)), key=sum)
    packed = sum(min(context, n) * size for n, size in zip(config.attention_spans, layers, strict=True))
    return float(weights / (card.bandwidth * card.weight_efficiency) + packed / (card.bandwidth * card.cache_efficiency))


def _weights_of(model: str, config: ModelConfig) -> WeightSource:
    """The weights if their files are here, else dummy ones: in blocks where the name says so."""
    try:
        return open_source(resolve(model, download=False))
    except ModelError:
        return dummy_source(model, config)


def parse_bytes(text: str) -> int:
    """Bytes from ``80GiB``, ``80GB``, ``80G``, ``512MiB``, however written, or a plain number.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([KMGT](?:I?B)?|B|)\s*", text.upper())
    if not match:
        raise OptionError(f"memory {text!r} is not a size such as 80GiB, 80GB or 512MiB")
    number, unit = match.groups()
    base = 1024 if "I" in unit else 1000
    return int(float(number) * base ** ("BKMGT".index(unit[0]) if unit else 0))


def _name(cache: CacheConfig) -> str:
    if not cache.is_packed:
        return "fp, 16 bits"
    if cache.bits_budget is not None:
        return f"{cache.method} {cache.bits_budget:g} bits g{cache.group_size}"
    return f"{cache.method} K{cache.key_bits:g} V{cache.value_bits:g} g{cache.group_size}"


def _flops(each_second: float) -> str:
    return f"{each_second / 1e12:,.1f} TFLOP/s" if each_second >= 1e12 else f"{each_second / 1e9:,.0f} GFLOP/s"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes >= 48 * 60:
        return f"{minutes / 60 / 24:,.1f} days"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{seconds / 60:.1f} min"
