"""A metric as the lattice quantizer multiplies by it, made once: two halves a number, in the order of reading."""

from __future__ import annotations

import torch

from skvq.kernels.interface import HeadSide

BLOCK = 16
"""Channels that are settled one by one before the others hear of them."""

TOP = 14
"""Largest numbers of a matrix lie below 2^TOP: as two halves the smallest have as many bits as they need beside these."""


class MetricTables:
    """The factor with all channels from the last to the first, then the metric with its rows divided by its diagonal: [2, KH].

    Both have a diagonal of ones, so nearest plane is one sweep of coordinate descent in the first, from codes of 0.
    """

    def __init__(self, side: HeadSide) -> None:
        metric, heads, size, groups = side.metric.double(), *side.metric.shape[:2], side.unit.shape[1]
        assert size % BLOCK == 0 and size // groups % BLOCK == 0, (size, groups)
        diagonal = metric.diagonal(dim1=1, dim2=2)
        both = torch.stack([side.factor.double().flip(1, 2), metric / diagonal[:, :, None]])  # [2, KH, D, D]
        up = torch.exp2(TOP - both.abs().amax((2, 3)).log2().ceil())  # [2, KH]
        whole = both * up[:, :, None, None]
        big = whole.half()
        parts = torch.stack([big, (whole - big.double()).half()], -1).view(2, heads, -1, BLOCK, size, 2)
        self.table = parts.permute(0, 1, 2, 4, 5, 3).contiguous()  # [2, KH, blocks, D, 2, BLOCK]
        blocks = both.view(2, heads, -1, BLOCK, size // BLOCK, BLOCK).diagonal(dim1=2, dim2=4)  # [2, KH, BLOCK, BLOCK, blocks]
        self.inner = blocks.permute(0, 1, 4, 3, 2).float().contiguous()  # [2, KH, blocks, from, to]
        ones = both.view(2, heads, size, groups, -1).sum(4)
        self.ones = ones.transpose(2, 3).float().contiguous()  # [2, KH, G, D]
        self.diagonal = diagonal.float().contiguous()  # [KH, D]
        total = metric.view(heads, groups, size // groups, groups, -1).diagonal(dim1=1, dim2=3).sum((1, 2))
        self.total = total.float().contiguous()  # [KH, G]
        self.down = (1 / up).float().contiguous()  # [2, KH]
