"""The forms a model's weights may be held in, and the plain one: one dtype on one device. ``stored`` has the file's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from skvq.engine.linear import DenseEmbedding, Embedding
from skvq.engine.report import Reporter
from skvq.kernels.linear import DenseLinear, Linear
from skvq.loaders.names import expected_shapes
from skvq.loaders.source import QuantizedBlocks, WeightSource, check_finite

CPU = torch.device("cpu")


class Storage(Protocol):
    """Weights by canonical name, each read once."""

    def vector(self, names: Sequence[str]) -> Tensor:
        """Norms or biases, one after another."""

    def linear(self, names: Sequence[str], bias: Tensor | None) -> Linear:
        """Matrices stacked by rows."""

    def embedding(self, name: str) -> tuple[Embedding, Linear]:
        """Token embedding, and the same matrix as a head."""


class WeightReader:
    """A source whose weights are checked to be finite, with progress in numbers read."""

    def __init__(self, source: WeightSource, advance: Callable[[float], None]) -> None:
        self._source, self.advance = source, advance

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The weight in its stored type on a device, checked there: a card does it at the speed of its memory."""
        tensor = self._source.read(name).to(device)
        self.check(name, tensor)
        self.advance(tensor.numel())
        return tensor

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """As stored, not checked and not counted yet: ``check`` its scales and ``advance`` if it is kept."""
        return self._source.blocks(name)

    def check(self, name: str, tensor: Tensor) -> None:
        check_finite(name, tensor, self._source.where)


class DenseStorage:
    """Everything in one dtype on one device."""

    def __init__(self, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
        self._reader, self._device, self._dtype = reader, device, dtype

    def vector(self, names: Sequence[str]) -> Tensor:
        parts = [self._reader.read(name, self._device).to(self._dtype) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def linear(self, names: Sequence[str], bias: Tensor | None) -> Linear:
        return DenseLinear(self.vector(names), bias)

    def embedding(self, name: str) -> tuple[Embedding, Linear]:
        weight = self.vector([name])
        return DenseEmbedding(weight), DenseLinear(weight, None)


class Form(Protocol):
    """A form that a model's weights can be held in."""

    def held_bytes(self, source: WeightSource) -> int:
        """Bytes that all weights of a source will take; nothing is read."""

    def storage(self, reader: WeightReader, report: Reporter) -> Storage:
        """What reads them into this form."""


@dataclass(frozen=True, slots=True)
class DenseForm:
    """``DenseStorage``."""

    device: torch.device
    dtype: torch.dtype

    def held_bytes(self, source: WeightSource) -> int:
        return sum(prod(shape) for shape in expected_shapes(source.config).values()) * self.dtype.itemsize

    def storage(self, reader: WeightReader, report: Reporter) -> Storage:
        return DenseStorage(reader, self.device, self.dtype)
