"""``rotate``: subtract the token-independent part, change to a basis in which rounding hurts least, fit how to decode it.

With k the keys of a head after RoPE and their mean's removal, S their covariance, and C the metric in which an error counts
(``e^T C e`` is its mean squared effect: on the scores for keys, on the layer's output for values):

    M = C^-1/2 U s^p H^T,   U s V^T = svd(C^1/2 S^1/2)       k ~ M x, x spread evenly over the channels by the Hadamard matrix H
    A = M^T C M / n + damp                                   the metric of x, whose errors ``quantize_lattice`` keeps small
    key_basis = A^-1 M^T C / n                               the x that fits k best

p = 1/2 is WUSH (arXiv 2512.00956), the optimum for plain rounding; with lattice rounding of keys 0.7 is better (measured).
Keys are read back by M. Values are read back by D, the regression of the exact attention output on that over stored values:
it keeps the shrinkage of least squares where errors average out and undoes it where they add up.

Decompositions are done on the CPU wherever the sample is: a GPU takes such small matrices one by one, and longer for each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skvq.calibrate.clip import fit_unit, search_lattice_clip
from skvq.calibrate.pages import read_back
from skvq.calibrate.stats import LayerStats, first_of, reading_gap, reading_of, reading_queries
from skvq.engine.codecs import are_chosen_together, unit_factor
from skvq.engine.config import CacheConfig
from skvq.kernels.interface import Backend, HeadSide, RopeFrequencies
from skvq.kernels.layout import LEVELS

KEY_POWER, VALUE_POWER = 0.7, 0.5
DAMP, FINE_DAMP = 0.01, 0.001
"""Added to the metric's mean diagonal of one; the second from FINE_LEVELS levels on."""

FINE_LEVELS = 16
"""From here on errors are small and nothing is gained by fitting how values are read: they are read by M."""

RIDGE, BLEND = 0.02, 0.5
"""The regression's ridge, towards the best multiple of M, and the share of the fit that is used. All of the fit is better still
on text like the calibration's (KL .0043 against .0049 for values at 2 bits) and no better than M on other text (.0103, .0105;
half of it: .0071)."""


def spread_matrix(size: int) -> Tensor:
    """Orthogonal matrix that spreads every channel over all: Hadamard for powers of two, else a seeded random rotation.

    float64 [size, size].
    """
    if size & (size - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < size:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return h.div(size**0.5)
    generator = torch.Generator().manual_seed(0)
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return torch.mul(q, torch.sign(torch.diagonal(r)))


def query_metric(energy: Tensor, kv_heads: int) -> Tensor:
    """Metric of keys from the mean square of queries after RoPE [H, D]: float64 [KH, D, D], diagonal.

    Equal inside each RoPE pair: the average over it is independent of position, so it holds at a million tokens as well.
    """
    size = energy.shape[-1]
    energy = energy.double().view(kv_heads, -1, size).mean(1)
    pair = (energy[:, : size // 2] + energy[:, size // 2 :]) / 2
    return torch.diag_embed(torch.cat([pair, pair], 1))


def synthesis(covariance: Tensor, metric: Tensor, power: float) -> Tensor:
    """M [KH, D, D] of the module's docstring, float64, scaled so that x has variance one."""
    root_metric, root_covariance = _root(metric), _root(covariance)
    u, s, _ = torch.linalg.svd(root_metric @ root_covariance)
    m = torch.linalg.solve(root_metric, u * s[:, None, :] ** power) @ spread_matrix(metric.shape[-1]).to(metric).T
    inverse = torch.linalg.inv(m)
    variance = torch.einsum("hij,hjk,hik->hi", inverse, covariance, inverse).mean(-1)
    return torch.mul(m, variance.clamp_min(1e-30).sqrt()[:, None, None])


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root, eigenvalues no smaller than 1e-5 of the largest."""
    values, vectors = torch.linalg.eigh(matrix)
    least = values.amax(-1, keepdim=True).clamp_min(1e-12) * 1e-5
    return torch.matmul(vectors * values.maximum(least).sqrt()[:, None, :], vectors.transpose(1, 2))


Store = Callable[[Tensor, float, HeadSide], Tensor]
"""What pages hold of numbers [T, KH, D] in a side's stored basis at a width: ``read_back`` of some backend."""


def fit_side(
    covariance: Tensor, y: Tensor, metric: Tensor, power: float, bits: float, group_size: int, store: Store
) -> dict[str, Tensor]:
    """How a side of ``covariance`` [KH, D, D] is held: ``basis``, ``decode`` (M), ``metric`` [KH, D, D]; ``unit``, ``clip``
    [KH, G] from ``y`` [T, KH, D], a sample of it. All on the device of ``y``.
    """
    metric = metric.cpu()
    m = synthesis(covariance.cpu(), metric, power)
    weighted = m.transpose(1, 2) @ metric
    gram = weighted @ m
    norm = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp_min(1e-30)
    damp = DAMP if LEVELS[bits] < FINE_LEVELS else FINE_DAMP
    gram = gram / norm + damp * torch.eye(len(gram[0]), dtype=gram.dtype, device=gram.device)
    basis = torch.linalg.solve(gram, weighted / norm)
    found = {name: t.float().to(y.device) for name, t in (("basis", basis), ("decode", m), ("metric", gram))}
    x = torch.einsum("hij,thj->thi", found["basis"], y)
    groups = x.view(*x.shape[:2], -1, group_size)
    found["unit"] = fit_unit(groups.abs().amax((0, -1)))
    found["clip"] = search_lattice_clip(x, head_side(found, bits), lambda rows, side: store(rows, bits, side))
    return found


def head_side(found: dict[str, Tensor], bits: float) -> HeadSide:
    """The quantizer's view of what ``fit_side`` found."""
    metric, unit = found["metric"], found["unit"]
    clip = found.get("clip", torch.ones_like(unit))
    return HeadSide(unit=unit, clip=clip, metric=metric, factor=unit_factor(metric), has_metric=are_chosen_together(bits))


def fit_rotate(stats: LayerStats, rope: RopeFrequencies, config: CacheConfig, backend: Backend) -> dict[str, Tensor]:
    """Tensors of one layer (``engine.codecs``)."""

    def store(rows: Tensor, bits: float, side: HeadSide) -> Tensor:
        return read_back(rows, bits, side, rope, backend)

    key_mean, value_mean = stats.keys.mean.float(), stats.values.mean.float()
    first, group_size = first_of(stats.sample_keys.shape[1]), config.group_size
    keys = stats.rope.apply(stats.sample_keys - key_mean)[:, first:].flatten(0, 1)
    values = stats.sample_values - value_mean  # [S', T, KH, D]
    key_metric, value_metric = query_metric(stats.query_energy, len(key_mean)), stats.output_gram.double()
    found_keys = fit_side(stats.keys.covariance, keys, key_metric, KEY_POWER, config.key_bits, group_size, store)
    far = values[:, first:].flatten(0, 1)
    found_values = fit_side(stats.values.covariance, far, value_metric, VALUE_POWER, config.value_bits, group_size, store)
    decode = found_values["decode"]
    if LEVELS[config.value_bits] < FINE_LEVELS:
        chosen = values[reading_of(len(values))]
        x = torch.einsum("hij,sthj->sthi", found_values["basis"], chosen)
        stored = store(x.flatten(0, 1), config.value_bits, head_side(found_values, config.value_bits)).view(x.shape)
        decode = fit_reading(stats, stored, chosen, decode)
    return {
        "key_mean": key_mean,
        "key_basis": found_keys["basis"],
        "query_basis": found_keys["decode"].transpose(1, 2),
        "key_metric": found_keys["metric"],
        "key_unit": found_keys["unit"],
        "key_clip": found_keys["clip"],
        "value_mean": value_mean,
        "value_basis": found_values["basis"],
        "output_basis": decode,
        "value_metric": found_values["metric"],
        "value_unit": found_values["unit"],
        "value_clip": found_values["clip"],
    }


def fit_reading(stats: LayerStats, stored: Tensor, values: Tensor, synthesis_: Tensor) -> Tensor:
    """D [KH, D, D] such that D (sum p x) is nearest the sum p v over calibration queries, p their weights on packed tokens.

    stored (x) and values [S'', T, KH, D] of the texts ``reading_of`` names; ridge regression towards the best multiple of M.
    """
    _, tokens, kv_heads, size = values.shape
    t, at = torch.tensor(reading_queries(tokens), device=values.device), torch.arange(tokens, device=values.device)
    far = (t[:, None] - at >= reading_gap(tokens)) & (at >= first_of(tokens))
    keys = stats.rope.apply(stats.sample_keys[reading_of(len(stats.sample_keys))])
    xx, ox = (torch.zeros(kv_heads, size, size, dtype=torch.float64, device=values.device) for _ in range(2))
    for text, queries in enumerate(stats.sample_queries):
        q = queries.view(len(t), kv_heads, -1, size)
        score = torch.einsum("nhrd,thd->hrnt", q, keys[text]) / size**0.5
        p = score.masked_fill(at > t[:, None], -torch.inf).softmax(-1) * far
        x, o = (torch.einsum("hrnt,thd->hrnd", p, y).flatten(1, 2).double() for y in (stored[text], values[text]))
        xx += x.transpose(1, 2) @ x
        ox += o.transpose(1, 2) @ x
    m, xx, ox = synthesis_.double().cpu(), xx.cpu(), ox.cpu()
    gain = (ox * m).sum((1, 2)) / ((m @ xx) * m).sum((1, 2)).clamp_min(1e-30)
    ridge = RIDGE * xx.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)[:, None, None]
    ridge = ridge * torch.eye(size, dtype=xx.dtype, device=xx.device)
    scaled = gain[:, None, None] * m
    fitted = torch.linalg.solve(xx + ridge, (ox + scaled @ ridge).transpose(1, 2)).transpose(1, 2)
    return torch.lerp(scaled, fitted, BLEND).float().to(values.device)
