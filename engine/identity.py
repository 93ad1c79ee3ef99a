"""What must match for stored cache bytes to mean the same: a session or checkpoint is refused unless all of it does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from skvq.engine.config import CacheConfig, LayerWidths, pairs_of
from skvq.engine.dual_chunks import TrueDistances
from skvq.engine.errors import SessionError
from skvq.engine.filters import FilterRule
from skvq.engine.rope import ModelRope
from skvq.loaders.artifact import digest_of

WORDS = {
    "fingerprint": "the model with fingerprint",
    "calibration": "the calibration with digest",
    "rope": "RoPE frequencies (scaling, context) with digest",
    "dtype": "16-bit type",
    "filters": "filter rules",
    "layer_bits": "bits by layer",
}
SAME = "use the same model, calibration and options"
SAME_BITS = "the same in all"
"""Bits by layer if no layer has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Model, method and everything that gives stored bytes their meaning."""

    fingerprint: str
    method: str
    key_bits: float
    value_bits: float
    layer_bits: str
    group_size: int
    window: int
    filters: str
    dtype: str
    rope: str
    calibration: str

    def as_dict(self) -> dict[str, object]:
        """For a file's header."""
        return asdict(self)


def require_same(ours: Mapping[str, object], found: Mapping[str, object], where: str) -> None:
    """Raise SessionError, naming both values, unless ``found``, a file's header, agrees with everything in ``ours``."""
    for name, value in ours.items():
        if found.get(name) != value:
            same = "give the file that it was made with (--calibration)" if name == "calibration" else SAME
            raise SessionError(
                f"{where} was made with {WORDS.get(name, name)} {_short(found.get(name))}, this run has {_short(value)}: "
                f"{same}, or another file"
            )


def _short(value: object) -> str:
    text = str(value)
    if isinstance(value, str) and (digest := re.match(r"[0-9a-f]{64}", text)):
        return text.replace(digest[0], digest[0][:12])
    return f"{value:g}" if isinstance(value, float) else repr(value)


def identity_of(
    cache: CacheConfig,
    fingerprint: str,
    tensors: Mapping[str, Tensor],
    rope: ModelRope,
    dtype: torch.dtype,
) -> Identity:
    """The identity of a cache; ``tensors`` are its calibration, ``dtype`` that of its full-precision slots."""
    return Identity(
        **options_of(cache),
        fingerprint=fingerprint,
        layer_bits=bits_text(cache.layer_bits if cache.is_packed else ()),
        group_size=cache.group_size if cache.is_packed else 0,
        dtype=str(dtype).removeprefix("torch."),
        calibration=digest_of(tensors),
        rope=rope_digest(rope) if isinstance(rope.distances, TrueDistances) else f"{rope_digest(rope)} {rope.distances}",
    )


def options_of(cache: CacheConfig) -> dict[str, Any]:
    """The part of an identity that options give, whatever the model; but for group sizes, which are fitted to its heads."""
    packed = cache.is_packed
    return {
        "method": cache.method,
        "key_bits": cache.key_bits if packed else 16.0,
        "value_bits": cache.value_bits if packed else 16.0,
        "window": cache.window,
        "filters": ", ".join(map(_rule_name, cache.rules)),
    }


def bits_text(layer_bits: Sequence[LayerWidths]) -> str:
    """Bits by layer for people, runs of equal layers together; kv heads of a layer apart where they differ.

    >>> bits_text([(2.0, 1.5), (2.0, 1.5), ((3.0, 2.0), (2.0, 2.0))]), bits_text([])
    ('2x K2V1.5, 1x K3V2|K2V2', 'the same in all')
    """
    runs = [(len(list(run)), "|".join(f"K{k:g}V{v:g}" for k, v in pairs_of(layer))) for layer, run in groupby(layer_bits)]
    return ", ".join(f"{count}x {name}" for count, name in runs) or SAME_BITS


def _rule_name(rule: FilterRule) -> str:
    """A rule with its parameters: the fields of a dataclass, else what numbers and texts the object holds."""
    if is_dataclass(rule):
        return repr(rule)
    told = {
        name: value
        for name, value in sorted(getattr(rule, "__dict__", {}).items())
        if isinstance(value, (bool, int, float, str))
    }
    parameters = ", ".join(f"{name}={value!r}" for name, value in told.items())
    return f"{type(rule).__module__}:{type(rule).__qualname__}" + (f"({parameters})" if told else "")


def rope_digest(rope: ModelRope) -> str:
    """Digest of all that turns queries and keys."""
    tensors = {"inv_freq": rope.turned.inv_freq, "scale": torch.tensor(rope.turned.scale, dtype=torch.float64)}
    if rope.unturned:
        tensors["unturned"] = torch.tensor(sorted(rope.unturned))
    if rope.query_beta:
        tensors["query"] = torch.tensor([rope.query_beta, rope.query_period], dtype=torch.float64)
    if rope.lengths is not None:
        tensors["lengths"] = rope.lengths
    return digest_of(tensors)
