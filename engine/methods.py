"""Cache methods: what the bytes of a page mean. Each binds a layout, its layers' codecs and kernels to an arena.

``rotate`` and ``plain`` keep contiguous groups in each head, ``reorder`` groups by label over all heads: both are a
``PackedMethod`` with kernels of its own. ``fp`` keeps 16-bit tokens. What is the same for all lives in ``cache.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from skvq.engine.arena import Arena
from skvq.engine.rope import turned
from skvq.kernels.interface import Backend, FullSlots, HeadCodec, LabelCodec, PackedPages, PlainPages, Step
from skvq.kernels.layout import PAGE_TOKENS, PageLayout

Codec = TypeVar("Codec")


class CacheMethod(Protocol):
    """Packing, unpacking and attention of one layer. Shapes as in ``kernels.interface.Backend``."""

    def pack(self, layer: int, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor) -> None: ...

    def unpack(self, layer: int, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]: ...

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]: ...

    def origin(self, dropped: int) -> int:
        """RoPE position of the first token of a sequence whose ``dropped`` oldest tokens are gone."""

    def at(self, dropped: int) -> CacheMethod:
        """This method for such a sequence. Keys it is given, or turns itself, are at ``origin(dropped)`` and on."""


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


class HeadMethod(PackedMethod[HeadCodec]):
    """``rotate`` and ``plain``: packed keys carry their turn, so their positions go on counting when tokens are dropped."""

    def __init__(self, arena: Arena, layouts: Sequence[PageLayout], codecs: Sequence[HeadCodec], backend: Backend) -> None:
        super().__init__(arena, layouts, codecs, backend.pack_heads, backend.unpack_heads, backend.attend_heads)
        self._at: OrderedDict[int, HeadMethod] = OrderedDict()
        self._most = arena.shape.sequences

    def origin(self, dropped: int) -> int:
        return dropped

    @torch.inference_mode(False)  # backends keep what they derive from a codec by its version, which inference tensors lack
    def at(self, dropped: int) -> HeadMethod:
        """With means turned on: kernels then add ``RoPE_place(RoPE_dropped(mean))``. Made once for each origin in use."""
        if not dropped or not any(codec.has_key_mean for codec in self._codecs):
            return self
        if dropped not in self._at:
            moved = copy(self)
            moved._codecs = [replace(c, key_mean=turned(c.key_mean[None], dropped, c.rope)[0]) for c in self._codecs]
            self._at[dropped] = moved
        self._at.move_to_end(dropped)
        while len(self._at) > self._most:
            self._at.popitem(last=False)
        return self._at[dropped]


class LabelMethod(PackedMethod[LabelCodec]):
    """``reorder``: packed keys are turned by their place when they are read, whatever was dropped before them."""

    def __init__(self, arena: Arena, layouts: Sequence[PageLayout], codecs: Sequence[LabelCodec], backend: Backend) -> None:
        super().__init__(arena, layouts, codecs, backend.pack_labels, backend.unpack_labels, backend.attend_labels)

    def origin(self, dropped: int) -> int:
        return 0

    def at(self, dropped: int) -> LabelMethod:
        return self


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

    def origin(self, dropped: int) -> int:
        return dropped

    def at(self, dropped: int) -> PlainMethod:
        return self


def _tokens(page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Page and place in it of tokens ``first .. first+count-1``."""
    at = torch.arange(first, first + count, device=page_row.device)
    return page_row[at // PAGE_TOKENS].long(), at % PAGE_TOKENS
