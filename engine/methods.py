"""Cache methods: what the bytes of a page mean. Each binds a layout, its layers' codecs and kernels to an arena.

``rotate`` and ``plain`` keep contiguous groups in each head, ``reorder`` groups by label over all heads: both are
``PackedMethod`` with other kernels. ``fp`` keeps 16-bit tokens. What is the same for all lives in ``cache.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from skvq.engine.arena import Arena
from skvq.kernels.interface import Backend, FullSlots, PackedPages, PlainPages, Step
from skvq.kernels.layout import PAGE_TOKENS, PageLayout

Codec = TypeVar("Codec")


class CacheMethod(Protocol):
    """Packing, unpacking and attention of one layer. Shapes as in ``kernels.interface.Backend``."""

    def pack(self, layer: int, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor) -> None: ...

    def unpack(self, layer: int, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]: ...

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]: ...


class PackedMethod(Generic[Codec]):
    """Packed pages, one layout and one codec per layer."""

    def __init__(
        self,
        arena: Arena,
        layouts: Sequence[PageLayout],
        codecs: Sequence[Codec],
        pack: Callable[[PackedPages, Codec, Tensor, int, Tensor, Tensor, Tensor], None],
        unpack: Callable[[PackedPages, Codec, Tensor, int, int], tuple[Tensor, Tensor]],
        attend: Callable[[Tensor, PackedPages, Codec, FullSlots, Step], tuple[Tensor, Tensor]],
    ) -> None:
        self._pages = [PackedPages(layout=layout, **arena.layer(i)) for i, layout in enumerate(layouts)]
        self._full = [arena.full(i) for i in range(len(codecs))]
        self._codecs = codecs
        self._pack = pack
        self._unpack = unpack
        self._attend = attend

    def pack(self, layer: int, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor) -> None:
        self._pack(self._pages[layer], self._codecs[layer], page_row, first, keys, values, retained)

    def unpack(self, layer: int, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        return self._unpack(self._pages[layer], self._codecs[layer], page_row, first, count)

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return self._attend(q, self._pages[layer], self._codecs[layer], self._full[layer], step)


class PlainMethod:
    """16-bit keys and values: the control group, same arena, same path."""

    def __init__(self, arena: Arena, backend: Backend) -> None:
        layers = range(arena.shape.layers)
        self._pages = [PlainPages(**arena.layer(i)) for i in layers]
        self._full = [arena.full(i) for i in layers]
        self._backend = backend

    def pack(self, layer: int, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor) -> None:
        page, within = _tokens(page_row, first, len(keys))
        self._pages[layer].keys[page, :, within] = keys
        self._pages[layer].values[page, :, within] = values

    def unpack(self, layer: int, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        page, within = _tokens(page_row, first, count)
        pages = self._pages[layer]
        return pages.keys[page, :, within].float(), pages.values[page, :, within].float()

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return self._backend.attend_plain(q, self._pages[layer], self._full[layer], step)


def _tokens(page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Page and place in it of tokens ``first .. first+count-1``."""
    at = torch.arange(first, first + count, device=page_row.device)
    return page_row[at // PAGE_TOKENS].long(), at % PAGE_TOKENS
