"""Token embeddings, and what is held for weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from skvq.kernels.linear import StoredMatrix


class Embedding(Protocol):
    """Rows of a matrix by token id."""

    device: torch.device
    dtype: torch.dtype  # of the hidden states

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows [..., d] of ids int64 [...]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held in memory; a tensor may be shared."""


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


class DenseEmbedding:
    """Weight [V, d] in the compute dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.device, self.dtype = weight, weight.device, weight.dtype

    def __call__(self, ids: Tensor) -> Tensor:
        return self.weight[ids]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)


class StoredEmbedding:
    """A stored matrix whose rows are expanded one by one, to the compute dtype."""

    def __init__(self, matrix: StoredMatrix, dtype: torch.dtype) -> None:
        self.matrix, self.device, self.dtype = matrix, matrix.data.device, dtype

    def __call__(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids.reshape(-1)).to(self.dtype).view(*ids.shape, self.matrix.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix.data,)
