"""What an arena is made of: tensors of a page and of a sequence's slots, and their bytes, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skvq.kernels.layout import PAGE_TOKENS, PageLayout, PlainLayout

TensorSpec = tuple[tuple[int, ...], torch.dtype]
Page = tuple[tuple[str, TensorSpec], ...]

PACKED_TENSORS = ("key_codes", "value_codes", "meta")
SLOT_TENSORS = ("full_keys", "full_values", "full_positions", "full_mass")
"""Tensors of full-precision tokens: the first two are [L, S, KH, F, D], the others [L, S, F]."""


def run_name(name: str, run: int) -> str:
    """Name of a page tensor for one run of a layer's kv heads.

    >>> run_name("meta", 0), run_name("meta", 1)
    ('meta', 'meta_1')
    """
    return f"{name}_{run}" if run else name


def packed_page(layouts: Sequence[PageLayout]) -> Page:
    """Tensors of a packed page of one layer, from the layout of each run of its kv heads."""
    page: list[tuple[str, TensorSpec]] = []
    for run, layout in enumerate(layouts):
        widths = (layout.key_bytes, torch.uint8), (layout.value_bytes, torch.uint8), (layout.meta_words, torch.int32)
        for name, (width, dtype) in zip(PACKED_TENSORS, widths, strict=True):
            page.append((run_name(name, run), ((layout.kv_heads, width), dtype)))
    return tuple(page)


def plain_page(layout: PlainLayout, dtype: torch.dtype) -> Page:
    """Tensors of a 16-bit page of one layer."""
    shape = (layout.kv_heads, PAGE_TOKENS, layout.head_size)
    return (("keys", (shape, dtype)), ("values", (shape, dtype)))


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor.

    >>> spec_bytes(((2, 3), torch.int32))
    24
    """
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaShape:
    """How large an arena is; ``nbytes`` is known before anything is allocated and equals what is allocated."""

    layers: int
    kv_heads: int
    head_size: int
    pages: int
    sequences: int
    pages_per_sequence: int
    full_slots: int
    dtype: torch.dtype  # of full-precision slots, 16 bits
    layer_pages: tuple[Page, ...]  # tensors of one page, for each layer
    chunks: int = 1  # that a sequence may lie in (``engine.dual_chunks``)

    def __post_init__(self) -> None:
        assert len(self.layer_pages) == self.layers, (len(self.layer_pages), self.layers)

    def page_tensors(self, layer: int) -> dict[str, TensorSpec]:
        """All pages of a layer, by name."""
        return {name: ((self.pages, *shape), dtype) for name, (shape, dtype) in self.layer_pages[layer]}

    def tensors(self) -> dict[str, TensorSpec]:
        """What the arena holds besides pages, by name."""
        slots = (self.layers, self.sequences, self.kv_heads, self.full_slots, self.head_size)
        marks = (self.layers, self.sequences, self.full_slots)
        return {
            "full_keys": (slots, self.dtype),
            "full_values": (slots, self.dtype),
            "full_positions": (marks, torch.int32),
            "full_mass": (marks, torch.float32),
            "chunk_positions": ((self.chunks - 1, *marks), torch.int32),
            "page_table": ((self.sequences, max(1, self.pages_per_sequence)), torch.int32),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arena."""
        return self.pages * self.page_bytes + sum(map(spec_bytes, self.tensors().values()))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return sum(spec_bytes(spec) for page in self.layer_pages for _, spec in page)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one full-precision token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_size * self.dtype.itemsize
