# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806
"""Decode attention over packed pages whose groups cross heads and whose keys are stored before RoPE (method ``reorder``)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.interface import LabelCodec, PackedPages, Step
from skvq.kernels.triton_gpu.e4m3 import e4m3_decode
from skvq.kernels.triton_gpu.forms import VARYING, Columns, LabelForm
from skvq.kernels.triton_gpu.pages import bits_code, code_bytes, in_page, middle, page_strides
from skvq.kernels.triton_gpu.slots import load_columns
from skvq.kernels.triton_gpu.softmax import LOG2E, NEVER, softmax_step, steps_of, store_partial
from skvq.kernels.triton_gpu.unpack import load_codes, load_meta
from skvq.kernels.triton_gpu.workspace import LabelTables, Partials, RopeTables


@triton.jit(**VARYING)
def attend_labels_kernel(
    q_ptr, turn_ptr, place_ptr, key_ptr, value_ptr, meta_ptr, key_unit_ptr, value_unit_ptr, key_label_ptr, value_label_ptr,
    part_ptr, stat_ptr, pages_ptr, slots_ptr, packed_ptr, positions_ptr,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    stride_pages_slot, heads, chunks, queries, repeat, span, columns, rope_scale,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Partial attention of one kv head, one chunk of NH columns and one split of the tiles; for any bits, and slow.

    Keys and values are dequantized in registers. RoPE of the key at place j of the tile that starts at b is divided: ``q .
    RoPE_(b+j)(k) = (RoPE_-b q) . RoPE_j(k)``, so keys take one table for all tiles. Reads the codes of its kv head and the
    metadata of all kv heads, as the programs of the other heads do; writes NH rows of D + 2 floats.
    """
    TILES: tl.constexpr = in_page(TILE)
    H: tl.constexpr = D // 2
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) // chunks
    chunk = tl.program_id(2) % chunks
    column = chunk * NH + tl.arange(0, NH)
    j = tl.arange(0, H)
    d = tl.arange(0, D)[None, :]
    s = tl.arange(0, 32)[:, None]
    q = load_columns(q_ptr, column, row, head, heads, queries, repeat, D).to(tl.float32) * (rope_scale * LOG2E / D**0.5)
    qa, qb = tl.split(tl.permute(tl.reshape(q, [2, H, NH]), (1, 2, 0)))
    now = tl.load(positions_ptr + row * queries + tl.minimum(column // repeat, queries - 1))
    oldest = now - span + 1
    start, stop = steps_of(split, tl.num_programs(1), tl.load(packed_ptr + row) // TILE, oldest, TILE, True)
    row_ptr = pages_ptr + tl.load(slots_ptr + row) * stride_pages_slot
    label_a = tl.load(key_label_ptr + head * D + j)[None, :]
    label_b = tl.load(key_label_ptr + head * D + H + j)[None, :]
    label_v = tl.load(value_label_ptr + head * D + d)
    unit_a, unit_b, unit_v = tl.load(key_unit_ptr + label_a), tl.load(key_unit_ptr + label_b), tl.load(value_unit_ptr + label_v)
    m_i = tl.full([NH], NEVER, tl.float32)
    l_i = tl.zeros([NH], tl.float32)
    acc = tl.zeros([D, NH], tl.float32)
    for i in range(start, stop):
        page = tl.load(row_ptr + i // TILES).to(tl.int64)
        key = key_ptr + page * stride_key_page + head * stride_key_head
        key += (i % TILES) * code_bytes(KEY_BITS, D, TILE)
        value = value_ptr + page * stride_value_page + head * stride_value_head
        value += (i % TILES) * code_bytes(VALUE_BITS, D, TILE)
        meta = meta_ptr + page * stride_meta_page + (i % TILES) * (G * TILE)
        base_cos, base_sin = tl.load(turn_ptr + i * D + j)[:, None], tl.load(turn_ptr + i * D + H + j)[:, None]
        ra, rb = qa * base_cos + qb * base_sin, qb * base_cos - qa * base_sin
        for share in range(TILE // 32):
            t = share * 32 + s
            cos = tl.load(place_ptr + t * D + j[None, :])
            sin = tl.load(place_ptr + t * D + H + j[None, :])
            ka = key_channels(key, meta, label_a, unit_a, share, s, t, j[None, :], stride_meta_head, D, KEY_BITS, G, TILE)
            kb = key_channels(key, meta, label_b, unit_b, share, s, t, H + j[None, :], stride_meta_head, D, KEY_BITS, G, TILE)
            ta, tb = ka * cos - kb * sin, kb * cos + ka * sin
            if KEY_BITS == 8:  # fp16 would cut off what their last bits say
                x = tl.dot(ta, ra, input_precision="tf32x3")
                x = tl.dot(tb, rb, x, input_precision="tf32x3")
            else:
                x = tl.dot(ta.to(tl.float16), ra.to(tl.float16))
                x = tl.dot(tb.to(tl.float16), rb.to(tl.float16), x)
            flag = tl.load(meta + share * 32 + s) & 0x80
            at = i * TILE + t
            x = tl.where((flag == 0) & (at >= oldest[None, :]), x, NEVER)
            word = load_meta(meta, label_v, t, stride_meta_head, G, TILE) >> 16
            code = load_codes(value, share, s, d, D, VALUE_BITS, TILE, False).to(tl.float32) - middle(VALUE_BITS)
            v = e4m3_decode((word >> 8) & 0xFF) * unit_v + e4m3_decode(word & 0xFF) * unit_v * code
            m_i, l_i, acc = softmax_step(x, v.to(tl.float16), m_i, l_i, acc)
    store_partial(part_ptr, stat_ptr, acc, m_i, l_i, row, head, heads, column, columns, split, tl.num_programs(1), D)


@triton.jit
def key_channels(
    key, meta, label, unit, share, s, t, d, stride_meta_head, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Keys before RoPE, float32 [32, n], of tokens ``t`` [32, 1] at channels ``d`` [1, n] with the labels and units given."""
    word = load_meta(meta, label, t, stride_meta_head, G, TILE)
    code = load_codes(key, share, s, d, D, BITS, TILE, True).to(tl.float32) - middle(BITS)
    return e4m3_decode((word >> 8) & 0xFF) * unit + e4m3_decode(word & 0x7F) * unit * code


def launch_labels(
    form: LabelForm, q: Tensor, pages: PackedPages, codec: LabelCodec, labels: LabelTables, rope: RopeTables, step: Step,
    columns: Columns, packed: Partials,
) -> None:  # fmt: skip
    """Partial softmaxes over the packed tiles, in the model's own basis, to ``packed``. ``rope``: of the layout's tiles."""
    layout = pages.layout
    attend_labels_kernel[(columns.heads, packed.splits, q.shape[0] * columns.chunks)](
        q, rope.turn[6:], rope.places, pages.key_codes, pages.value_codes, pages.meta, codec.keys.unit, codec.values.unit,
        labels.key_labels, labels.value_labels, packed.sums, packed.statistics,
        step.page_table, step.slots, step.packed, step.positions,
        *page_strides(pages), step.page_table.stride(0), columns.heads, columns.chunks, columns.queries, columns.repeat,
        step.span, columns.total, rope.scale,
        D=layout.head_size, KEY_BITS=bits_code(layout.key_bits), VALUE_BITS=bits_code(layout.value_bits), G=layout.groups,
        NH=max(columns.width, 8), TILE=layout.tile, num_warps=form.warps, num_stages=1,
    )  # fmt: skip
