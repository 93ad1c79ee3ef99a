"""Quantizing a head as a whole: the codes of all its channels are chosen together, in a metric that calibration found."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.interface import HeadSide
from skvq.kernels.layout import E4M3_MIN
from skvq.kernels.reference.e4m3 import e4m3_decode, e4m3_encode
from skvq.kernels.reference.quantizer import fit_range

LATTICE_FITS = 2
"""Plain least-squares steps on scale and mid at the start."""

LATTICE_ROUNDS = 2
"""Rounds of descent over the codes and a fit of scale and mid in the metric."""

LATTICE_SWEEPS = 2
"""Passes over all channels in one descent."""


def quantize_lattice(y: Tensor, levels: int, side: HeadSide) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [T, KH, D], scale and mid bytes [T, KH, G], uint8, of ``y`` [T, KH, D] whose error e has a small ``e^T metric e``.

    Rounding is a closest-point problem in the lattice that the metric spans: the nearest-plane algorithm (Babai 1986; LDLQ in
    QuIP, arXiv 2307.13304), then sweeps of coordinate descent over the codes, alternating with a least-squares fit of scale
    and mid in the same metric. Metadata are rounded to E4M3 before the last sweeps, so that the codes compensate for it.
    Computed in the dtype of the metric.
    """
    tokens, heads, size = y.shape
    groups = side.unit.shape[1]
    width = size // groups
    y = y.to(side.metric.dtype)
    half, tiny = (levels - 1) / 2, side.unit * E4M3_MIN
    scale, mid = fit_range(y.view(tokens, heads, groups, width), levels, side.clip, tiny, LATTICE_FITS)
    code = _nearest_plane(y, _by_channel(scale, width), _by_channel(mid, width), levels, side.factor)
    for _ in range(LATTICE_ROUNDS):
        error = y - _by_channel(mid, width) - _by_channel(scale, width) * code  # the metric's gradient follows from it
        slope = torch.einsum("hij,thj->thi", side.metric, error)
        code = _descend(code, slope, _by_channel(scale, width), half, side.metric)
        scale, mid = _fit_metric(y, code, scale, mid, side.metric, tiny)
    scale_byte = e4m3_encode(scale / side.unit)
    exact = e4m3_decode(scale_byte) * side.unit
    error = y - _by_channel(mid, width) - _by_channel(exact, width) * code
    slope = torch.einsum("hij,thj->thi", side.metric, error)
    blocks = side.metric.view(heads, groups, width, groups, width).diagonal(dim1=1, dim2=3).sum((1, 2))  # [KH, G]
    mid_byte = e4m3_encode((mid + slope.view(tokens, heads, groups, width).sum(-1) / blocks) / side.unit)
    error = y - _by_channel(e4m3_decode(mid_byte) * side.unit, width) - _by_channel(exact, width) * code
    slope = torch.einsum("hij,thj->thi", side.metric, error)
    code = _descend(code, slope, _by_channel(exact, width), half, side.metric)
    return (code + half).to(torch.uint8), scale_byte, mid_byte


def _by_channel(x: Tensor, width: int) -> Tensor:
    """[..., G] -> [..., G * width]"""
    return x.repeat_interleave(width, -1)


def _nearest_plane(y: Tensor, scale: Tensor, mid: Tensor, levels: int, factor: Tensor) -> Tensor:
    """Centred codes [T, KH, D], rounded from the last channel to the first; each corrects for the errors of those before."""
    half = (levels - 1) / 2
    code, error = torch.zeros_like(y), torch.zeros_like(y)
    for i in range(y.shape[-1] - 1, -1, -1):
        wanted = y[..., i] + (error[..., i + 1 :] * factor[:, i, i + 1 :]).sum(-1)
        code[..., i] = ((wanted - mid[..., i]) / scale[..., i] + half).round().clamp(0, levels - 1) - half
        error[..., i] = y[..., i] - mid[..., i] - scale[..., i] * code[..., i]
    return code


def _descend(code: Tensor, slope: Tensor, scale: Tensor, half: float, metric: Tensor) -> Tensor:
    """Coordinate descent: each centred code in turn moves to where ``slope = metric error`` [T, KH, D] vanishes."""
    code, slope = code.clone(), slope.clone()
    curvature = metric.diagonal(dim1=1, dim2=2) * scale  # [T, KH, D]
    channels = list(zip(*(x.unbind(-1) for x in (code, slope, curvature, scale)), metric.unbind(1), strict=True))
    for _ in range(LATTICE_SWEEPS):
        for code_i, slope_i, curvature_i, scale_i, row in channels:  # views, but for the curvature
            moved = (slope_i / curvature_i).add_(code_i).add_(half).round_().clamp_(0, 2 * half).sub_(half)
            step = (moved - code_i).mul_(scale_i)
            code_i.copy_(moved)
            slope -= step[..., None] * row
    return code


def _fit_metric(y: Tensor, code: Tensor, scale: Tensor, mid: Tensor, metric: Tensor, tiny: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and mid [T, KH, G] of least squares in the metric, one group after another, for centred codes [T, KH, D]."""
    groups = scale.shape[-1]
    width = y.shape[-1] // groups
    scale, mid = scale.clone(), mid.clone()
    for group in range(groups):
        at = slice(group * width, (group + 1) * width)
        error = y - _by_channel(mid, width) - _by_channel(scale, width) * code
        slope = torch.einsum("hij,thj->thi", metric[:, at], error)  # [T, KH, width]
        block, part = metric[:, at, at], code[..., at]
        turned = torch.einsum("hij,thj->thi", block, part)
        ones = block.sum(-1)  # [KH, width]
        cc, c1, one = (part * turned).sum(-1), (part * ones).sum(-1), ones.sum(-1)
        cs, s1 = (part * slope).sum(-1), slope.sum(-1)
        determinant = cc * one - c1 * c1
        step = (cs * one - s1 * c1) / torch.where(determinant != 0, determinant, 1.0)
        good = (determinant > 1e-6 * cc * one) & (scale[..., group] + step > tiny[:, group])
        step = torch.where(good, step, 0.0)
        mid[..., group] += torch.where(good, (s1 - step * c1) / one, 0.0)
        scale[..., group] += step
    return scale, mid
