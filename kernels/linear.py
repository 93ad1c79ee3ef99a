"""A model's matrices as its operations see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
