"""``reorder``: channels of alike range share a group (SKVQ, arXiv 2405.06219, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.calibrate.clip import fit_unit, sample, search_clip, weighted_error
from skvq.calibrate.rotate import query_metric
from skvq.calibrate.stats import LayerStats
from skvq.engine.config import CacheConfig

STRETCH = 16
"""Tokens over which a channel's extremes are taken before they are averaged. Extremes over the whole corpus are those of a few
odd tokens: groups made for them have 1.8 times the error of these, and a KL twice as large (docs/accuracy.md)."""


def typical_range(x: Tensor) -> Tensor:
    """Minimum and maximum of each channel of ``x`` [T, C] over STRETCH tokens, on average; float64 [C, 2]."""
    whole = x[: max(1, len(x) // STRETCH) * STRETCH]
    stretches = whole.view(-1, min(STRETCH, len(x)), x.shape[1])
    return torch.stack([stretches.amin(1).double().mean(0), stretches.amax(1).double().mean(0)], 1)


def cluster_channels(x: Tensor, groups: int, seed: int) -> Tensor:
    """Group of every channel of ``x`` [T, C] by K-means on its typical (min, max); int64 [C] on the host, none is empty."""
    from sklearn.cluster import KMeans  # two seconds of import that only this method needs

    features = typical_range(x).cpu().numpy()
    labels = torch.from_numpy(KMeans(groups, n_init=10, random_state=seed).fit(features).labels_).long()
    return fill_empty(labels, groups)


def fill_empty(labels: Tensor, groups: int) -> Tensor:
    """Give a group without channels (K-means on equal features) one of the largest group's."""
    count = torch.bincount(labels, minlength=groups)
    for group in (count == 0).nonzero()[:, 0].tolist():
        donor = int((labels == int(count.argmax())).nonzero()[0])
        count[labels[donor]] -= 1
        labels[donor] = group
        count[group] = 1
    return labels


def fit_reorder(stats: LayerStats, config: CacheConfig, seed: int) -> dict[str, Tensor]:
    """Tensors of one layer (``engine.codecs``): labels over all heads, keys before RoPE.

    Clip factors are those whose error disturbs least: scores, on average over queries and positions, and the layer's output.
    """
    heads, size = stats.keys.shape[2:]
    groups = heads * size // config.group_size
    tensors: dict[str, Tensor] = {}
    metrics = {"key": query_metric(stats.queries, heads), "value": stats.output_gram}
    for side, x, bits in (("key", stats.keys, config.key_bits), ("value", stats.values, config.value_bits)):
        weight = metrics[side].diagonal(dim1=1, dim2=2).flatten().float()  # [C]
        flat = x.flatten(0, 1).flatten(1)  # [S * T, C]
        labels = cluster_channels(flat, groups, seed).to(flat.device)
        unit, clip = (torch.empty(groups, device=flat.device) for _ in range(2))
        for group in range(groups):
            y = flat[:, labels == group]
            unit[group] = fit_unit(y)
            clip[group] = search_clip(sample(y), bits, unit[group], weighted_error(sample(y), weight[labels == group]))
        tensors |= {f"{side}_labels": labels}
        tensors |= {f"{side}_unit": unit.view(heads, -1), f"{side}_clip": clip.view(heads, -1)}
    return tensors


def fit_plain(stats: LayerStats, config: CacheConfig) -> dict[str, Tensor]:
    """Tensors of one layer for ``plain``: the unit only, and the whole range."""
    tensors: dict[str, Tensor] = {}
    for side, x in (("key", stats.turned_keys), ("value", stats.values)):
        unit = fit_unit(x.reshape(-1, x.shape[2], x.shape[3] // config.group_size, config.group_size))
        tensors |= {f"{side}_unit": unit, f"{side}_clip": torch.ones_like(unit)}
    return tensors
