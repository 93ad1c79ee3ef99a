"""Model matrices held in the form their file has, and embeddings; dense matrices are in ``kernels.linear``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Embedding(Protocol):
    """Rows of a matrix by token id."""

    device: torch.device
    dtype: torch.dtype  # of the hidden states

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows [..., d] of ids int64 [...]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held in memory; a tensor may be shared."""


class StoredMatrix(Protocol):
    """A matrix in the form its file has, on the CPU, with float32 arithmetic."""

    data: Tensor
    shape: tuple[int, int]

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out[n] = W x[n] + bias``; x [N, in] contiguous, out [N, out] with rows at any stride."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` int64 [N] in float32."""


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


class FloatMatrix:
    """A float32 matrix among stored ones."""

    def __init__(self, data: Tensor) -> None:
        assert data.dtype == torch.float32 and data.dim() == 2, (data.dtype, data.shape)
        self.data, self.shape = data, (data.shape[0], data.shape[1])

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        out.copy_(F.linear(x, self.data, bias))

    def rows(self, ids: Tensor) -> Tensor:
        return self.data[ids]


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """Matrices stacked by rows, as they are stored. One vector reads every byte once; nothing of it stays expanded."""

    parts: tuple[StoredMatrix, ...]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        columns = self.parts[0].shape[1]
        flat = x.reshape(-1, columns).contiguous()
        out = torch.empty(*x.shape[:-1], sum(part.shape[0] for part in self.parts), dtype=torch.float32)
        if len(self.parts) == 1:
            self.parts[0].multiply(flat, self.bias, out.view(flat.shape[0], -1))
            return out
        first = 0
        for part in self.parts:
            stop = first + part.shape[0]
            part.multiply(flat, None if self.bias is None else self.bias[first:stop], out.flatten(0, -2)[:, first:stop])
            first = stop
        return out

    def dense(self) -> Tensor:
        return torch.cat([part.rows(torch.arange(part.shape[0])) for part in self.parts])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(part.data for part in self.parts) + (() if self.bias is None else (self.bias,))


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
    """A stored matrix whose rows are expanded one by one."""

    def __init__(self, matrix: StoredMatrix) -> None:
        self.matrix, self.device, self.dtype = matrix, matrix.data.device, torch.float32

    def __call__(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids.reshape(-1)).view(*ids.shape, self.matrix.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix.data,)
