"""``reorder``: channels of similar range share a group (SKVQ, arXiv 2405.06219, section 3.1)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from skvq.calibrate.clip import fit_unit, sample, search_clip, weighted_error
from skvq.calibrate.rotate import query_metric
from skvq.calibrate.stats import LayerStats
from skvq.engine.config import CacheConfig


def cluster_channels(typical: Tensor, groups: int, seed: int) -> Tensor:
    """Group of every channel by K-means on its typical (min, max) [C, 2]; int64 [C] on the host, none is empty.

    On one thread: scikit-learn adds up what its threads found in the order in which they finish.
    """
    from sklearn.cluster import KMeans  # two seconds of import that only this method needs
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # channels that are all alike: see ``fill_empty``
        labels = KMeans(groups, n_init=10, random_state=seed).fit(typical.cpu().numpy()).labels_
    return fill_empty(torch.from_numpy(labels).long(), groups)


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
    heads, size = stats.keys.top.shape
    groups = heads * size // config.group_size
    tensors: dict[str, Tensor] = {}
    metrics = {"key": query_metric(stats.query_energy, heads), "value": stats.output_gram}
    for side, seen, x, bits in (
        ("key", stats.keys, stats.sample_keys, config.key_bits),
        ("value", stats.values, stats.sample_values, config.value_bits),
    ):
        weight = metrics[side].diagonal(dim1=1, dim2=2).flatten().float()  # [C]
        flat = sample(x.flatten(0, 1)).flatten(1)  # [tokens, C]
        labels = cluster_channels(seen.typical, groups, seed).to(flat.device)
        unit, clip = (torch.empty(groups, dtype=torch.float32, device=flat.device) for _ in range(2))
        for group in range(groups):
            of_group = labels == group
            y = flat[:, of_group]
            unit[group] = fit_unit(seen.top.flatten()[of_group].amax())
            clip[group] = search_clip(y, bits, unit[group], weighted_error(y, weight[of_group]))
        tensors |= {f"{side}_labels": labels}
        tensors |= {f"{side}_unit": unit.view(heads, -1), f"{side}_clip": clip.view(heads, -1)}
    return tensors


def fit_plain(stats: LayerStats, config: CacheConfig) -> dict[str, Tensor]:
    """Tensors of one layer for ``plain``: the unit only, and the whole range."""
    tensors: dict[str, Tensor] = {}
    for side, top in (("key", stats.turned_top), ("value", stats.values.top)):
        unit = fit_unit(top.view(len(top), -1, config.group_size).amax(-1))
        tensors |= {f"{side}_unit": unit, f"{side}_clip": torch.ones_like(unit)}
    return tensors
