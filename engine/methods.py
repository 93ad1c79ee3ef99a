"""Cache methods: what the bytes of a page mean. Each binds a layout, its layers' codecs and kernels to an arena.

``rotate`` and ``plain`` keep contiguous groups in each head, ``reorder`` groups by label over all heads: both are a
``PackedMethod`` with kernels of its own. ``fp`` keeps 16-bit tokens. What is the same for all is in ``cache.py`` and
``absorb.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from math import isfinite
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from skvq.engine.arena import Arena
from skvq.engine.arena_shape import PACKED_TENSORS, run_name
from skvq.engine.errors import broken_model
from skvq.engine.rope import shifted
from skvq.kernels.interface import Backend, FullSlots, HeadCodec, LabelCodec, PackedKernels, PackedPages, PlainPages, Step
from skvq.kernels.layout import PAGE_TOKENS, PageLayout

Codec = TypeVar("Codec")


class Attends(Protocol):
    """Attention of one layer over what sequences hold. Shapes as in ``kernels.interface.PackedKernels``."""

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]: ...


class Begins(Protocol):
    """Attention of all layers in one step."""

    def begun(self, step: Step) -> Attends:
        """What attends in the layers of that step, which differ in their spans: what they share is done."""


class CacheMethod(Attends, Begins, Protocol):
    """Packing, unpacking and attention of one layer. Shapes as in ``kernels.interface.PackedKernels``."""

    def pack(self, layer: int, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor) -> None: ...

    def unpack(self, layer: int, page_row: Tensor, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...

    def origin(self, dropped: int) -> int:
        """RoPE position of the first token of a sequence whose ``dropped`` oldest tokens are gone."""

    def at(self, dropped: int) -> CacheMethod:
        """This method for such a sequence. Keys it is given, or turns itself, are at ``origin(dropped)`` and on."""


@dataclass(frozen=True, slots=True)
class Run(Generic[Codec]):
    """Neighbouring kv heads of a layer that are stored in the same way: most layers are one run."""

    heads: slice
    pages: PackedPages
    codec: Codec
    full: FullSlots


class PackedMethod(Generic[Codec]):
    """Packed pages: a layout, a codec and launches of its own for each run of each layer's kv heads."""

    def __init__(
        self,
        arena: Arena,
        layouts: Sequence[Sequence[PageLayout]],
        codecs: Sequence[Sequence[Codec]],
        kernels: PackedKernels[Codec],
    ) -> None:
        self._runs = [_runs(arena, layer, *of) for layer, of in enumerate(zip(layouts, codecs, strict=True))]
        self._kv_heads = arena.shape.kv_heads
        self._kernels = kernels

    def pack(self, layer: int, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor) -> None:
        """See ``CacheMethod``. What is no number, which codes would hide, raises ModelError on a CPU; a GPU packs it as NaN,
        and the logits that follow tell."""
        if keys.device.type == "cpu" and not all(isfinite(float(x.sum(dtype=torch.float32))) for x in (keys, values)):
            raise broken_model(f"keys or values of layer {layer} are not all finite numbers")
        for run in self._runs[layer]:
            self._kernels.pack(run.pages, run.codec, page_row, first, keys[:, run.heads], values[:, run.heads], retained)

    def unpack(self, layer: int, page_row: Tensor, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        found = [self._kernels.unpack(run.pages, run.codec, page_row, first, count, dtype) for run in self._runs[layer]]
        return joined(found, 1)

    def begun(self, step: Step) -> Attends:
        return self

    def over(self, positions: Tensor) -> Self:
        """This method with other marks of what slots hold, [L, S, F]."""
        other = copy(self)
        other._runs = [
            [replace(run, full=replace(run.full, positions=marks)) for run in runs]
            for runs, marks in zip(self._runs, positions, strict=True)
        ]
        return other

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        share = q.shape[2] // self._kv_heads
        found = []
        for run in self._runs[layer]:
            heads = slice(share * run.heads.start, share * run.heads.stop)
            found.append(self._kernels.attend(q[:, :, heads].contiguous(), run.pages, run.codec, run.full, step))
        return joined(found, 2)


def _runs(arena: Arena, layer: int, layouts: Sequence[PageLayout], codecs: Sequence[Codec]) -> list[Run[Codec]]:
    tensors, full, runs, start = arena.layer(layer), arena.full(layer), [], 0
    for number, (layout, codec) in enumerate(zip(layouts, codecs, strict=True)):
        heads = slice(start, start + layout.kv_heads)
        pages = {name: tensors[run_name(name, number)] for name in PACKED_TENSORS}
        slots = FullSlots(keys=full.keys[:, heads], values=full.values[:, heads], positions=full.positions)
        runs.append(Run(heads, PackedPages(layout=layout, **pages), codec, slots))
        start = heads.stop
    return runs


def joined(found: Sequence[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    """What several calls gave, side by side along ``dim``."""
    if len(found) == 1:
        return found[0]
    first, second = zip(*found, strict=True)
    return torch.cat(first, dim), torch.cat(second, dim)


class HeadMethod(PackedMethod[HeadCodec]):
    """``rotate`` and ``plain``: packed keys carry their RoPE, so their positions keep counting when tokens are dropped."""

    def __init__(
        self, arena: Arena, layouts: Sequence[Sequence[PageLayout]], codecs: Sequence[Sequence[HeadCodec]], backend: Backend
    ) -> None:
        super().__init__(arena, layouts, codecs, backend.heads)
        self._at: OrderedDict[int, HeadMethod] = OrderedDict()
        self._most = arena.shape.sequences

    def origin(self, dropped: int) -> int:
        return dropped

    def at(self, dropped: int) -> HeadMethod:
        """With means moved on: kernels then add ``RoPE_place(RoPE_dropped(mean))``. Made once for each origin in use."""
        if not dropped or not any(run.codec.has_key_mean for runs in self._runs for run in runs):
            return self
        if dropped not in self._at:
            moved = copy(self)
            moved._at = OrderedDict()  # nothing of a cycle, which would keep the arena until garbage is collected
            moved._runs = [[replace(run, codec=_shifted(run.codec, dropped)) for run in runs] for runs in self._runs]
            self._at[dropped] = moved
        self._at.move_to_end(dropped)
        while len(self._at) > self._most:
            self._at.popitem(last=False)
        return self._at[dropped]


def _shifted(codec: HeadCodec, dropped: int) -> HeadCodec:
    return replace(codec, key_mean=shifted(codec.key_mean[None], dropped, codec.rope)[0])


class LabelMethod(PackedMethod[LabelCodec]):
    """``reorder``: packed keys get their RoPE, by their place, when they are read, whatever was dropped before them."""

    def __init__(
        self, arena: Arena, layouts: Sequence[Sequence[PageLayout]], codecs: Sequence[Sequence[LabelCodec]], backend: Backend
    ) -> None:
        super().__init__(arena, layouts, codecs, backend.labels)

    def origin(self, dropped: int) -> int:
        return 0

    def at(self, dropped: int) -> LabelMethod:
        return self


class PlainMethod:
    """16-bit keys and values: the baseline, same arena, same path."""

    def __init__(self, arena: Arena, backend: Backend) -> None:
        layers = range(arena.shape.layers)
        self._pages = [PlainPages(**arena.layer(i)) for i in layers]
        self._full = [arena.full(i) for i in layers]
        self._backend = backend

    def pack(self, layer: int, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor) -> None:
        page, within = _tokens(page_row, first, len(keys))
        self._pages[layer].keys[page, :, within] = keys
        self._pages[layer].values[page, :, within] = values

    def unpack(self, layer: int, page_row: Tensor, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        page, within = _tokens(page_row, first, count)
        pages = self._pages[layer]
        return pages.keys[page, :, within].to(dtype), pages.values[page, :, within].to(dtype)

    def begun(self, step: Step) -> Attends:
        return self

    def over(self, positions: Tensor) -> PlainMethod:
        """This method with other marks of what slots hold, [L, S, F]."""
        other = copy(self)
        other._full = [replace(full, positions=marks) for full, marks in zip(self._full, positions, strict=True)]
        return other

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return self._backend.attend_plain(q, self._pages[layer], self._full[layer], step)

    def origin(self, dropped: int) -> int:
        return dropped

    def at(self, dropped: int) -> PlainMethod:
        return self


class RowByRow:
    """One call for each sequence, with its own method: they have dropped different numbers of tokens."""

    def __init__(self, methods: Sequence[CacheMethod]) -> None:
        self._methods = methods

    def begun(self, step: Step) -> Attends:
        return self

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        found = []
        for i, method in enumerate(self._methods):
            row = slice(i, i + 1)
            one = replace(step, slots=step.slots[row], positions=step.positions[row], packed=step.packed[row])
            found.append(method.attend(layer, q[row], one))
        return joined(found, 0)


def _tokens(page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Page and place in it of tokens ``first .. first+count-1``."""
    at = torch.arange(first, first + count, device=page_row.device)
    return page_row[at // PAGE_TOKENS].long(), at % PAGE_TOKENS
