"""Mixture of experts: of many MLPs of a layer, each token goes through some, which a router chooses for it.

(Mixtral, arXiv 2401.04088, section 2.1; Qwen3, arXiv 2505.09388, section 2.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from skvq.kernels.linear import DenseLinear, Linear, StackedMatrix, StoredLinear

FEW_TOKENS = 16
"""Tokens of a sequence that go to their experts one by one, so that the host need not know which those are: at least as many as
a step has (``SamplingConfig.prompt_lookup`` and one). Of more, all that an expert has are multiplied at once."""


class Stack(Protocol):
    """A matrix [out, in] for each expert, all of one shape; how they are stored is the implementation's business."""

    def of(self, expert: int) -> Linear:
        """That of one expert, a view."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held in memory."""


@dataclass(frozen=True, slots=True)
class DenseStack:
    """Weights [experts, out, in] in the compute dtype."""

    weight: Tensor

    def of(self, expert: int) -> DenseLinear:
        return DenseLinear(self.weight[expert], None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)


@dataclass(frozen=True, slots=True)
class StoredStack:
    """Matrices one above the other, as they are stored, ``outs`` rows each."""

    matrix: StackedMatrix
    outs: int

    def of(self, expert: int) -> StoredLinear[StackedMatrix]:
        return StoredLinear((self.matrix.part(expert * self.outs, self.outs),), None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix.data,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """MLPs of a layer, of which each token goes through ``chosen``.

    Their weights are those of a softmax over all experts, or with ``normed`` over the chosen ones.
    """

    router: Linear  # d -> experts
    gate_up: Stack  # d -> 2 f, the gates first
    down: Stack  # f -> d
    count: int
    chosen: int
    normed: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held in memory."""
        return (*self.router.tensors, *self.gate_up.tensors, *self.down.tensors)


def route(logits: Tensor, chosen: int, *, normed: bool) -> tuple[Tensor, Tensor]:
    """Experts int64 [N, chosen] with the largest logits [N, experts], largest first, and their weights float32 [N, chosen].

    >>> import torch
    >>> ids, weights = route(torch.tensor([[0.0, 2.0, 1.0]]).log(), 2, normed=True)
    >>> ids.tolist(), [round(weight, 3) for weight in weights[0].tolist()]
    ([[1, 2]], [0.667, 0.333])
    """
    values, ids = logits.float().topk(chosen)
    if normed:
        return ids, values.softmax(-1)
    return ids, (values - logits.float().logsumexp(-1, keepdim=True)).exp()
