"""The matrices of a checkpoint that are stored by a scheme: where their parts are, and that all of them fit the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from skvq.engine.errors import ModelError
from skvq.kernels.ggml.formats import BLOCK, FORMATS
from skvq.loaders.names import KV_SCALES, stacks
from skvq.loaders.quantized.integers import ORDERS
from skvq.loaders.quantized.scheme import Part, Scheme
from skvq.loaders.source import QuantizedBlocks

Read = Callable[[str], Tensor]
"""Gives a tensor of a checkpoint by its name."""
GPU_ORDER = "weight_format"
"""Of bitsandbytes: 0, or the order in which some GPU wanted int8 weights."""
LEFT = (GPU_ORDER, "weight_shape", "input_scale", "output_scale", "activation_scale", "input_scale_ub", "input_zero_point")
"""Scales of 8-bit activations, and what the tensors' own shapes say."""
NO_BIAS = "bias"
"""Some libraries write one, of zeros, that the model does not have."""


class Stored(Protocol):
    """What the header of a file says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str: ...


class QuantizedMatrices:
    """By canonical name. A matrix may be stored with others, one above the other."""

    def __init__(
        self, scheme: Scheme, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored], read: Read, where: str
    ) -> None:
        """shapes: of the model's weights; found: the checkpoint's tensors. ModelError for parts that are missing or wrong."""
        self.scheme, self._found, self._read, self._where = scheme, found, read, where
        self._biases = {name for name in shapes if name.endswith("bias")}
        matrices = {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}
        self._places = {name: (name, 0) for name in matrices}  # of a matrix: what it is stored with, and its first row there
        stored = dict(matrices)
        for whole, ((rows, columns), firsts) in stacks(matrices).items():
            stored[whole] = rows, columns
            if self._is_stored(whole, scheme.parts(rows, columns)[0]):
                self._places |= {part: (whole, first) for part, first in firsts.items()}
        self._shapes = {name: shape for name, shape in stored.items() if self._is_stored(name, scheme.parts(*shape)[0])}
        self.shapes = {name: matrices[name] for name, (whole, _) in self._places.items() if whole in self._shapes}
        self._last = "", torch.empty(0)
        try:
            self.scheme = scheme.ordered_by([self._read(name) for name in self._orders()])
        except ModelError as error:
            raise self._wrong(str(error)) from None
        self._parts = {name: tuple(self._part(name, part) for part in self._wanted(name)) for name in self._shapes}
        for name in self._shapes:
            self._check(name)

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensors that a matrix is read from."""
        return self._parts[self._places[name][0]]

    def whole(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the checkpoint's tensors as if every matrix were one."""
        whole = {name: tuple(entry.shape) for name, entry in self._found.items() if not name.endswith(KV_SCALES)}
        for name in self._shapes:
            for part in (*self._parts[name], *(_prefix(name) + other for other in (*ORDERS, *LEFT, NO_BIAS))):
                if not part.endswith(NO_BIAS) or part not in self._biases:
                    whole.pop(part, None)
        return whole | self.shapes

    def read(self, name: str) -> Tensor:
        """Weights [out, in]: float32 where there are blocks that hold the same, else float16."""

        def expanded(tensors: list[Tensor], shape: tuple[int, int]) -> Tensor:
            weights = self.scheme.expand(tensors, shape)
            return weights if self.scheme.kind else weights.half()

        return self._rows(name, "numbers", expanded)

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """The same in blocks, if there are such."""
        kind = self.scheme.kind
        if not kind:
            return None
        data = self._rows(name, "blocks", lambda tensors, _: self.scheme.blocks(tensors))
        return QuantizedBlocks(data=data, kind=kind, shape=self.shapes[name])

    def stored(self, name: str) -> tuple[str, int]:
        """Type and bytes of its blocks, or of what is read."""
        (outs, ins), kind = self.shapes[name], self.scheme.kind
        return (kind, outs * (ins // BLOCK) * FORMATS[kind].file_bytes) if kind else (str(torch.float16), 2 * outs * ins)

    def _rows(self, name: str, what: str, make: Callable[[list[Tensor], tuple[int, int]], Tensor]) -> Tensor:
        """Rows of a matrix of what is made of all that it is stored with; that is kept for the next of them."""
        whole, first = self._places[name]
        if whole == name:
            return make(self._tensors(name), self._shapes[name])
        if self._last[0] != f"{whole} {what}":
            self._last = f"{whole} {what}", make(self._tensors(whole), self._shapes[whole])
        return self._last[1][first : first + self.shapes[name][0]].clone()

    def _tensors(self, name: str) -> list[Tensor]:
        return [self._read(part) for part in self._parts[name]]

    def _check(self, name: str) -> None:
        """Raise ModelError for what would change the model."""
        try:
            self.scheme.check(self._tensors(name))
        except ModelError as error:
            raise self._wrong(f"{name}: {error}") from None
        bias, order = _prefix(name) + NO_BIAS, _prefix(name) + GPU_ORDER
        if bias in self._found and bias not in self._biases and bool(self._read(bias).any()):
            raise self._wrong(f"{bias} is not zero, and the config says that there is none")
        if order in self._found and bool(self._read(order).any()):
            raise self._wrong(f"{order} says that weights lie in a GPU's order: save the model again with a newer bitsandbytes")

    def _is_stored(self, name: str, codes: Part) -> bool:
        entry = self._found.get(_prefix(name) + codes.names[0])
        return entry is not None and entry.kind in codes.types

    def _wanted(self, name: str) -> tuple[Part, ...]:
        outs, ins = self._shapes[name]
        if ins % self.scheme.unit:
            raise self._wrong(f"{name} of [{outs}, {ins}] has no whole groups of {self.scheme.unit} channels")
        return self.scheme.parts(outs, ins)

    def _part(self, name: str, part: Part) -> str:
        """The tensor that is a part of a matrix."""
        names = [_prefix(name) + one for one in part.names]
        found = next((one for one in names if one in self._found), None)
        if found is None:
            raise self._wrong(f"{names[0]} is missing")
        entry = self._found[found]
        if part.shapes and tuple(entry.shape) not in part.shapes:
            raise self._wrong(
                f"{found} is {list(entry.shape)}, not {' or '.join(str(list(shape)) for shape in part.shapes[:2])}"
            )
        if entry.kind not in part.types:
            raise self._wrong(f"{found} is stored as {entry.kind}, not {' or '.join(part.types)}")
        return found

    def _orders(self) -> Iterator[str]:
        """The tensors that say which group each channel of a matrix is of."""
        for name in self._shapes:
            yield from (_prefix(name) + one for one in ORDERS if _prefix(name) + one in self._found)

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"{self._where} ({self.scheme.label}): {what}")


def _prefix(name: str) -> str:
    return name.removesuffix("weight")
