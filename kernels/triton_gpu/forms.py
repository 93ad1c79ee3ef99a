"""How launches of attention are cut: columns, splits, and the forms that kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from skvq.kernels.interface import FullSlots, Step
from skvq.kernels.layout import PageLayout

WARPS_PER_SM = 12  # one warp a program at up to 168 registers
MAX_SPLITS = 512
SLOT_BLOCK = 16  # of 16-bit slots a program of one warp takes at a time
PAGE_BLOCK = 64  # of 16-bit tokens of method fp, four warps
PAGE_PROGRAMS = 3  # of those four warps, that a multiprocessor holds
FULL_SPLITS = 32
LABEL_NUMBERS = 4096  # keys at a time, 32 tokens of 128: more would spill
LABEL_WARPS = 8  # of 255 registers, that a multiprocessor holds
LABEL_STAGES = 3  # of the software pipeline of `reorder`: a share of the tokens is on its way while another is computed with
SHARED_MARGIN = 2 << 10  # bytes, for a compiler that needs more of it than those that were tried


@dataclass(frozen=True, slots=True)
class Columns:
    """How the query columns of one kv head, N * H / KH of them, are cut: ``chunks`` of ``width``."""

    heads: int  # kv heads
    queries: int
    repeat: int
    width: int
    chunks: int

    @classmethod
    def of(cls, q: Tensor, kv_heads: int, size: int, full: FullSlots, step: Step) -> Columns:
        """Four columns take half a tensor-core tile and the other half idles; more columns take whole ones.

        What attention is given is looked at here: shapes, dtypes and strides, as all its kernels rely on them.
        """
        assert q.ndim == 4 and q.is_contiguous() and q.shape[3] == size and q.shape[2] % kv_heads == 0, (q.shape, q.stride())
        assert step.positions.shape == q.shape[:2] and step.positions.dtype == torch.int32, step.positions
        assert step.packed.dtype == step.page_table.dtype == torch.int32, (step.packed.dtype, step.page_table.dtype)
        assert step.slots.dtype == torch.int64 and step.page_table.stride(1) == 1, step.page_table.stride()
        assert full.keys.stride() == full.values.stride(), (full.keys.stride(), full.values.stride())
        assert full.keys.stride(3) == 1 and full.positions.stride(1) == 1, (full.keys.stride(), full.positions.stride())
        assert full.positions.dtype == torch.int32, full.positions.dtype
        queries, repeat = q.shape[1], q.shape[2] // kv_heads
        width = 4 if queries * repeat <= 4 else 8
        return cls(kv_heads, queries, repeat, width, -(-queries * repeat // width))

    @property
    def total(self) -> int:
        """Columns of a kv head, the idle ones of the last chunk included."""
        return self.width * self.chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedForm:
    """How packed attention goes over its tiles, and how many programs of one warp a multiprocessor then holds."""

    part: int  # tokens at a time
    stages: int  # of the software pipeline; from 3 on the next tokens are on their way while these are computed with
    registers: int  # at most, 0: as many as the compiler likes
    programs: int


def packed_form(layout: PageLayout, *, has_mean: bool, shared_bytes: int) -> PackedForm:
    """The fastest of those tried on an H200, 128k and 1M tokens, K2V2 and K2V1.5 in groups of 64 and 128.

    Halves of a tile cost a sixth more instructions and half the registers and shared memory: more programs, and loads that are
    a step ahead. The key mean takes 255 registers all the same; single bits of keys of 3 bits lie apart.
    """
    if has_mean or layout.key_bits == 3 or layout.groups > 2:
        return PackedForm(part=layout.tile, stages=2, registers=0, programs=8)
    if layout.tile == 160:
        stages = 3 if shared_bytes > 200 << 10 else 2
        return PackedForm(part=160, stages=stages, registers=0, programs=8 if stages == 3 else 10)
    token = int((layout.key_bits + layout.value_bits) * layout.head_size / 8) + 4 * layout.groups
    programs = shared_bytes // (2 * 64 * token + (5 << 10))  # two parts on their way, q, room for sums to change places
    return PackedForm(part=64, stages=3, registers=168, programs=min(programs, WARPS_PER_SM))


def rows_by_column(tile: int, groups: int, *, has_mean: bool, has_span: bool) -> bool:
    """How fragments of q are stored (``packed.load_rows``): as the registers allow, counted ahead of time."""
    return tile == 128 and not has_span and not (has_mean and groups > 1)


def label_bytes(layout: PageLayout) -> int:
    """Shared memory that a program of ``attend_labels_blocks_kernel`` takes, at most: what compilers were seen to need, and
    half a kilobyte more.

    Three one-hot matrices, what a share of tokens reads, a stage ahead or more, and its weights.

    >>> label_bytes(PageLayout(head_size=128, kv_heads=8, key_bits=2.0, value_bits=2.0, group_size=64))
    22784
    """
    size, tokens, groups = layout.head_size, LABEL_NUMBERS // layout.head_size, layout.kv_heads * layout.groups
    columns = max(16, int(triton.next_power_of_2(groups)))
    codes = tokens * size * int(layout.key_bits + layout.value_bits) // 8
    read = codes + 4 * tokens * (columns + 1) + 2 * size
    return 6 * columns * size + (LABEL_STAGES - 1) * read + 16 * tokens + 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelForm:
    """How attention under labels goes over its tiles."""

    blocks: bool  # by ``attend_labels_blocks_kernel``, else by ``attend_labels_kernel``, which is slower
    crowded: bool  # not so only because of shared memory: too many groups
    warps: int
    programs: int  # that a multiprocessor holds
    places: int  # of the table of RoPE: tokens at a time, or those of a tile


def label_form(layout: PageLayout, *, shared_bytes: int, block_bytes: int) -> LabelForm:
    """In half precision where the bits allow it: keys of 8 bits want float32, trits and 3 bits are rare.

    ``shared_bytes`` is the shared memory of a multiprocessor, ``block_bytes`` the most that one program may have of it.
    """
    suited = layout.tile == 128 and layout.key_bits in (2, 4) and layout.value_bits in (2, 4, 8)
    needed = label_bytes(layout)
    if not suited or needed + SHARED_MARGIN > block_bytes:
        return LabelForm(blocks=False, crowded=suited, warps=4, programs=LABEL_WARPS // 4, places=layout.tile)
    warps = 2 if layout.kv_heads * layout.groups > 16 else 1  # two share the matrices of many labels
    programs = max(1, min(LABEL_WARPS // warps, shared_bytes // needed))
    return LabelForm(blocks=True, crowded=False, warps=warps, programs=programs, places=LABEL_NUMBERS // layout.head_size)


def splits_of(columns: Columns, step: Step, tile: int, programs: int) -> int:
    """Splits that fill the device once, of at least two tiles; known to the host, whatever the lengths turn out.

    ``programs``: those that the device holds. A few more would take as long again.
    """
    tiles = -(-step.max_packed // tile)
    wanted = max(1, programs // (columns.heads * columns.chunks * len(step.slots)))
    return min(wanted, -(-tiles // 2), MAX_SPLITS)


def full_splits(full: FullSlots) -> int:
    """Programs that share the 16-bit slots of a kv head and chunk."""
    return min(max(-(-full.positions.shape[1] // SLOT_BLOCK), 1), FULL_SPLITS)


def has_span(step: Step) -> bool:
    """Whether the span can hide a token."""
    return step.span < 2**31 - 1
