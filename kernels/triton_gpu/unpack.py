# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RET505
"""Packed tiles back to keys and values: what streaming prefill reads, 32 tokens a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import HeadCodec, LabelCodec, PackedPages
from skvq.kernels.triton_gpu.e4m3 import e4m3_decode
from skvq.kernels.triton_gpu.encode import COLUMNS, precise_dot
from skvq.kernels.triton_gpu.forms import VARYING
from skvq.kernels.triton_gpu.lanes import cut
from skvq.kernels.triton_gpu.pages import bits_code, code_bytes, in_page, low_bits, middle, page_strides
from skvq.kernels.triton_gpu.prepare import near_dot
from skvq.kernels.triton_gpu.workspace import LabelTables, RopeTables


@triton.jit
def load_field(base, t, d, D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BY_TOKEN: tl.constexpr):
    """One field (int32) of channels ``d`` [1, D] and tokens ``t`` [T, 1] of a tile, from one plane set of WIDTH bits."""
    size: tl.constexpr = D * WIDTH // 8
    row: tl.constexpr = size if BY_TOKEN else 1
    column: tl.constexpr = 1 if BY_TOKEN else TILE
    byte = tl.load(base + t * row + (d % size) * column).to(tl.int32)
    return (byte >> (d // size * WIDTH)) & (2**WIDTH - 1)


@triton.jit
def load_codes(base, share, s, d, D: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Codes (int32) of tokens ``32 share + s`` [T, 1] and channels ``d`` [1, D] of one tile; for trits too."""
    if BITS == 15:
        byte = tl.load(base + (s * D + d if BY_TOKEN else d * 32 + s)).to(tl.int32)
        for _ in range(share):
            byte = (byte * 3) & 0xFF
        return (byte * 3) >> 8
    else:
        t = share * 32 + s
        low: tl.constexpr = low_bits(BITS)
        code = load_field(base, t, d, D, low, TILE, BY_TOKEN)
        if BITS == 3:
            code |= load_field(base + TILE * D // 4, t, d, D, 1, TILE, BY_TOKEN) << 2
        return code


@triton.jit
def load_meta(meta, label, t, stride_head, G: tl.constexpr, TILE: tl.constexpr):
    """Metadata words of tokens ``t`` [T, 1] and groups ``label`` [1, D] of all kv heads; ``meta`` is the tile of the first."""
    return tl.load(meta + (label // G) * stride_head + (label % G) * TILE + t)


@triton.jit
def near_product(a, b, PRECISE: tl.constexpr, WIDE: tl.constexpr):
    """``a b`` of float32 numbers, as good as float32 or else as a result of 16 bits needs it."""
    if PRECISE:
        return precise_dot(a, b, WIDE)
    else:
        return near_dot(a, b, 2, WIDE)


@triton.jit
def product_columns(
    halves, basis, n, IN: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr, PRECISE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Columns ``n`` [1, COLUMNS] of ``x matrix``; x [32, 2 H] comes in halves. IN and OUT are the matrix's strides: from one
    channel of x to the next, from one column to the next.
    """
    a, b = halves
    at = basis + tl.arange(0, H)[:, None] * IN + n * OUT
    return near_product(a, tl.load(at), PRECISE, WIDE) + near_product(b, tl.load(at + H * IN), PRECISE, WIDE)


@triton.jit
def store_keys(
    out, x, basis, mean, turn, place, rope_scale, D: tl.constexpr, HAS_MEAN: tl.constexpr, PRECISE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Write ``basis^T x + RoPE_t(mean)`` of the rows of x [32, D] to ``out`` [32, 1].

    The angle of a token is that of its tile's first token, at ``turn``, plus that of its place in the tile, at ``place`` [32,
    1]: cosines, then sines.
    """
    H: tl.constexpr = D // 2
    halves = cut(x)
    for start in range(0, D, COLUMNS):
        n = (start + tl.arange(0, COLUMNS))[None, :]
        y = product_columns(halves, basis, n, D, 1, H, PRECISE, WIDE)
        if HAS_MEAN:
            j = n % H
            base_cos, base_sin = tl.load(turn + j), tl.load(turn + H + j)
            cos, sin = tl.load(place + j), tl.load(place + H + j)
            cos, sin = base_cos * cos - base_sin * sin, base_sin * cos + base_cos * sin
            other = tl.load(mean + (n + H) % D) * tl.where(n < H, -1.0, 1.0)
            y += (tl.load(mean + n) * cos + other * sin) * rope_scale
        tl.store(out + n, y)


@triton.jit
def store_values(out, x, basis, mean, D: tl.constexpr, PRECISE: tl.constexpr, WIDE: tl.constexpr):
    """Write ``basis x + mean`` of the rows of x [32, D] to ``out`` [32, 1]."""
    halves = cut(x)
    for start in range(0, D, COLUMNS):
        n = (start + tl.arange(0, COLUMNS))[None, :]
        tl.store(out + n, product_columns(halves, basis, n, 1, D, D // 2, PRECISE, WIDE) + tl.load(mean + n))


@triton.jit(**VARYING)
def unpack_kernel(
    key_out_ptr, value_out_ptr, key_code_ptr, value_code_ptr, meta_ptr, page_ptr, key_unit_ptr, value_unit_ptr,
    key_label_ptr, value_label_ptr, query_basis_ptr, output_basis_ptr, key_mean_ptr, value_mean_ptr, turn_ptr, place_ptr,
    first_tile, rope_scale,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr,
    HAS_BASIS: tl.constexpr, HAS_MEAN: tl.constexpr, PRECISE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``x = mid + scale * (code - (levels - 1) / 2)`` of 32 tokens of one kv head, keys and values; with HAS_BASIS taken out of
    the stored basis. Written in the type of the outputs, [T, KH, D].

    A channel's group is its label, also where groups are contiguous. Every bit of x equals that of the reference, for scale
    times code is exact in float32. Reads its share of a tile once and, with a basis, two [D, D] matrices.
    """
    TILES: tl.constexpr = in_page(TILE)
    tile, share = tl.program_id(0) // (TILE // 32), tl.program_id(0) % (TILE // 32)
    head, heads = tl.program_id(1), tl.num_programs(1)
    page = tl.load(page_ptr + (first_tile + tile) // TILES).to(tl.int64)
    place = (first_tile + tile) % TILES
    s = tl.arange(0, 32)[:, None]
    d = tl.arange(0, D)[None, :]
    out = ((tl.program_id(0) * 32 + s).to(tl.int64) * heads + head) * D
    meta = meta_ptr + page * stride_meta_page + place * (G * TILE)

    base = key_code_ptr + page * stride_key_page + head * stride_key_head
    base += place * code_bytes(KEY_BITS, D, TILE)
    label = tl.load(key_label_ptr + head * D + d)
    unit = tl.load(key_unit_ptr + label)
    word = load_meta(meta, label, share * 32 + s, stride_meta_head, G, TILE)
    code = load_codes(base, share, s, d, D, KEY_BITS, TILE, True).to(tl.float32) - middle(KEY_BITS)
    x = e4m3_decode((word >> 8) & 0xFF) * unit + e4m3_decode(word & 0x7F) * unit * code
    if HAS_BASIS:
        turn, places = turn_ptr + (first_tile + tile) * D, place_ptr + (share * 32 + s) * D
        basis, mean = query_basis_ptr + head * D * D, key_mean_ptr + head * D
        store_keys(key_out_ptr + out, x, basis, mean, turn, places, rope_scale, D, HAS_MEAN, PRECISE, WIDE)
    else:
        tl.store(key_out_ptr + out + d, x)

    base = value_code_ptr + page * stride_value_page + head * stride_value_head
    base += place * code_bytes(VALUE_BITS, D, TILE)
    label = tl.load(value_label_ptr + head * D + d)
    unit = tl.load(value_unit_ptr + label)
    word = load_meta(meta, label, share * 32 + s, stride_meta_head, G, TILE)
    code = load_codes(base, share, s, d, D, VALUE_BITS, TILE, False).to(tl.float32) - middle(VALUE_BITS)
    x = e4m3_decode((word >> 24) & 0xFF) * unit + e4m3_decode((word >> 16) & 0xFF) * unit * code
    if HAS_BASIS:
        store_values(value_out_ptr + out, x, output_basis_ptr + head * D * D, value_mean_ptr + head * D, D, PRECISE, WIDE)
    else:
        tl.store(value_out_ptr + out + d, x)


def unpack_heads(
    pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, count: int, dtype: torch.dtype,
    label: Tensor, tables: RopeTables | None, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``PackedKernels.unpack`` in one launch.

    ``label`` int32 [KH * D]: the group of each channel. ``tables`` are those of tiles, None only where the codec has no key
    mean; ``wide``: WIDE of the kernel.
    """
    keys, values = _outputs(pages, page_row, first, count, dtype)
    turn, places, scale = (tables.turn[6:], tables.places, tables.scale) if tables else (codec.key_mean, codec.key_mean, 1.0)
    decoding = codec.query_basis, codec.output_basis, codec.key_mean, codec.value_mean, turn, places
    _launch(
        pages, codec, page_row, first, keys, values, (label, label), decoding, scale,
        HAS_BASIS=codec.has_basis, HAS_MEAN=codec.has_key_mean, PRECISE=dtype == torch.float32, WIDE=wide,
    )  # fmt: skip
    return keys, values


def unpack_labels(
    pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, count: int, dtype: torch.dtype, labels: LabelTables
) -> tuple[Tensor, Tensor]:
    """``PackedKernels.unpack``; torch does the RoPE of the keys."""
    keys, values = _outputs(pages, page_row, first, count, torch.float32)
    _launch(
        pages, codec, page_row, first, keys, values, (labels.key_labels, labels.value_labels), (keys,) * 6, 1.0,
        HAS_BASIS=False, HAS_MEAN=False, PRECISE=True, WIDE=False,
    )  # fmt: skip
    positions = torch.arange(first, first + count, device=keys.device)
    return reference.rotary(keys, positions, codec.rope).to(dtype), values.to(dtype)


def _outputs(pages: PackedPages, page_row: Tensor, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for keys and values of tokens ``first .. first+count-1``, whole tiles, [T, KH, D]."""
    layout = pages.layout
    assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
    shape = (count, layout.kv_heads, layout.head_size)
    return torch.empty(shape, dtype=dtype, device=page_row.device), torch.empty(shape, dtype=dtype, device=page_row.device)


def _launch(
    pages: PackedPages, codec: HeadCodec | LabelCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor,
    labels: tuple[Tensor, Tensor], decoding: tuple[Tensor, ...], rope_scale: float, **forms: bool,
) -> None:  # fmt: skip
    """``labels`` int32 [KH * D]: the group of each channel, counted over all kv heads, as ``LabelCodec`` has them."""
    layout = pages.layout
    if len(keys):
        unpack_kernel[(len(keys) // 32, layout.kv_heads)](
            keys, values, pages.key_codes, pages.value_codes, pages.meta, page_row, codec.keys.unit, codec.values.unit,
            *labels, *decoding, first // layout.tile, rope_scale, *page_strides(pages),
            D=layout.head_size, KEY_BITS=bits_code(layout.key_bits), VALUE_BITS=bits_code(layout.value_bits), G=layout.groups,
            TILE=layout.tile, num_warps=4, **forms,
        )  # fmt: skip
