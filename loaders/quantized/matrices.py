"""The matrices of a checkpoint that are stored by a scheme: where their parts are, and that all of them fit the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from skvq.engine.errors import ModelError
from skvq.kernels.ggml.formats import BLOCK, FORMATS
from skvq.loaders.quantized.integers import ORDERS
from skvq.loaders.quantized.scheme import Part, Scheme
from skvq.loaders.source import QuantizedBlocks

Read = Callable[[str], Tensor]
"""Gives a tensor of a checkpoint by its name."""
LEFT = ("weight_shape", "weight_format", "input_scale", "output_scale", "activation_scale", "input_scale_ub")
"""Scales of 8-bit activations, and what the tensors' own shapes say."""
KV_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")
"""Of another engine's cache."""


class Stored(Protocol):
    """What the header of a file says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str: ...


class QuantizedMatrices:
    """By canonical name."""

    def __init__(
        self, scheme: Scheme, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored], read: Read, where: str
    ) -> None:
        """shapes: of the model's weights; found: the checkpoint's tensors. ModelError for parts that are missing or wrong."""
        self.scheme, self._found, self._read, self._where = scheme, found, read, where
        self._biases = {name for name in shapes if name.endswith("bias")}
        matrices = {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}
        self.shapes = {name: shape for name, shape in matrices.items() if self._is_stored(name, scheme.parts(*shape)[0])}
        try:
            self.scheme = scheme.ordered_by([self._read(name) for name in self._orders()])
        except ModelError as error:
            raise self._wrong(str(error)) from None
        self._parts = {name: tuple(self._part(name, part) for part in self._wanted(name)) for name in self.shapes}

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensors that a matrix is read from."""
        return self._parts[name]

    def whole(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the checkpoint's tensors as if every matrix were one."""
        whole = {name: tuple(entry.shape) for name, entry in self._found.items() if not name.endswith(KV_SCALES)}
        for name, shape in self.shapes.items():
            prefix = _prefix(name)
            for part in (*self._parts[name], *(prefix + other for other in (*ORDERS, *LEFT))):
                whole.pop(part, None)
            if (bias := f"{prefix}bias") in whole and bias not in self._biases:
                if bool(self._read(bias).any()):
                    raise self._wrong(f"{bias} is not zero, and the config says that there is none")
                del whole[bias]
            whole[name] = shape
        return whole

    def read(self, name: str) -> Tensor:
        """Weights [out, in]: float32 where there are blocks that hold the same, else float16."""
        weights = self._asked(name, lambda tensors: self.scheme.expand(tensors, self.shapes[name]))
        return weights if self.scheme.kind else weights.half()

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """The same in blocks, if there are such."""
        kind = self.scheme.kind
        return QuantizedBlocks(data=self._asked(name, self.scheme.blocks), kind=kind, shape=self.shapes[name]) if kind else None

    def stored(self, name: str) -> tuple[str, int]:
        """Type and bytes of its blocks, or of what is read."""
        (outs, ins), kind = self.shapes[name], self.scheme.kind
        return (kind, outs * (ins // BLOCK) * FORMATS[kind].file_bytes) if kind else (str(torch.float16), 2 * outs * ins)

    def _asked(self, name: str, ask: Callable[[list[Tensor]], Tensor]) -> Tensor:
        try:
            return ask([self._read(part) for part in self._parts[name]])
        except ModelError as error:
            raise self._wrong(f"{name}: {error}") from None

    def _is_stored(self, name: str, codes: Part) -> bool:
        entry = self._found.get(_prefix(name) + codes.names[0])
        return entry is not None and entry.kind in codes.types

    def _wanted(self, name: str) -> tuple[Part, ...]:
        outs, ins = self.shapes[name]
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
        for name in self.shapes:
            yield from (_prefix(name) + one for one in ORDERS if _prefix(name) + one in self._found)

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"{self._where} ({self.scheme.label}): {what}")


def _prefix(name: str) -> str:
    return name.removesuffix("weight")
