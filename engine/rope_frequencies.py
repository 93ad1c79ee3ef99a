"""How fast each pair of channels turns, by the kind of RoPE that a model has."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ModelConfig, RopeConfig, yarn_scale
from skvq.kernels.interface import RopeFrequencies


def frequencies_of(config: ModelConfig, context: int) -> RopeFrequencies:
    rope, size = config.rope, config.turned_size
    base = rope.theta
    steps = torch.arange(0, size, 2, dtype=torch.float64) / size
    scale = 1.0
    if rope.kind == "dynamic":
        longest = max(context, config.trained_context)
        stretch = rope.factor * longest / config.trained_context - (rope.factor - 1)
        base *= stretch ** (size / (size - 2))
    inv_freq = base**-steps
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(rope, config.trained_context, inv_freq)
    elif rope.kind == "yarn":
        inv_freq, scale = _yarn(rope, config.trained_context, size, inv_freq)
    elif rope.kind == "longrope":
        inv_freq, scale = _longrope(rope, config.trained_context, context, inv_freq)
    return RopeFrequencies(inv_freq=inv_freq, scale=scale)


def _llama3(rope: RopeConfig, trained: int, inv_freq: Tensor) -> Tensor:
    original = rope.original_context or trained
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    slow = wavelength > original / rope.low_freq_factor
    fast = wavelength < original / rope.high_freq_factor
    return torch.where(slow, inv_freq / rope.factor, torch.where(fast, inv_freq, blended))


def _yarn(rope: RopeConfig, trained: int, size: int, inv_freq: Tensor) -> tuple[Tensor, float]:
    original = rope.original_context or trained

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float64) - low) / (high - low or 0.001)
    extrapolated = 1 - ramp.clamp(0, 1)
    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    blended = inv_freq / rope.factor * (1 - extrapolated) + inv_freq * extrapolated
    return blended, yarn_scale(rope.factor) if scale is None else scale


def _longrope(rope: RopeConfig, trained: int, context: int, inv_freq: Tensor) -> tuple[Tensor, float]:
    original = rope.original_context or trained
    factors = rope.long_factor if context > original else rope.short_factor
    if len(factors) != len(inv_freq):
        raise ModelError(f"longrope has {len(factors)} factors for {len(inv_freq)} channel pairs")
    scale = rope.attention_factor
    if scale is None:
        scale = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
    return inv_freq / torch.tensor(factors, dtype=torch.float64), scale
