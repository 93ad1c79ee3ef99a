# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806
"""Keys and values in the stored basis to codes and metadata in the pages, quantized on the way or before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.interface import HeadCodec, LabelCodec, PackedPages
from skvq.kernels.triton_gpu.forms import VARYING
from skvq.kernels.triton_gpu.pages import bits_code, code_bytes, in_page, levels, low_bits, page_strides
from skvq.kernels.triton_gpu.quantize import fit_groups


@triton.jit
def store_bits(
    code, out, share, D: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr
):
    """Write one plane set of ``code`` [32, D]: fields of WIDTH bits, from bit SHIFT of the codes on.

    Byte b of token t goes to ``out + t * ROW + b * COLUMN``.
    """
    count: tl.constexpr = 8 // WIDTH
    size: tl.constexpr = D // count
    field = tl.reshape((code >> SHIFT) & (2**WIDTH - 1), [32, count, size])
    byte = tl.sum(field << (tl.arange(0, count) * WIDTH)[None, :, None], 1)
    t = share * 32 + tl.arange(0, 32)
    tl.store(out + t[:, None] * ROW + tl.arange(0, size)[None, :] * COLUMN, byte.to(tl.uint8))


@triton.jit
def store_codes(code, out, share, D: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Write every plane set of the codes [32, D] of share ``share`` of a tile; not for trits."""
    low: tl.constexpr = low_bits(BITS)
    size: tl.constexpr = D * low // 8
    store_bits(code, out, share, D, low, 0, size if BY_TOKEN else 1, 1 if BY_TOKEN else TILE)
    if BITS == 3:
        store_bits(code, out + TILE * size, share, D, 1, 2, D // 8 if BY_TOKEN else 1, 1 if BY_TOKEN else TILE)


@triton.jit
def side_of_share(y_ptr, at, unit_ptr, clip_ptr, D: tl.constexpr, G: tl.constexpr, LEVELS: tl.constexpr):
    """Quantize 32 tokens of one head from ``at`` on: codes int32 [32, D]; scale and mid bytes int32 [32 * G], by token."""
    size: tl.constexpr = D // G
    rows = tl.arange(0, 32 * G)
    y = tl.load(
        y_ptr + at + (rows // G)[:, None] * tl.num_programs(1) * D + (rows % G)[:, None] * size + tl.arange(0, size)[None, :]
    )
    unit = tl.load(unit_ptr + rows % G)
    clip = tl.load(clip_ptr + rows % G)
    code, scale, mid = fit_groups(y, tl.full([32 * G, size], True, tl.int1), size * 1.0, unit, clip, LEVELS)
    return tl.reshape(code, [32, D]), scale, mid


@triton.jit
def codes_of_share(code_ptr, scale_ptr, mid_ptr, token, head, D: tl.constexpr, G: tl.constexpr):
    """The same of tokens that are quantized: read from uint8 codes [T, KH, D], scale and mid bytes [T, KH, G]."""
    heads = tl.num_programs(1)
    t = token + tl.arange(0, 32)
    code = tl.load(code_ptr + (t[:, None].to(tl.int64) * heads + head) * D + tl.arange(0, D)[None, :]).to(tl.int32)
    rows = tl.arange(0, 32 * G)
    at = ((token + rows // G).to(tl.int64) * heads + head) * G + rows % G
    return code, tl.load(scale_ptr + at).to(tl.int32), tl.load(mid_ptr + at).to(tl.int32)


@triton.jit(**VARYING)
def pack_kernel(
    key_ptr, value_ptr, key_unit_ptr, key_clip_ptr, value_unit_ptr, value_clip_ptr,
    key_scale_ptr, key_mid_ptr, value_scale_ptr, value_mid_ptr, retained_ptr,
    key_code_ptr, value_code_ptr, meta_ptr, page_ptr, first_tile,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Codes and metadata of one tile of one kv head, keys and values, 32 tokens at a time.

    ``key`` and ``value`` are float32 [T, KH, D], to be quantized here; or with QUANTIZED uint8 codes, with the bytes of scale
    and mid beside them. Reads each once, writes (key_bits + value_bits) D / 8 + 4 G bytes a token.
    """
    TILES: tl.constexpr = in_page(TILE)
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    page = tl.load(page_ptr + (first_tile + tile) // TILES).to(tl.int64)
    place = (first_tile + tile) % TILES
    key_out = key_code_ptr + page * stride_key_page + head * stride_key_head
    key_out += place * code_bytes(KEY_BITS, D, TILE)
    value_out = value_code_ptr + page * stride_value_page + head * stride_value_head
    value_out += place * code_bytes(VALUE_BITS, D, TILE)
    meta_out = meta_ptr + page * stride_meta_page + head * stride_meta_head + place * (G * TILE)
    rows = tl.arange(0, 32 * G)
    key_trits = tl.zeros([32, D], tl.int32)
    value_trits = tl.zeros([32, D], tl.int32)
    for share in range(TILE // 32):
        token = tile * TILE + share * 32
        if QUANTIZED:
            key, ks, km = codes_of_share(key_ptr, key_scale_ptr, key_mid_ptr, token, head, D, G)
            value, vs, vm = codes_of_share(value_ptr, value_scale_ptr, value_mid_ptr, token, head, D, G)
        else:
            at = (token.to(tl.int64) * heads + head) * D
            unit, clip = key_unit_ptr + head * G, key_clip_ptr + head * G
            key, ks, km = side_of_share(key_ptr, at, unit, clip, D, G, levels(KEY_BITS))
            unit, clip = value_unit_ptr + head * G, value_clip_ptr + head * G
            value, vs, vm = side_of_share(value_ptr, at, unit, clip, D, G, levels(VALUE_BITS))
        flag = tl.load(retained_ptr + token + rows // G).to(tl.int32)
        ks |= tl.where((flag != 0) & (rows % G == 0), 0x80, 0)
        tl.store(meta_out + (rows % G) * TILE + share * 32 + rows // G, ks | (km << 8) | (vs << 16) | (vm << 24))
        if KEY_BITS == 15:
            key_trits = key_trits * 3 + key
        else:
            store_codes(key, key_out, share, D, KEY_BITS, TILE, True)
        if VALUE_BITS == 15:
            value_trits = value_trits * 3 + value
        else:
            store_codes(value, value_out, share, D, VALUE_BITS, TILE, False)
    s = tl.arange(0, 32)[:, None]
    d = tl.arange(0, D)[None, :]
    if KEY_BITS == 15:
        tl.store(key_out + s * D + d, ((256 * key_trits + 242) // 243).to(tl.uint8))
    if VALUE_BITS == 15:
        tl.store(value_out + d * 32 + s, ((256 * value_trits + 242) // 243).to(tl.uint8))


def launch_pack(
    pages: PackedPages, codec: HeadCodec | LabelCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor,
    meta: tuple[Tensor, Tensor, Tensor, Tensor], retained: Tensor, *, quantized: bool,
) -> None:  # fmt: skip
    """Write T tokens [T, KH, D], given in the stored basis, to the pages as tokens ``first .. first+T-1``. Whole tiles only.

    Not ``quantized``: keys and values are float32, each code is rounded on its own, and ``meta`` is not read. ``quantized``:
    they are uint8 codes, and ``meta`` has the bytes of key scales, key mids, value scales and value mids, uint8 [T, KH, G].
    ``retained`` bool [T] marks the tokens whose packed copy attention skips.
    """
    layout, count = pages.layout, len(retained)
    assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
    assert page_row.dtype == torch.int32 and page_row.is_contiguous(), page_row.dtype
    if not count:
        return
    pack_kernel[(count // layout.tile, layout.kv_heads)](
        keys, values, codec.keys.unit, codec.keys.clip, codec.values.unit, codec.values.clip, *meta,
        retained.view(torch.uint8), pages.key_codes, pages.value_codes, pages.meta, page_row,
        first // layout.tile, *page_strides(pages),
        D=layout.head_size, KEY_BITS=bits_code(layout.key_bits), VALUE_BITS=bits_code(layout.value_bits), G=layout.groups,
        TILE=layout.tile, QUANTIZED=quantized, num_warps=4,
    )  # fmt: skip
