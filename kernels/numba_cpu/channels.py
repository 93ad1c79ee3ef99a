"""Which channels share a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.kernels.layout import PageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """The groups of one side. All tensors int64."""

    labels: Tensor  # [KH * D], group of each channel
    order: Tensor  # [KH * D], channels sorted by group
    starts: Tensor  # [groups + 1], where each group begins in ``order``


def channels_of(labels: Tensor, groups: int) -> Channels:
    """From ``labels`` int64 [KH * D], of which every one of ``groups`` occurs."""
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels, minlength=groups)
    assert len(counts) == groups and bool((counts > 0).all()), f"a group has no channel: {counts.tolist()}"
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Channels(labels=labels.contiguous(), order=order, starts=starts)


def contiguous_channels(layout: PageLayout) -> Channels:
    """Groups of ``group_size`` neighbouring channels, in order."""
    labels = torch.arange(layout.kv_heads * layout.head_size) // layout.group_size
    return channels_of(labels, layout.kv_heads * layout.groups)
