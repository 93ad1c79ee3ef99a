"""Jobs: the record of addresses and sizes that is a kernel's only argument, filled in order, read by name."""

from __future__ import annotations

from array import array
from typing import TypeAlias

import numpy as np

CALL_FIELDS = (
    "q", "out", "lse", "slots", "positions", "packed", "page_table", "page_table_stride", "span",
    "full_keys", "full_values", "full_slot", "full_head", "full_row", "full_positions", "full_positions_stride",
    "counters", "work",
)  # fmt: skip
PAGE_FIELDS = ("key_codes", "key_page", "key_head", "value_codes", "value_page", "value_head", "meta", "meta_page", "meta_head")
CODEC_FIELDS = (
    "key_unit", "value_unit", "has_basis", "query_basis", "output_basis", "value_mean", "mean", "key_labels", "value_labels",
)  # fmt: skip
TABLE_FIELDS = ("rope_scale", "inv_freq", "mean_pairs", "turn_cos", "turn_sin", "mean_rows", "mean_series")
LAYOUT_FIELDS = ("key_tile", "value_tile", "key_levels", "value_levels", "groups", "group_size", "tile", "tiles", "page_kind")
SHAPE_FIELDS = ("rows", "queries", "heads", "kv_heads", "size", "full", "full_kind")
DIVISION_FIELDS = ("splits", "chunk", "chunks", "vectors", "partials", "work_bytes")
WORK_FIELDS = (
    "w_q", "w_stored_q", "w_limbs", "w_coefs", "w_top", "w_total", "w_acc", "w_codes", "w_meta", "w_bias", "w_scores", "w_dots",
    "w_weights", "w_mean", "w_rotor", "w_row", "w_rows", "w_seen", "w_factors",
)  # fmt: skip
"""Offsets in a thread's workspace."""

PACK_FIELDS = (
    "keys", "values", "retained", "page_row", "first", "count", "kv_heads", "size", *PAGE_FIELDS,
    "key_tile", "value_tile", "key_levels", "value_levels", "groups", "tile", "tiles", "heads_together",
    "key_unit", "key_clip", "key_starts", "key_channels", "key_labels", "key_metric", "key_factor",
    "value_unit", "value_clip", "value_starts", "value_channels", "value_labels", "value_metric", "value_factor",
    "counters", "work", "work_bytes", "w_codes", "w_group", "w_meta", "w_lattice", "w_pulls", "w_rows",
)  # fmt: skip


def record(*names: str) -> np.dtype[np.void]:
    """A record of int64 fields (only ``rope_scale`` is float64). Strides in a job are in bytes."""
    return np.dtype([(name, np.float64 if name == "rope_scale" else np.int64) for name in names])


ATTEND = record(
    *CALL_FIELDS, *PAGE_FIELDS, *CODEC_FIELDS, *TABLE_FIELDS, *LAYOUT_FIELDS, *SHAPE_FIELDS, *DIVISION_FIELDS, *WORK_FIELDS
)  # fmt: skip
PACK = record(*PACK_FIELDS)


def offsets(sizes: dict[str, int], names: tuple[str, ...]) -> tuple[tuple[int, ...], int]:
    """Offsets of the parts of a workspace, each aligned to 64 bytes, in the order of ``names``; and its size in bytes.

    >>> offsets({"a": 65, "b": 1}, ("b", "a"))
    ((128, 0), 192)
    """
    found, end = {}, 0
    for name, nbytes in sizes.items():
        found[name] = end
        end += -(-nbytes // 64) * 64
    return tuple(found[name] for name in names), end


Job: TypeAlias = "array[int]"
