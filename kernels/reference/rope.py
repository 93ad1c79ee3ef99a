"""Rotary position embedding of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.interface import RopeFrequencies
from skvq.kernels.ops import apply_rope


def rotary(x: Tensor, positions: Tensor, rope: RopeFrequencies, *, inverse: bool = False) -> Tensor:
    """RoPE of ``x`` [T, heads, D] at ``positions`` [T], or its inverse, scale included; float32, with angles in float64."""
    angle = positions.to(rope.inv_freq.device, torch.float64)[:, None, None] * rope.inv_freq  # [T, 1, D/2]
    factor = 1 / rope.scale if inverse else rope.scale
    cos, sin = (angle.cos() * factor).float(), (angle.sin() * (-factor if inverse else factor)).float()
    return apply_rope(x.float(), cos, sin)
