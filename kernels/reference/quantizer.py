"""Quantizing a group of numbers, each code rounded on its own.

Follows SKVQ (arXiv 2405.06219, section 3.2) with three changes: metadata are rounded to FP8 before the codes are computed,
not after; scale and mid are refined by least squares against the codes; mid is stored, not the lower end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.layout import E4M3_MIN
from skvq.kernels.reference.e4m3 import e4m3_decode, e4m3_encode, encode_scale

REFINE_STEPS = 3
"""Least-squares steps on scale and mid after the clipped range."""


def quantize(y: Tensor, levels: int, unit: Tensor, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale bytes and mid bytes of groups ``y`` [..., g]; ``unit`` and ``clip`` broadcast to [...].

    The range starts at clip * [min, max]; scale and mid are fitted to the codes by least squares REFINE_STEPS times, rounded to
    E4M3 in ``unit``, and the codes are taken against the rounded values. Returns uint8 [..., g], uint8 [...], uint8 [...].
    """
    y = y.float()
    scale, mid = fit_range(y, levels, clip, unit * E4M3_MIN, REFINE_STEPS)
    mid_byte = e4m3_encode(mid / unit)
    exact = e4m3_decode(mid_byte) * unit
    if levels == 256:
        scale = scale + (exact - mid).abs() / ((levels - 1) / 2)  # both ends stay in reach of the mid that is stored
    scale_byte = encode_scale(scale / unit, levels)
    code = round_codes(y, e4m3_decode(scale_byte) * unit, exact, levels)
    return code.to(torch.uint8), scale_byte, mid_byte


def fit_range(y: Tensor, levels: int, clip: Tensor, tiny: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Scale (at least ``tiny``) and mid [...] of groups [..., g]: the clipped range, then ``steps`` of plain least squares."""
    low, high = y.amin(-1) * clip, y.amax(-1) * clip
    scale, mid = torch.maximum((high - low) / (levels - 1), tiny), (high + low) / 2
    mean = y.mean(-1)
    for _ in range(steps):
        code = round_codes(y, scale, mid, levels) - (levels - 1) / 2
        centred = code - code.mean(-1, keepdim=True)
        spread = centred.square().sum(-1)
        fitted = torch.maximum((centred * y).sum(-1) / spread.clamp_min(1e-6), tiny)
        scale = torch.where(spread > 0, fitted, scale)
        mid = mean - scale * code.mean(-1)
    return scale, mid


def round_codes(y: Tensor, scale: Tensor, mid: Tensor, levels: int) -> Tensor:
    """Nearest codes, float [..., g], of groups [..., g] on the grid of scale and mid [...]."""
    return ((y - mid[..., None]) / scale[..., None] + (levels - 1) / 2).round().clamp(0, levels - 1)


def dequantize(code: Tensor, scale: Tensor, mid: Tensor, levels: int) -> Tensor:
    """``mid + scale * (code - (levels - 1) / 2)``, scale and mid [...] for codes [..., g], float32."""
    return mid[..., None] + scale[..., None] * (code.float() - (levels - 1) / 2)
