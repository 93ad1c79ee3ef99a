# mypy: ignore-errors
# ruff: noqa: N803, N806
"""Quantize-and-pack: stored-basis keys and values in, codes and metadata out, each number read once."""

from __future__ import annotations

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest even integer
TINY = tl.constexpr(2.0**-9)
REFINE_STEPS = tl.constexpr(3)


@triton.jit
def e4m3_encode(x):
    """Byte (int32) of the nearest E4M3 number, ties to even, saturating at 448; integer arithmetic, sm_80 has no FP8."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    below = ((magnitude * 512.0 + ROUND) - ROUND).to(tl.int32)
    return tl.where(magnitude < 0.015625, below, normal) | tl.where(x < 0, 0x80, 0)


@triton.jit
def e4m3_decode(byte):
    """Value of an E4M3 byte (int32), float32."""
    half = ((byte & 0x7F) << 7) | ((byte & 0x80) << 8)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def nearest_code(y, scale, mid, LEVELS: tl.constexpr):
    """Code of y [T, g] against scale and mid [T], as float32."""
    x = tl.div_rn(y - mid[:, None], tl.broadcast_to(scale[:, None], y.shape)) + (LEVELS - 1) / 2
    return (tl.minimum(tl.maximum(x, 0.0), LEVELS - 1.0) + ROUND) - ROUND


@triton.jit
def fit_groups(y, there, count, unit, clip, LEVELS: tl.constexpr):
    """Codes [T, g] (int32), scale and mid bytes [T] (int32) of groups ``y`` [T, g]; ``reference.quantize``, step by step.

    Columns where ``there`` is false pad a group of ``count`` channels. ``unit`` and ``clip`` are scalars.
    """
    half: tl.constexpr = (LEVELS - 1) / 2
    low = tl.min(tl.where(there, y, float("inf")), 1) * clip
    high = tl.max(tl.where(there, y, float("-inf")), 1) * clip
    tiny = unit * TINY
    scale = tl.maximum(tl.div_rn(high - low, tl.full(high.shape, LEVELS - 1.0, tl.float32)), tiny)
    mid = (high + low) * 0.5
    size = tl.full(high.shape, 1.0, tl.float32) * count
    mean = tl.div_rn(tl.sum(tl.where(there, y, 0.0), 1), size)
    for _ in tl.static_range(REFINE_STEPS):
        code = tl.where(there, nearest_code(y, scale, mid, LEVELS) - half, 0.0)
        code_mean = tl.div_rn(tl.sum(code, 1), size)
        centred = tl.where(there, code - code_mean[:, None], 0.0)
        spread = tl.sum(centred * centred, 1)
        fitted = tl.maximum(tl.div_rn(tl.sum(centred * tl.where(there, y, 0.0), 1), tl.maximum(spread, 1e-6)), tiny)
        scale = tl.where(spread > 0, fitted, scale)
        mid = mean - scale * code_mean
    scale_byte = e4m3_encode(scale / unit)
    mid_byte = e4m3_encode(mid / unit)
    code = nearest_code(y, e4m3_decode(scale_byte) * unit, e4m3_decode(mid_byte) * unit, LEVELS)
    return code.to(tl.int32), scale_byte, mid_byte


@triton.jit
def quantize_kernel(
    y_ptr, unit_ptr, clip_ptr, member_ptr, size_ptr, code_ptr, scale_ptr, mid_ptr, tokens, groups, stride_token, widest,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCK tokens of one group of channels.

    ``member`` int32 [groups, widest] names the channels of each group (``size`` of them); codes go back to their channels,
    uint8 [T, channels], bytes of scale and mid to uint8 [T, groups]. Reads 4 bytes a number, writes 1 and 2 a group.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    w = tl.arange(0, WIDTH)
    count = tl.load(size_ptr + group)
    channel = tl.load(member_ptr + group * widest + w, mask=w < count, other=0)
    inside = (t < tokens)[:, None] & (w < count)[None, :]
    at = t[:, None].to(tl.int64) * stride_token + channel[None, :]
    y = tl.load(y_ptr + at, mask=inside, other=0.0)
    there = tl.broadcast_to((w < count)[None, :], [BLOCK, WIDTH])
    code, scale, mid = fit_groups(y, there, count.to(tl.float32), tl.load(unit_ptr + group), tl.load(clip_ptr + group), LEVELS)
    tl.store(code_ptr + at, code.to(tl.uint8), mask=inside)
    tl.store(scale_ptr + t.to(tl.int64) * groups + group, scale.to(tl.uint8), mask=t < tokens)
    tl.store(mid_ptr + t.to(tl.int64) * groups + group, mid.to(tl.uint8), mask=t < tokens)


@triton.jit
def store_bits(
    code, out, share, D: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr
):
    """Write one plane set of ``code`` [32, D]: byte (t, b) at ``t * ROW + b * COLUMN`` gathers the planes of channel b."""
    count: tl.constexpr = 8 // WIDTH
    size: tl.constexpr = D // count
    field = tl.reshape((code >> SHIFT) & (2**WIDTH - 1), [32, count, size])
    byte = tl.sum(field << (tl.arange(0, count) * WIDTH)[None, :, None], 1)
    t = share * 32 + tl.arange(0, 32)
    tl.store(out + t[:, None] * ROW + tl.arange(0, size)[None, :] * COLUMN, byte.to(tl.uint8))


@triton.jit
def store_codes(code, out, share, D: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Write codes [32, D] of share ``share`` of a tile, every plane set of them (not trits)."""
    low: tl.constexpr = 2 if BITS == 3 else BITS
    size: tl.constexpr = D * low // 8
    store_bits(code, out, share, D, low, 0, size if BY_TOKEN else 1, 1 if BY_TOKEN else TILE)
    if BITS == 3:
        store_bits(code, out + TILE * size, share, D, 1, 2, D // 8 if BY_TOKEN else 1, 1 if BY_TOKEN else TILE)


@triton.jit
def side_of_share(y_ptr, at, unit_ptr, clip_ptr, D: tl.constexpr, G: tl.constexpr, LEVELS: tl.constexpr):
    """Codes [32, D] and metadata bytes [32 * G] of 32 tokens of one head: a row a group."""
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
    """Codes [32, D] and metadata bytes [32 * G] of 32 tokens of one head, quantized before."""
    heads = tl.num_programs(1)
    t = token + tl.arange(0, 32)
    code = tl.load(code_ptr + (t[:, None].to(tl.int64) * heads + head) * D + tl.arange(0, D)[None, :]).to(tl.int32)
    rows = tl.arange(0, 32 * G)
    at = ((token + rows // G).to(tl.int64) * heads + head) * G + rows % G
    return code, tl.load(scale_ptr + at).to(tl.int32), tl.load(mid_ptr + at).to(tl.int32)


@triton.jit(do_not_specialize=["first_tile"])  # varies: one compilation serves all
def pack_kernel(
    key_ptr, value_ptr, key_unit_ptr, key_clip_ptr, value_unit_ptr, value_clip_ptr,
    key_scale_ptr, key_mid_ptr, value_scale_ptr, value_mid_ptr, retained_ptr,
    key_code_ptr, value_code_ptr, meta_ptr, page_ptr, first_tile,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Write codes and metadata of one tile of one kv head, 32 tokens at a time.

    ``key`` and ``value`` are float32 [T, KH, D] in the stored basis, or with QUANTIZED their codes uint8, with the bytes of
    scale and mid beside them. Reads each once, writes (key_bits + value_bits) D / 8 + 4 G bytes a token.
    """
    TILES: tl.constexpr = 1280 // TILE
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    page = tl.load(page_ptr + (first_tile + tile) // TILES).to(tl.int64)
    place = (first_tile + tile) % TILES
    key_out = (
        key_code_ptr
        + page * stride_key_page
        + head * stride_key_head
        + place * (32 * D if KEY_BITS == 15 else TILE * D * KEY_BITS // 8)
    )
    value_out = value_code_ptr + page * stride_value_page + head * stride_value_head
    value_out += place * (32 * D if VALUE_BITS == 15 else TILE * D * VALUE_BITS // 8)
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
            key, ks, km = side_of_share(
                key_ptr, at, key_unit_ptr + head * G, key_clip_ptr + head * G, D, G, 3 if KEY_BITS == 15 else 2**KEY_BITS
            )
            value, vs, vm = side_of_share(
                value_ptr, at, value_unit_ptr + head * G, value_clip_ptr + head * G, D, G,
                3 if VALUE_BITS == 15 else 2**VALUE_BITS,
            )  # fmt: skip
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
