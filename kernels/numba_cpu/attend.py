"""Host side of attention: checks tensors, fills the job, divides the work among threads."""

from __future__ import annotations

import functools
from array import array

import torch
from torch import Tensor

from skvq.kernels.interface import FullSlots, HeadCodec, LabelCodec, PackedPages, PlainPages, Step
from skvq.kernels.layout import LEVELS, PAGE_TOKENS, PageLayout, code_bytes
from skvq.kernels.numba_cpu.job import ATTEND, CALL_FIELDS, CODEC_FIELDS, LAYOUT_FIELDS, TABLE_FIELDS, WORK_FIELDS, Job, offsets
from skvq.kernels.numba_cpu.launch import workspace
from skvq.kernels.numba_cpu.numeric import BFLOAT16, FLOAT16
from skvq.kernels.numba_cpu.tiles import LANE_BLOCK

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
MAX_VECTORS = 32
"""Query vectors of a kv head that are handled together, so that each tile is unpacked once; more would not fit the cache."""
TASKS_PER_THREAD = 4
NUMBERS_PER_THREAD = 50_000
"""Cached numbers a thread must have to itself to be worth waking: about 3 microseconds of work."""
MIN_TILES = 8
"""Fewest tiles in a split: each split prepares the queries anew, which costs about as much as one tile."""
PLAIN_TILE = 128
COUNTERS = CALL_FIELDS.index("counters")
LINE = 8  # words between what threads read and what they count in
COUNTERS_AT = len(ATTEND.names or ()) + LINE
NO_CODEC, NO_TABLES = (0,) * len(CODEC_FIELDS), (0,) * len(TABLE_FIELDS)

Fields = tuple[int, ...]
CallFields = tuple[Fields, Fields, Fields, Fields]
"""PAGE_FIELDS, CODEC_FIELDS, TABLE_FIELDS and LAYOUT_FIELDS of ``job.py``."""


def attend_job(q: Tensor, full: FullSlots, step: Step, fields: CallFields, threads: int) -> tuple[Job, tuple[Tensor, ...], int]:
    """The job; the tensors it points to, output and log-sum-exp first, which must outlive it; and how many threads to use."""
    pages, codec, tables, layout = fields
    rows, queries, heads, size = q.shape
    keys, positions, table = full.keys, full.positions, step.page_table
    at, item = keys.stride(), keys.element_size()
    assert q.dtype == torch.float32 and q.is_contiguous() and not q.is_cuda, (q.dtype, q.device)
    assert keys.dtype in KINDS and keys.dtype == full.values.dtype, (keys.dtype, full.values.dtype)
    assert at == full.values.stride() and at[3] == 1 and keys.shape == full.values.shape, (at, full.values.stride())
    assert positions.dtype == torch.int32 and positions.stride(1) == 1 and keys.shape[3] == size, (positions.dtype, keys.shape)
    assert step.slots.dtype == torch.int64 and step.slots.shape == (rows,) and step.slots.is_contiguous(), step.slots.shape
    assert step.positions.dtype == torch.int32 and step.positions.is_contiguous(), step.positions.dtype
    assert step.positions.shape == (rows, queries), (step.positions.shape, rows, queries)
    assert step.packed.dtype == table.dtype == torch.int32 and step.packed.is_contiguous(), (step.packed.dtype, table.dtype)
    assert table.shape[1] < 2 or table.stride(1) == 1, table.stride()
    shape = (rows, queries, heads, keys.shape[1], size, keys.shape[2], KINDS[keys.dtype])
    division = divide(shape, layout, -(-step.max_packed // layout[LAYOUT_FIELDS.index("tile")]), step.span, threads)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3])
    work = workspace(division.nbytes)
    job = array("q", (
        q.data_ptr(), out.data_ptr(), lse.data_ptr(), step.slots.data_ptr(), step.positions.data_ptr(), step.packed.data_ptr(),
        table.data_ptr(), 4 * table.stride(0), step.span, keys.data_ptr(), full.values.data_ptr(), item * at[0], item * at[1],
        item * at[2], positions.data_ptr(), 4 * positions.stride(0), 0, work.data_ptr(),
        *pages, *codec, *tables,
    ))  # fmt: skip
    job.frombytes(division.fields)
    job[COUNTERS] = job.buffer_info()[0] + 8 * COUNTERS_AT
    return job, (out, lse, q, work), division.threads


# --- fields of a call, in the order of job.py -------------------------------------------------------------------------


def page_fields(pages: PackedPages) -> Fields:
    layout = pages.layout
    codes, values, meta = pages.key_codes, pages.value_codes, pages.meta
    a, b, c = codes.stride(), values.stride(), meta.stride()
    assert codes.dtype == values.dtype == torch.uint8 and meta.dtype == torch.int32, (codes.dtype, values.dtype, meta.dtype)
    assert a[2] == b[2] == c[2] == 1 and codes.shape[1] == layout.kv_heads, (a, b, c, codes.shape)
    assert (codes.shape[2], values.shape[2], meta.shape[2]) == _page_sizes(layout), (codes.shape, values.shape, meta.shape)
    return codes.data_ptr(), a[0], a[1], values.data_ptr(), b[0], b[1], meta.data_ptr(), 4 * c[0], 4 * c[1]


def plain_fields(pages: PlainPages) -> Fields:
    keys, values, item = pages.keys, pages.values, pages.keys.element_size()
    a, b = keys.stride(), values.stride()
    assert keys.dtype in KINDS and values.dtype == keys.dtype and keys.shape == values.shape, (keys.shape, values.shape)
    assert a[2:] == b[2:] == (keys.shape[3], 1) and keys.shape[2] == PAGE_TOKENS, (a, b, keys.shape)
    return keys.data_ptr(), item * a[0], item * a[1], values.data_ptr(), item * b[0], item * b[1], 0, 0, 0


def head_fields(codec: HeadCodec) -> Fields:
    units = _addresses(codec.keys.unit, codec.values.unit)
    if not codec.has_basis:
        return (*units, 0, 0, 0, 0, 0, 0, 0)
    *basis, key_mean = _addresses(codec.query_basis, codec.output_basis, codec.value_mean, codec.key_mean)
    return (*units, 1, *basis, key_mean if codec.has_key_mean else 0, 0, 0)


def _addresses(*tensors: Tensor) -> list[int]:
    for t in tensors:
        assert t.dtype == torch.float32 and t.is_contiguous(), (t.dtype, t.stride())
    return [t.data_ptr() for t in tensors]


def label_fields(codec: LabelCodec) -> Fields:
    labels = codec.key_labels, codec.value_labels
    for t in labels:
        assert t.dtype == torch.int64 and t.is_contiguous(), (t.dtype, t.stride())
    return (*_addresses(codec.keys.unit, codec.values.unit), 0, 0, 0, 0, 0, *(t.data_ptr() for t in labels))


@functools.cache
def _page_sizes(layout: PageLayout) -> tuple[int, int, int]:
    return layout.key_bytes, layout.value_bytes, layout.meta_words


@functools.cache
def layout_fields(layout: PageLayout) -> Fields:
    return (
        code_bytes(layout.key_bits, layout.head_size, layout.tile),
        code_bytes(layout.value_bits, layout.head_size, layout.tile),
        LEVELS[layout.key_bits], LEVELS[layout.value_bits], layout.groups, layout.group_size, layout.tile, layout.tiles, 0,
    )  # fmt: skip


def plain_layout_fields(pages: PlainPages) -> Fields:
    return (0, 0, 0, 0, 1, pages.keys.shape[3], PLAIN_TILE, PAGE_TOKENS // PLAIN_TILE, KINDS[pages.keys.dtype])


# --- division of labour -----------------------------------------------------------------------------------------------


class Division:
    """How a call is divided among threads.

    ``fields`` are bytes of the job from LAYOUT_FIELDS on, then its counters; ``nbytes`` is the size of the workspace.
    """

    __slots__ = ("fields", "nbytes", "threads")

    def __init__(self, fields: bytes, nbytes: int, threads: int) -> None:
        self.fields, self.nbytes, self.threads = fields, nbytes, threads


@functools.lru_cache(maxsize=256)
def divide(shape: Fields, layout: Fields, max_tiles: int, span: int, threads: int) -> Division:
    """Splits of the packed tokens and chunks of the queries that keep ``threads`` busy, and the layout of the workspace.

    ``shape`` and ``layout`` are SHAPE_FIELDS and LAYOUT_FIELDS of ``job.py``; nothing else matters, so results are cached.
    """
    rows, queries, heads, kv_heads, size, full, _ = shape
    _, _, _, _, groups, group_size, tile, _, _ = layout
    share = heads // kv_heads
    assert heads % kv_heads == 0, (heads, kv_heads)
    chunk = max(1, min(queries, MAX_VECTORS // share))
    chunks = -(-queries // chunk)
    vectors = chunk * share
    units = rows * kv_heads * chunks
    tiles = min(max_tiles, span // tile + 2)
    threads = max(1, min(threads, 2 * size * units * (tiles * tile + full) // NUMBERS_PER_THREAD))
    splits = max(1, min(-(-TASKS_PER_THREAD * threads // units), tiles // MIN_TILES))
    lanes, line = -(-size // LANE_BLOCK) * LANE_BLOCK, max(size, tile)
    words = groups * ((group_size + 3) // 4 + 1) * 4
    sizes = {
        "w_q": 4 * vectors * size,
        "w_stored_q": 4 * line,
        "w_limbs": 2 * vectors * words,
        "w_coefs": 12 * vectors * groups,
        "w_top": 4 * vectors,
        "w_total": 4 * vectors,
        "w_acc": 4 * (vectors * (size + groups) + LANE_BLOCK),
        "w_codes": lanes * tile,
        "w_meta": 16 * kv_heads * groups * tile,
        "w_bias": 4 * tile,
        "w_scores": 4 * vectors * tile,
        "w_dots": 4 * max(vectors, 2) * max(tile, lanes, size + 32),
        "w_weights": 2 * vectors * tile,
        "w_mean": 4 * vectors * size,
        "w_rotor": 16 * size,
        "w_row": 4 * line,
        "w_rows": 4 * LANE_BLOCK * (lanes + -(-size // 8) * 8),  # channels are transposed eight at a time
        "w_seen": tile,
        "w_factors": 4 * vectors,
    }
    where, work_bytes = offsets(sizes, WORK_FIELDS)
    woken = min(threads, units * (splits + 1))
    partials = woken * work_bytes
    counters = (0,) * (LINE + 2 + units)
    fields = array("q", (*layout, *shape, splits, chunk, chunks, vectors, partials, work_bytes, *where, *counters)).tobytes()
    return Division(fields, partials + 4 * units * (splits + 1) * vectors * (size + 2), woken)
