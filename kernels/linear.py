"""A model's matrices as its operations see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """y = W x + b over the last dimension; how W is stored is the implementation's business."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def dense(self) -> Tensor:
        """W as float32 [out, in]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held in memory; a tensor may be shared."""


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """Weight [out, in] in the compute dtype."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        return self.weight.float()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class StoredMatrix(Protocol):
    """A matrix in the form its file has. On a CPU its products are of float32, on a GPU of 16-bit numbers."""

    data: Tensor
    shape: tuple[int, int]

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out[n] = W x[n] + bias``; x [N, in] contiguous, out [N, out] of its dtype, with rows at any stride."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` int64 [N] in float32."""


class StackedMatrix(StoredMatrix, Protocol):
    """Such as can hold several matrices of as many rows, one above the other."""

    def part(self, first: int, rows: int) -> StackedMatrix:
        """``rows`` rows from ``first`` on, both a multiple of 16; a view."""

    def multiply_each(self, x: Tensor, ids: Tensor, out: Tensor) -> None:
        """``out[p] = W_i x[p // (P / N)]``, W_i the matrix ``i = ids[p]`` of as many rows as ``out`` [P, rows] has columns.

        x [N, in] and out are contiguous, of one dtype; the host reads no number.
        """


class FloatMatrix:
    """A matrix of the compute dtype among stored ones."""

    def __init__(self, data: Tensor) -> None:
        assert data.dim() == 2, data.shape
        self.data, self.shape = data, (data.shape[0], data.shape[1])

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        out.copy_(F.linear(x, self.data, bias))

    def rows(self, ids: Tensor) -> Tensor:
        return self.data[ids].float()


Matrix = TypeVar("Matrix", bound=StoredMatrix)


@dataclass(frozen=True, slots=True)
class StoredLinear(Generic[Matrix]):
    """Matrices stacked by rows, as they are stored. One vector reads every byte once; nothing of it stays expanded."""

    parts: tuple[Matrix, ...]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out = x.new_empty(len(flat), self.outs)
        for part, bias, place in self.shares(out):
            part.multiply(flat, bias, place)
        return out.view(*x.shape[:-1], self.outs)

    @property
    def outs(self) -> int:
        """Rows of all parts."""
        return sum(part.shape[0] for part in self.parts)

    def shares(self, out: Tensor) -> Iterator[tuple[Matrix, Tensor | None, Tensor]]:
        """Every part with its share of the bias, and of ``out`` [N, outs]."""
        first = 0
        for part in self.parts:
            stop = first + part.shape[0]
            yield part, None if self.bias is None else self.bias[first:stop], out[:, first:stop]
            first = stop

    def dense(self) -> Tensor:
        return torch.cat([part.rows(torch.arange(part.shape[0], device=part.data.device)) for part in self.parts])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(part.data for part in self.parts) + (() if self.bias is None else (self.bias,))
