"""FP8 E4M3, the format of scales and mids."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.layout import E4M3_LARGEST, E4M3_MAX

ENOUGH = 1 + 2.0**-16
"""A byte that is so near below a scale counts as that scale: which one it is must not hang on the last bit of float32."""


def e4m3_encode(x: Tensor) -> Tensor:
    """Round to the nearest E4M3 byte (uint8), saturating at +-448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def encode_scale(x: Tensor, levels: int) -> Tensor:
    """The byte of a scale: the nearest, but at 256 levels not below ``x`` (unless that is beyond 448).

    A scale rounded down, by up to 1/16, cuts off the ends of its group. Up to 16 levels that costs no more than wider steps
    would; at 256 it would be most of the error (docs/accuracy.md).
    """
    byte = e4m3_encode(x)
    if levels < 256:
        return byte
    return byte + ((e4m3_decode(byte) * ENOUGH < x) & (byte < E4M3_LARGEST)).to(torch.uint8)


def e4m3_decode(byte: Tensor) -> Tensor:
    """Value of an E4M3 byte, float32."""
    return byte.view(torch.float8_e4m3fn).float()
