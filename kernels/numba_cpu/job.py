"""What a kernel is told: one record of addresses and sizes, built by the wrappers and read by jitted code."""

from __future__ import annotations

import numpy as np

ATTEND_FIELDS = (
    # tensors of the call
    "q", "out", "lse", "slots", "positions", "packed", "page_table", "page_table_stride", "span",
    "rows", "queries", "heads", "kv_heads", "size",
    # pages; strides in bytes
    "key_codes", "key_page", "key_head", "value_codes", "value_page", "value_head", "meta", "meta_page", "meta_head",
    "key_tile", "value_tile", "key_levels", "value_levels", "groups", "group_size", "tile", "tiles", "page_kind",
    # full-precision slots; strides in bytes
    "full_keys", "full_values", "full_slot", "full_head", "full_row", "full_positions", "full_positions_stride", "full", "full_kind",
    # codec
    "key_unit", "value_unit", "has_basis", "query_basis", "output_basis", "value_mean", "key_labels", "value_labels",
    "inv_freq", "mean_pairs", "mean_heads", "mean", "turn_cos", "turn_sin", "mean_rows", "mean_series",
    # division of labour
    "splits", "chunk", "chunks", "vectors", "partials", "counters", "work", "work_bytes",
    # offsets in a thread's workspace
    "w_q", "w_stored_q", "w_limbs", "w_coefs", "w_top", "w_total", "w_acc", "w_codes", "w_meta", "w_bias", "w_scores", "w_dots",
    "w_weights", "w_mean", "w_rotor", "w_row", "w_rows", "w_used",
)  # fmt: skip
ATTEND = np.dtype([(name, np.int64) for name in ATTEND_FIELDS] + [("rope_scale", np.float64)])

PACK_FIELDS = (
    "keys", "values", "retained", "page_row", "first", "count", "kv_heads", "size",
    "key_codes", "key_page", "key_head", "value_codes", "value_page", "value_head", "meta", "meta_page", "meta_head",
    "key_tile", "value_tile", "key_levels", "value_levels", "groups", "tile", "tiles", "heads_together",
    "key_unit", "key_clip", "key_starts", "key_channels", "value_unit", "value_clip", "value_starts", "value_channels",
    "key_labels", "value_labels", "key_metric", "key_factor", "value_metric", "value_factor",
    "counters", "work", "work_bytes", "w_codes", "w_group", "w_meta", "w_lattice",
)  # fmt: skip
PACK = np.dtype([(name, np.int64) for name in PACK_FIELDS])
