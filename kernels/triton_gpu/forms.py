"""How launches of attention are cut: columns, splits, and which form of a kernel a layout takes. Integers only; no launches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from skvq.kernels.interface import FullSlots, Step
from skvq.kernels.layout import FULL_SPAN, GPU_HEAD_SIZES, PageLayout

VARYING = {
    "do_not_specialize": ["splits", "full_splits", "first_tile", "first", "tokens", "queries", "chunks", "columns"],
    "do_not_specialize_on_alignment": ["held_ptr", "page_ptr", "pages_ptr", "slots_ptr", "packed_ptr", "positions_ptr"],
}
"""Options of kernels: arguments that vary between calls, layers or sequences and are used outside of inner loops. One
compilation serves all their values, where each that is 1 or a multiple of 16 would stop a conversation for seconds."""
HEAD_SIZES, GROUP_SIZES = GPU_HEAD_SIZES, (32, 64, 128)  # for others the specification computes, which waits for the device
WARPS_PER_SM = 12  # one warp a program at up to 168 registers
MAX_SPLITS = 512
SLOT_BLOCK = 16  # of 16-bit slots a program of one warp takes at a time
PAGE_BLOCK = 64  # of 16-bit tokens of method fp, four warps
PAGE_PROGRAMS = 3  # of those four warps, that a multiprocessor holds
FULL_SPLITS = 32
LABEL_NUMBERS = 4096  # keys at a time, 32 tokens of 128: more would spill
LABEL_WARPS = 8  # of 255 registers, that a multiprocessor holds
LABEL_STAGES = 3  # of the software pipeline of `reorder`: a share of the tokens is on its way while another is computed with
BLOCK_BYTES = 1 << 10  # of shared memory that every program takes besides its own
SHARED_MARGIN = 2 << 10  # bytes, for a compiler that needs more of it than those that were tried


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of one kv head, N * H / KH of them, cut into ``chunks`` of ``width``; the last chunk may have idle ones."""

    heads: int  # kv heads
    queries: int
    repeat: int
    width: int
    chunks: int

    @classmethod
    def of(cls, q: Tensor, kv_heads: int, size: int, full: FullSlots, step: Step) -> Columns:
        """The columns of q [B, N, H, D]. All that attention kernels rely on is checked here: shapes, dtypes and strides.

        Up to four columns make chunks of four, which use half a tensor-core tile; more make chunks of eight, which use all of
        it.
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
    """How packed attention goes over its tiles, and how many of its programs, one warp each, a multiprocessor then holds."""

    part: int  # tokens at a time
    stages: int  # of the software pipeline; from 3 on the next tokens are on their way while these are computed with
    registers: int  # at most, 0: as many as the compiler likes
    programs: int


def packed_form(layout: PageLayout, *, has_mean: bool, shared_bytes: int) -> PackedForm:
    """The fastest of the forms that were tried on an H200, at 128k and 1M tokens, K2V2 and K2V1.5 in groups of 64 and 128.

    Half a tile at a time takes a sixth more instructions, but half the registers and shared memory: more programs fit, and
    loads can run a step ahead. Not with a key mean, which takes 255 registers either way; nor for keys of 3 bits, whose single
    bits lie in planes of their own.
    """
    if has_mean or layout.key_bits == 3 or layout.groups > 2:
        stages, registers, part, most = 2, 0, layout.tile, 8
    elif layout.tile == 160:
        stages, registers, part, most = (3, 0, 160, 8) if shared_bytes > 200 << 10 else (2, 0, 160, 10)
    else:
        stages, registers, part, most = 3, 168, 64, WARPS_PER_SM
    programs = shared_bytes // (packed_bytes(layout, part, stages, has_mean=has_mean) + BLOCK_BYTES)
    return PackedForm(part=part, stages=stages, registers=registers, programs=min(programs, most))


def packed_bytes(layout: PageLayout, part: int, stages: int, *, has_mean: bool) -> int:
    """Shared memory in bytes of one program of ``attend_packed_kernel``: what compilers were seen to take, or a little more.

    It holds the tokens that are on their way and what changes places between lanes: codes, sums and, for a mean, its turns.

    >>> packed_bytes(PageLayout(head_size=128, kv_heads=8, key_bits=2.0, value_bits=2.0, group_size=64), 128, 2, has_mean=True)
    24064
    """
    read = int((stages - 1) * part * layout.bytes_per_token / layout.kv_heads)
    if part == 64:
        return read + (4 << 10)
    groups = 0 if has_mean and layout.groups == 1 and layout.key_bits == layout.value_bits == 2 else layout.groups
    return read + 16 * part * groups + (10752 if has_mean else 2048 if part == 160 else 0)


def rows_by_column(tile: int, groups: int, *, has_mean: bool, has_span: bool) -> bool:
    """Whether fragments of q are stored by column (``fragments.load_rows``): where the compiler was seen to do better
    with it.
    """
    return tile == 128 and not has_span and not (has_mean and groups > 1)


def label_bytes(layout: PageLayout) -> int:
    """Shared memory in bytes of one program of ``attend_labels_blocks_kernel``: what compilers were seen to take and 512 more.

    It holds three one-hot matrices, the data of the shares of tokens that are on their way, and the weights of one share.

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
    """How attention under labels goes over its tiles, and by which of its two kernels."""

    blocks: bool  # by ``attend_labels_blocks_kernel``, else by ``attend_labels_kernel``, which is slower
    crowded: bool  # not so only because of shared memory: too many groups
    warps: int
    programs: int  # that a multiprocessor holds
    places: int  # of the table of RoPE: tokens at a time, or those of a tile


def label_form(layout: PageLayout, *, shared_bytes: int, block_bytes: int) -> LabelForm:
    """The fast kernel (``blocks``) where it computes these bits and its groups fit into shared memory, else the general one.

    Keys of 8 bits would lose their last bits in its half precision; of trits and 3 bits it knows nothing. ``shared_bytes`` is
    the shared memory of a multiprocessor, ``block_bytes`` the most of it that one program may have.
    """
    suited = layout.tile == 128 and layout.key_bits in (2, 4) and layout.value_bits in (2, 4, 8)
    needed = label_bytes(layout)
    if not suited or needed + SHARED_MARGIN > block_bytes:
        return LabelForm(blocks=False, crowded=suited, warps=4, programs=LABEL_WARPS // 4, places=layout.tile)
    warps = 2 if layout.kv_heads * layout.groups > 16 else 1  # two share the matrices of many labels
    programs = max(1, min(LABEL_WARPS // warps, shared_bytes // needed))
    return LabelForm(blocks=True, crowded=False, warps=warps, programs=programs, places=LABEL_NUMBERS // layout.head_size)


def splits_of(columns: Columns, step: Step, tile: int, programs: int) -> int:
    """Splits that fill the device once, each of two tiles or more; at most MAX_SPLITS. 0: nothing can be packed yet.

    ``programs`` is how many the device holds at a time: with more, a second round would take as long as the first. Follows
    from ``step.max_packed``, a bound that the host knows, and not from lengths that lie on the device.
    """
    tiles = -(-step.max_packed // tile)
    wanted = max(1, programs // (columns.heads * columns.chunks * len(step.slots)))
    return min(wanted, -(-tiles // 2), MAX_SPLITS)


def full_splits(full: FullSlots) -> int:
    """Programs among which the full-precision slots of one kv head and chunk are divided."""
    return min(max(-(-full.positions.shape[1] // SLOT_BLOCK), 1), FULL_SPLITS)


def has_span(step: Step) -> bool:
    """Whether the layer's attention span can hide a token at all."""
    return step.span < FULL_SPAN
