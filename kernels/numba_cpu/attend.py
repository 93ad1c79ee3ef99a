"""Attention wrappers: from the contract's tensors to a job, a team of threads and the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from skvq.kernels.interface import FullSlots, HeadCodec, LabelCodec, PackedPages, PlainPages, Step
from skvq.kernels.layout import LEVELS, PAGE_TOKENS, code_bytes
from skvq.kernels.numba_cpu.job import ATTEND, ATTEND_FIELDS
from skvq.kernels.numba_cpu.mean import MeanTables
from skvq.kernels.numba_cpu.numeric import BFLOAT16, FLOAT16, FLOAT32
from skvq.kernels.numba_cpu.tiles import LANE_BLOCK

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
MAX_VECTORS = 32
"""Query vectors of a kv head that share one unpacking: more would leave the cache."""
TASKS_PER_THREAD = 4
MIN_TILES = 8
"""Fewest tiles worth a split: preparing the queries costs about one."""
PLAIN_TILE = 128

Fields = dict[str, int | float]


def check_call(q: Tensor, full: FullSlots, step: Step) -> None:
    rows, queries, _, size = q.shape
    assert q.device.type == "cpu" and q.dtype in KINDS, (q.device, q.dtype)
    assert full.keys.dtype in KINDS and full.keys.dtype == full.values.dtype, (full.keys.dtype, full.values.dtype)
    assert full.keys.shape[3] == size and full.keys.stride() == full.values.stride(), (full.keys.shape, full.values.shape)
    assert full.keys.stride(3) == 1 and full.positions.stride(1) == 1 and full.positions.dtype == torch.int32
    assert step.slots.dtype == torch.int64 and step.slots.shape == (rows,) and step.slots.is_contiguous(), step.slots.shape
    assert step.positions.dtype == torch.int32 and step.positions.shape == (rows, queries) and step.positions.is_contiguous()
    assert step.packed.dtype == torch.int32 and step.packed.is_contiguous() and step.packed.shape == (rows,)
    assert step.page_table.dtype == torch.int32 and (step.page_table.shape[1] < 2 or step.page_table.stride(1) == 1)


def call_fields(q: Tensor, out: Tensor, lse: Tensor, full: FullSlots, step: Step) -> Fields:
    rows, queries, heads, size = q.shape
    item = full.keys.element_size()
    return {
        "q": q.data_ptr(), "out": out.data_ptr(), "lse": lse.data_ptr(), "slots": step.slots.data_ptr(),
        "positions": step.positions.data_ptr(), "packed": step.packed.data_ptr(), "page_table": step.page_table.data_ptr(),
        "page_table_stride": 4 * step.page_table.stride(0), "span": step.span, "rows": rows, "queries": queries, "heads": heads,
        "kv_heads": full.keys.shape[1], "size": size, "full_keys": full.keys.data_ptr(), "full_values": full.values.data_ptr(),
        "full_slot": item * full.keys.stride(0), "full_head": item * full.keys.stride(1), "full_row": item * full.keys.stride(2),
        "full_positions": full.positions.data_ptr(), "full_positions_stride": 4 * full.positions.stride(0),
        "full": full.keys.shape[2], "full_kind": KINDS[full.keys.dtype],
    }  # fmt: skip


def page_fields(pages: PackedPages) -> Fields:
    layout = pages.layout
    codes, values, meta = pages.key_codes, pages.value_codes, pages.meta
    assert codes.dtype == values.dtype == torch.uint8 and meta.dtype == torch.int32, (codes.dtype, values.dtype, meta.dtype)
    assert codes.shape[1:] == (layout.kv_heads, layout.key_bytes) and codes.stride(2) == 1, codes.shape
    assert values.shape[1:] == (layout.kv_heads, layout.value_bytes) and values.stride(2) == 1, values.shape
    assert meta.shape[1:] == (layout.kv_heads, layout.meta_words) and meta.stride(2) == 1, meta.shape
    return {
        "key_codes": codes.data_ptr(), "key_page": codes.stride(0), "key_head": codes.stride(1),
        "value_codes": values.data_ptr(), "value_page": values.stride(0), "value_head": values.stride(1),
        "meta": meta.data_ptr(), "meta_page": 4 * meta.stride(0), "meta_head": 4 * meta.stride(1),
        "key_tile": code_bytes(layout.key_bits, layout.head_size, layout.tile),
        "value_tile": code_bytes(layout.value_bits, layout.head_size, layout.tile),
        "key_levels": LEVELS[layout.key_bits], "value_levels": LEVELS[layout.value_bits],
        "groups": layout.groups, "group_size": layout.group_size, "tile": layout.tile, "tiles": layout.tiles,
    }  # fmt: skip


def plain_fields(pages: PlainPages) -> Fields:
    keys, values = pages.keys, pages.values
    assert keys.dtype in KINDS and values.dtype == keys.dtype and keys.shape == values.shape, (keys.shape, values.shape)
    assert keys.stride()[2:] == values.stride()[2:] == (keys.shape[3], 1) and keys.shape[2] == PAGE_TOKENS, keys.stride()
    item = keys.element_size()
    return {
        "key_codes": keys.data_ptr(), "key_page": item * keys.stride(0), "key_head": item * keys.stride(1),
        "value_codes": values.data_ptr(), "value_page": item * values.stride(0), "value_head": item * values.stride(1),
        "page_kind": KINDS[keys.dtype], "groups": 1, "group_size": keys.shape[3], "tile": PLAIN_TILE,
        "tiles": PAGE_TOKENS // PLAIN_TILE,
    }  # fmt: skip


def head_fields(codec: HeadCodec, mean: MeanTables | None) -> Fields:
    tensors = (codec.keys.unit, codec.values.unit, codec.query_basis, codec.output_basis, codec.value_mean, codec.key_mean)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    fields: Fields = {
        "key_unit": codec.keys.unit.data_ptr(), "value_unit": codec.values.unit.data_ptr(), "has_basis": int(codec.has_basis),
        "query_basis": codec.query_basis.data_ptr(), "output_basis": codec.output_basis.data_ptr(),
        "value_mean": codec.value_mean.data_ptr(), "mean": 0,
    }  # fmt: skip
    if mean is not None:
        fields |= {
            "mean": codec.key_mean.data_ptr(), "rope_scale": codec.rope.scale, "mean_pairs": mean.pairs.ctypes.data,
            "inv_freq": mean.frequencies.ctypes.data, "mean_rows": mean.rows.ctypes.data, "mean_series": mean.series.ctypes.data,
        }  # fmt: skip
    return fields


def label_fields(codec: LabelCodec, table: MeanTables) -> Fields:
    tensors = (codec.key_labels, codec.value_labels)
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in tensors)
    return {
        "key_unit": codec.keys.unit.data_ptr(), "value_unit": codec.values.unit.data_ptr(), "has_basis": 0, "mean": 0,
        "key_labels": codec.key_labels.data_ptr(), "value_labels": codec.value_labels.data_ptr(),
        "rope_scale": codec.rope.scale, "inv_freq": table.frequencies.ctypes.data, "turn_cos": table.cos.ctypes.data,
        "turn_sin": table.sin.ctypes.data, "mean_pairs": table.pairs.ctypes.data,
    }  # fmt: skip


def divide(fields: Fields, max_packed: int, threads: int) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]], int]:
    """Division of labour and workspace: the job, what must live as long as it, and the threads worth waking."""
    f = {name: int(value) for name, value in fields.items()}
    share, size, tile, groups = f["heads"] // f["kv_heads"], f["size"], f["tile"], f["groups"]
    chunk = max(1, min(f["queries"], MAX_VECTORS // share))
    chunks = -(-f["queries"] // chunk)
    vectors = chunk * share
    units = f["rows"] * f["kv_heads"] * chunks
    tiles = -(-min(max_packed, f["span"] + tile) // tile)
    splits = max(1, min(-(-TASKS_PER_THREAD * threads // units), tiles // MIN_TILES))
    lanes = -(-size // LANE_BLOCK) * LANE_BLOCK
    words = groups * ((f["group_size"] + 3) // 4 + 1) * 4
    line = max(size, tile, 16)
    sizes = {
        "w_q": 4 * vectors * size, "w_stored_q": 4 * line, "w_limbs": 2 * vectors * words, "w_coefs": 12 * vectors * groups,
        "w_top": 4 * vectors, "w_total": 4 * vectors, "w_acc": 4 * (vectors * (size + groups) + LANE_BLOCK), "w_codes": lanes * tile,
        "w_meta": 16 * f["kv_heads"] * groups * tile, "w_bias": 4 * tile, "w_scores": 4 * vectors * tile, "w_dots": 4 * max(vectors, 2) * max(tile, lanes, size + 32),
        "w_weights": 2 * vectors * tile, "w_mean": 4 * vectors * size, "w_rotor": 16 * size, "w_row": 4 * line, "w_rows": 4 * LANE_BLOCK * (lanes + size), "w_used": 4 * vectors,
    }  # fmt: skip
    work_bytes = 0
    for name, nbytes in sizes.items():
        f[name] = work_bytes
        work_bytes += -(-nbytes // 64) * 64
    work = np.empty(threads * work_bytes + 64, np.uint8)
    partials = np.empty(units * (splits + 1) * vectors * (size + 2), np.float32)
    counters = np.zeros(2 + units, np.int64)
    f |= {
        "splits": splits, "chunk": chunk, "chunks": chunks, "vectors": vectors, "partials": partials.ctypes.data,
        "counters": counters.ctypes.data, "work": -(-work.ctypes.data // 64) * 64, "work_bytes": work_bytes,
    }  # fmt: skip
    row = tuple(f.get(name, 0) for name in ATTEND_FIELDS) + (float(fields.get("rope_scale", 1.0)),)
    return np.array([row], ATTEND), [work, partials, counters], min(threads, units * (splits + 1))
