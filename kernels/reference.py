"""The specification: every kernel in plain torch, float32, one sequence at a time. Slow, and always right.

Quantization follows SKVQ (arXiv 2405.06219, section 3.2) with three changes: metadata are rounded to FP8 before the codes
are computed, not after; scale and mid are refined by least squares against the codes; mid is stored, not the lower end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skvq.kernels.interface import (
    FullSlots,
    HeadCodec,
    HeadSide,
    LabelCodec,
    PackedPages,
    PlainPages,
    RopeFrequencies,
    Side,
    Step,
)
from skvq.kernels.layout import (
    BIT_PLANES,
    E4M3_MAX,
    E4M3_MIN,
    LEVELS,
    RETAINED_FLAG,
    TRIT_PLANES,
    TRIT_SLOTS,
    PageLayout,
)

REFINE_STEPS = 3
"""Least-squares steps on scale and mid where every code is rounded on its own."""

LATTICE_FITS, LATTICE_ROUNDS, LATTICE_SWEEPS = 2, 2, 2
"""Of ``quantize_lattice``: plain least-squares steps at the start, rounds of descent and fit, sweeps of a descent."""


# --- FP8 metadata -----------------------------------------------------------------------------------------------------


def e4m3_encode(x: Tensor) -> Tensor:
    """Round to the nearest E4M3 byte (uint8), saturating at +-448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_decode(byte: Tensor) -> Tensor:
    """Value of an E4M3 byte, float32."""
    return byte.view(torch.float8_e4m3fn).float()


# --- quantization -----------------------------------------------------------------------------------------------------


def quantize(y: Tensor, levels: int, unit: Tensor, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale bytes and mid bytes of groups ``y`` [..., g]; ``unit`` and ``clip`` broadcast to [...].

    The range starts at clip * [min, max]; scale and mid are fitted to the codes by least squares REFINE_STEPS times, rounded to
    E4M3 in ``unit``, and the codes are taken against the rounded values. Returns uint8 [..., g], uint8 [...], uint8 [...].
    """
    y = y.float()
    scale, mid = _fit_range(y, levels, clip, unit * E4M3_MIN, REFINE_STEPS)
    scale_byte = e4m3_encode(scale / unit)
    mid_byte = e4m3_encode(mid / unit)
    code = _codes(y, e4m3_decode(scale_byte) * unit, e4m3_decode(mid_byte) * unit, levels)
    return code.to(torch.uint8), scale_byte, mid_byte


def _fit_range(y: Tensor, levels: int, clip: Tensor, tiny: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Scale (at least ``tiny``) and mid [...] of groups [..., g]: the clipped range, then ``steps`` of plain least squares."""
    low, high = y.amin(-1) * clip, y.amax(-1) * clip
    scale, mid = torch.maximum((high - low) / (levels - 1), tiny), (high + low) / 2
    mean = y.mean(-1)
    for _ in range(steps):
        code = _codes(y, scale, mid, levels) - (levels - 1) / 2
        centred = code - code.mean(-1, keepdim=True)
        spread = centred.square().sum(-1)
        fitted = torch.maximum((centred * y).sum(-1) / spread.clamp_min(1e-6), tiny)
        scale = torch.where(spread > 0, fitted, scale)
        mid = mean - scale * code.mean(-1)
    return scale, mid


def _codes(y: Tensor, scale: Tensor, mid: Tensor, levels: int) -> Tensor:
    return ((y - mid[..., None]) / scale[..., None] + (levels - 1) / 2).round().clamp(0, levels - 1)


def quantize_lattice(y: Tensor, levels: int, side: HeadSide) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [T, KH, D] and scale and mid bytes uint8 [T, KH, G] of ``y`` [T, KH, D] that keep ``e^T metric e`` small.

    Rounding is a closest-point problem in the lattice that the metric spans: the nearest-plane algorithm (Babai 1986; LDLQ in
    QuIP, arXiv 2307.13304), then sweeps of coordinate descent over the codes, in turn with a least-squares fit of scale and
    mid in the same metric. Metadata are rounded to E4M3 before the last sweeps, so the codes make up for that too. All in
    float32, or in float64 where ``y`` and the side are.
    """
    tokens, heads, size = y.shape
    groups = side.unit.shape[1]
    width = size // groups
    y = y.to(side.metric.dtype)
    half, tiny = (levels - 1) / 2, side.unit * E4M3_MIN
    scale, mid = _fit_range(y.view(tokens, heads, groups, width), levels, side.clip, tiny, LATTICE_FITS)
    code = _nearest_plane(y, _by_channel(scale, width), _by_channel(mid, width), levels, side.factor)
    for _ in range(LATTICE_ROUNDS):
        error = y - _by_channel(mid, width) - _by_channel(scale, width) * code  # the metric's gradient follows from it
        slope = torch.einsum("hij,thj->thi", side.metric, error)
        code = _descend(code, slope, _by_channel(scale, width), half, side.metric)
        scale, mid = _fit_metric(y, code, scale, mid, side.metric, tiny)
    scale_byte = e4m3_encode(scale / side.unit)
    exact = e4m3_decode(scale_byte) * side.unit
    error = y - _by_channel(mid, width) - _by_channel(exact, width) * code
    slope = torch.einsum("hij,thj->thi", side.metric, error)
    blocks = side.metric.view(heads, groups, width, groups, width).diagonal(dim1=1, dim2=3).sum((1, 2))  # [KH, G]
    mid_byte = e4m3_encode((mid + slope.view(tokens, heads, groups, width).sum(-1) / blocks) / side.unit)
    error = y - _by_channel(e4m3_decode(mid_byte) * side.unit, width) - _by_channel(exact, width) * code
    slope = torch.einsum("hij,thj->thi", side.metric, error)
    code = _descend(code, slope, _by_channel(exact, width), half, side.metric)
    return (code + half).to(torch.uint8), scale_byte, mid_byte


def _by_channel(x: Tensor, width: int) -> Tensor:
    """[..., G] -> [..., G * width]"""
    return x.repeat_interleave(width, -1)


def _nearest_plane(y: Tensor, scale: Tensor, mid: Tensor, levels: int, factor: Tensor) -> Tensor:
    """Centred codes [T, KH, D], rounded from the last channel to the first; each makes up for the errors of those before."""
    half = (levels - 1) / 2
    code, error = torch.zeros_like(y), torch.zeros_like(y)
    for i in range(y.shape[-1] - 1, -1, -1):
        wanted = y[..., i] + (error[..., i + 1 :] * factor[:, i, i + 1 :]).sum(-1)
        code[..., i] = ((wanted - mid[..., i]) / scale[..., i] + half).round().clamp(0, levels - 1) - half
        error[..., i] = y[..., i] - mid[..., i] - scale[..., i] * code[..., i]
    return code


def _descend(code: Tensor, slope: Tensor, scale: Tensor, half: float, metric: Tensor) -> Tensor:
    """Coordinate descent: each centred code in turn moves to where ``slope = metric error`` [T, KH, D] vanishes."""
    code, slope = code.clone(), slope.clone()
    for _ in range(LATTICE_SWEEPS):
        for i in range(code.shape[-1]):
            moved = (code[..., i] + slope[..., i] / (metric[:, i, i] * scale[..., i]) + half).round().clamp(0, 2 * half) - half
            step = (moved - code[..., i]) * scale[..., i]
            code[..., i] = moved
            slope -= step[..., None] * metric[:, i]
    return code


def _fit_metric(y: Tensor, code: Tensor, scale: Tensor, mid: Tensor, metric: Tensor, tiny: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and mid [T, KH, G] of least squares in the metric, one group after another, for centred codes [T, KH, D]."""
    groups = scale.shape[-1]
    width = y.shape[-1] // groups
    scale, mid = scale.clone(), mid.clone()
    for group in range(groups):
        at = slice(group * width, (group + 1) * width)
        error = y - _by_channel(mid, width) - _by_channel(scale, width) * code
        slope = torch.einsum("hij,thj->thi", metric[:, at], error)  # [T, KH, width]
        block, part = metric[:, at, at], code[..., at]
        turned = torch.einsum("hij,thj->thi", block, part)
        ones = block.sum(-1)  # [KH, width]
        cc, c1, one = (part * turned).sum(-1), (part * ones).sum(-1), ones.sum(-1)
        cs, s1 = (part * slope).sum(-1), slope.sum(-1)
        determinant = cc * one - c1 * c1
        step = (cs * one - s1 * c1) / torch.where(determinant != 0, determinant, 1.0)
        good = (determinant > 1e-6 * cc * one) & (scale[..., group] + step > tiny[:, group])
        step = torch.where(good, step, 0.0)
        mid[..., group] += torch.where(good, (s1 - step * c1) / one, 0.0)
        scale[..., group] += step
    return scale, mid


def dequantize(code: Tensor, scale: Tensor, mid: Tensor, levels: int) -> Tensor:
    """``mid + scale * (code - (levels - 1) / 2)``, scale and mid [...] for codes [..., g], float32."""
    return mid[..., None] + scale[..., None] * (code.float() - (levels - 1) / 2)


# --- codes and metadata in a page ---------------------------------------------------------------------------------------


def pack_codes(codes: Tensor, bits: float, tile: int, *, token_major: bool) -> Tensor:
    """Bytes of ``codes`` uint8 [T, KH, D], T whole tiles: uint8 [T / tile, KH, bytes of a tile] (``layout.py``)."""
    tokens, heads, size = codes.shape
    rows = codes.view(tokens // tile, tile, heads, size).transpose(1, 2)  # [tiles, KH, tile, D]
    if bits == 1.5:
        trits = rows.reshape(-1, heads, TRIT_PLANES, TRIT_SLOTS, size).to(torch.int32)
        weights = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=codes.device)
        value = (trits * weights.view(1, 1, -1, 1, 1)).sum(2)  # [tiles, KH, slots, D]
        parts = [(256 * value + 242) // 243]
    else:
        parts = []
        shift = 0
        for width in BIT_PLANES[bits]:
            planes = 8 // width
            part = ((rows >> shift) & (2**width - 1)).reshape(*rows.shape[:3], planes, size // planes).to(torch.int32)
            places = torch.arange(planes, device=codes.device, dtype=torch.int32) * width
            parts.append((part << places[:, None]).sum(3))  # [tiles, KH, tile, D / planes]
            shift += width
    parts = parts if token_major else [p.transpose(2, 3) for p in parts]
    return torch.cat([p.reshape(*p.shape[:2], -1) for p in parts], -1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: float, tile: int, size: int, *, token_major: bool) -> Tensor:
    """Inverse of ``pack_codes``: uint8 [tiles, KH, bytes of a tile] -> uint8 [tiles * tile, KH, D]."""
    tiles, heads, _ = packed.shape
    if bits == 1.5:
        shape = (TRIT_SLOTS, size) if token_major else (size, TRIT_SLOTS)
        x = packed.view(tiles, heads, *shape).to(torch.int32)
        x = x if token_major else x.transpose(2, 3)
        trits = []
        for _ in range(TRIT_PLANES):
            x = x * 3
            trits.append(x >> 8)
            x = x & 0xFF
        rows = torch.stack(trits, 2).reshape(tiles, heads, tile, size)
    else:
        rows = torch.zeros(tiles, heads, tile, size, dtype=torch.int32, device=packed.device)
        start = shift = 0
        for width in BIT_PLANES[bits]:
            planes = 8 // width
            count = tile * size // planes
            part = packed[..., start : start + count].to(torch.int32)
            shape = (tile, size // planes) if token_major else (size // planes, tile)
            part = part.view(tiles, heads, *shape)
            part = part if token_major else part.transpose(2, 3)
            places = torch.arange(planes, device=packed.device, dtype=torch.int32) * width
            codes = (part[..., None, :] >> places[:, None]) & (2**width - 1)  # [tiles, KH, tile, planes, D / planes]
            rows |= codes.reshape(tiles, heads, tile, size) << shift
            start, shift = start + count, shift + width
    return rows.transpose(1, 2).reshape(tiles * tile, heads, size).to(torch.uint8)


def pack_meta(
    key_scale: Tensor, key_mid: Tensor, value_scale: Tensor, value_mid: Tensor, retained: Tensor, tile: int
) -> Tensor:
    """Words of metadata bytes [T, KH, G] and flags bool [T]: int32 [T / tile, KH, G * tile]."""
    flag = torch.zeros_like(key_scale)
    flag[..., 0] = retained[:, None].to(torch.uint8) * RETAINED_FLAG
    words = torch.stack([key_scale | flag, key_mid, value_scale, value_mid], -1).view(torch.int32)[..., 0]  # [T, KH, G]
    tokens, heads, groups = words.shape
    return words.view(tokens // tile, tile, heads, groups).permute(0, 2, 3, 1).reshape(tokens // tile, heads, groups * tile)


def unpack_meta(words: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inverse of ``pack_meta``: four float32 [T, KH, G] (in units) and the flags bool [T]."""
    tiles, heads, count = words.shape
    rows = words.view(tiles, heads, count // tile, tile).permute(0, 3, 1, 2).reshape(tiles * tile, heads, count // tile)
    parts = rows.flatten().view(torch.uint8).view(*rows.shape, 4)  # flat: of a size of 1 any stride counts as contiguous
    retained = (parts[:, 0, 0, 0] & RETAINED_FLAG) != 0
    key_scale = e4m3_decode((parts[..., 0] & 0x7F).contiguous())
    key_mid, value_scale, value_mid = (e4m3_decode(parts[..., i].contiguous()) for i in (1, 2, 3))
    return key_scale, key_mid, value_scale, value_mid, retained


def tile_index(layout: PageLayout, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Page and tile within the page of each tile of tokens ``first .. first+count-1``, int64 [count / tile] each."""
    assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
    tiles = torch.arange(first // layout.tile, (first + count) // layout.tile, device=page_row.device)
    return page_row[tiles // layout.tiles].long(), tiles % layout.tiles


def _write(pages: PackedPages, page_row: Tensor, first: int, key_codes: Tensor, value_codes: Tensor, words: Tensor) -> None:
    layout, count = pages.layout, key_codes.shape[0]
    page, tile = tile_index(layout, page_row, first, count)
    blocks = (
        (pages.key_codes, pack_codes(key_codes, layout.key_bits, layout.tile, token_major=True)),
        (pages.value_codes, pack_codes(value_codes, layout.value_bits, layout.tile, token_major=False)),
        (pages.meta, words),
    )
    for target, block in blocks:
        target.view(*target.shape[:2], layout.tiles, -1)[page, :, tile] = block


def _read(pages: PackedPages, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    layout, size = pages.layout, pages.layout.head_size
    page, tile = tile_index(layout, page_row, first, count)
    key, value, words = (
        t.view(*t.shape[:2], layout.tiles, -1)[page, :, tile] for t in (pages.key_codes, pages.value_codes, pages.meta)
    )
    return (
        unpack_codes(key, layout.key_bits, layout.tile, size, token_major=True),
        unpack_codes(value, layout.value_bits, layout.tile, size, token_major=False),
        words,
    )


# --- groups by head: rotate, plain ----------------------------------------------------------------------------------------


def rotary(x: Tensor, positions: Tensor, rope: RopeFrequencies, *, inverse: bool = False) -> Tensor:
    """Turn ``x`` [T, heads, D] by its positions [T] (inverse: back, scale undone), float32. Angles in float64."""
    angle = positions.to(rope.inv_freq.device, torch.float64)[:, None, None] * rope.inv_freq  # [T, 1, D/2]
    factor = 1 / rope.scale if inverse else rope.scale
    cos, sin = (angle.cos() * factor).float(), (angle.sin() * (-factor if inverse else factor)).float()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def encode_heads(codec: HeadCodec, first: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Stored basis of keys after RoPE and values, [T, KH, D]: float32, ready to be quantized."""
    k, v = keys.float(), values.float()
    if not codec.has_basis:
        return k, v
    if codec.has_key_mean:
        k = k - _turned_mean(codec, first, len(k))
    k = torch.einsum("hij,thj->thi", codec.key_basis, k)
    return k, torch.einsum("hij,thj->thi", codec.value_basis, v - codec.value_mean)


def _turned_mean(codec: HeadCodec, first: int, count: int) -> Tensor:
    positions = torch.arange(first, first + count, device=codec.key_mean.device)
    return rotary(codec.key_mean.expand(count, -1, -1), positions, codec.rope)


def quantize_heads(y: Tensor, bits: float, side: HeadSide) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [T, KH, D] and scale and mid bytes [T, KH, G] of ``y`` [T, KH, D]."""
    tokens, heads, size = y.shape
    groups = side.unit.shape[1]
    if side.has_metric:
        return quantize_lattice(y, LEVELS[bits], side)
    codes, scale, mid = quantize(y.view(tokens, heads, groups, size // groups), LEVELS[bits], side.unit, side.clip)
    return codes.view(tokens, heads, size), scale, mid


def pack_heads(
    pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
) -> None:
    layout = pages.layout
    y_keys, y_values = encode_heads(codec, first, keys, values)
    key_codes, key_scale, key_mid = quantize_heads(y_keys, layout.key_bits, codec.keys)
    value_codes, value_scale, value_mid = quantize_heads(y_values, layout.value_bits, codec.values)
    words = pack_meta(key_scale, key_mid, value_scale, value_mid, retained, layout.tile)
    _write(pages, page_row, first, key_codes, value_codes, words)


def read_heads(pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stored keys and values [T, KH, D] float32 in the stored basis, and the retained flags bool [T]."""
    layout = pages.layout
    key_codes, value_codes, words = _read(pages, page_row, first, count)
    key_scale, key_mid, value_scale, value_mid, retained = unpack_meta(words, layout.tile)
    shape = (count, layout.kv_heads, layout.groups, layout.group_size)
    y_keys, y_values = (
        dequantize(codes.view(shape), scale * side.unit, mid * side.unit, LEVELS[bits]).view(
            count, layout.kv_heads, layout.head_size
        )
        for codes, scale, mid, side, bits in (
            (key_codes, key_scale, key_mid, codec.keys, layout.key_bits),
            (value_codes, value_scale, value_mid, codec.values, layout.value_bits),
        )
    )
    return y_keys, y_values, retained


def unpack_heads(pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    keys, values, _ = read_heads(pages, codec, page_row, first, count)
    if codec.has_basis:
        keys = torch.einsum("hij,thi->thj", codec.query_basis, keys)  # query_basis^T x
        if codec.has_key_mean:
            keys = keys + _turned_mean(codec, first, count)
        values = torch.einsum("hij,thj->thi", codec.output_basis, values) + codec.value_mean
    return keys, values


# --- groups by label: reorder -----------------------------------------------------------------------------------------------


def quantize_labels(y: Tensor, bits: float, side: Side, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [T, C] and scale and mid bytes [T, groups] of ``y`` [T, C], each channel with the group its label names."""
    tokens = len(y)
    groups = len(side.unit)
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    scale, mid = (torch.empty(tokens, groups, dtype=torch.uint8, device=y.device) for _ in range(2))
    for group in range(groups):
        channels = (labels == group).nonzero()[:, 0]
        assert len(channels), f"group {group} has no channel"
        codes[:, channels], scale[:, group], mid[:, group] = quantize(
            y[:, channels], LEVELS[bits], side.unit[group], side.clip[group]
        )
    return codes, scale, mid


def pack_labels(
    pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
) -> None:
    layout, count = pages.layout, len(keys)
    positions = torch.arange(first, first + count, device=keys.device)
    flat_keys = rotary(keys, positions, codec.rope, inverse=True).reshape(count, -1)
    key_codes, key_scale, key_mid = quantize_labels(flat_keys, layout.key_bits, codec.keys, codec.key_labels)
    value_codes, value_scale, value_mid = quantize_labels(
        values.float().reshape(count, -1), layout.value_bits, codec.values, codec.value_labels
    )
    by_head = (count, layout.kv_heads, layout.groups)
    key_scale, key_mid, value_scale, value_mid = (t.view(by_head) for t in (key_scale, key_mid, value_scale, value_mid))
    words = pack_meta(key_scale, key_mid, value_scale, value_mid, retained, layout.tile)
    shape = (count, layout.kv_heads, layout.head_size)
    _write(pages, page_row, first, key_codes.view(shape), value_codes.view(shape), words)


def read_labels(
    pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys before RoPE and values [T, KH, D] float32, and the retained flags bool [T]."""
    layout = pages.layout
    key_codes, value_codes, words = _read(pages, page_row, first, count)
    key_scale, key_mid, value_scale, value_mid, retained = unpack_meta(words, layout.tile)
    y_keys, y_values = (
        dequantize(
            codes.reshape(count, len(labels), 1),
            (scale.reshape(count, len(side.unit)) * side.unit)[:, labels],
            (mid.reshape(count, len(side.unit)) * side.unit)[:, labels],
            LEVELS[bits],
        ).view(count, layout.kv_heads, layout.head_size)
        for codes, scale, mid, side, labels, bits in (
            (key_codes, key_scale, key_mid, codec.keys, codec.key_labels, layout.key_bits),
            (value_codes, value_scale, value_mid, codec.values, codec.value_labels, layout.value_bits),
        )
    )
    return y_keys, y_values, retained


def unpack_labels(pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    keys, values, _ = read_labels(pages, codec, page_row, first, count)
    positions = torch.arange(first, first + count, device=keys.device)
    return rotary(keys, positions, codec.rope), values


# --- attention ----------------------------------------------------------------------------------------------------------------


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v of ``q`` [N, H, D] over k, v [T, KH, D] where ``visible`` bool [N, T]; float32.

    Returns the output [N, H, D] and the log-sum-exp [N, H]; zeros and -inf where a query sees nothing.
    """
    count, heads, size = q.shape
    q = q.float().view(count, k.shape[1], heads // k.shape[1], size)
    score = torch.einsum("nhrd,thd->nhrt", q, k.float()) / math.sqrt(size)
    score = score.masked_fill(~visible[:, None, None, :], -torch.inf)
    lse = score.logsumexp(-1)
    weight = torch.exp(score - lse.clamp_min(torch.finfo(torch.float32).min)[..., None])
    out = torch.einsum("nhrt,thd->nhrd", weight, v.float())
    return out.reshape(count, heads, size), lse.reshape(count, heads)


def _attend(
    q: Tensor, full: FullSlots, step: Step, packed_of_row: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Attend each row of the batch over its packed keys, values and retained flags and its full-precision slots."""
    outs, lses = [], []
    for row, (keys, values, retained) in enumerate(packed_of_row):
        slot = int(step.slots[row])
        t = step.positions[row][:, None].long()  # [N, 1]
        at = torch.arange(len(keys), device=q.device)[None]
        held = full.positions[slot].long()[None]  # [1, F]
        visible = torch.cat([~retained[None] & (t - at < step.span), (held >= 0) & (held <= t) & (t - held < step.span)], 1)
        k = torch.cat([keys, full.keys[slot].transpose(0, 1).float()])
        v = torch.cat([values, full.values[slot].transpose(0, 1).float()])
        # an empty slot may hold anything, and 0 * inf is not 0
        seen = visible.any(0)
        out, lse = masked_attention(q[row], k[seen], v[seen], visible[:, seen])
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs).to(q.dtype), torch.stack(lses)


def attend_heads(q: Tensor, pages: PackedPages, codec: HeadCodec, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
    rows = []
    for row, slot in enumerate(step.slots.tolist()):
        count = int(step.packed[row])
        table = step.page_table[slot]
        retained = read_heads(pages, codec, table, 0, count)[2]
        rows.append((*unpack_heads(pages, codec, table, 0, count), retained))
    return _attend(q, full, step, rows)


def attend_labels(q: Tensor, pages: PackedPages, codec: LabelCodec, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
    rows = []
    for row, slot in enumerate(step.slots.tolist()):
        count = int(step.packed[row])
        table = step.page_table[slot]
        retained = read_labels(pages, codec, table, 0, count)[2]
        rows.append((*unpack_labels(pages, codec, table, 0, count), retained))
    return _attend(q, full, step, rows)


def attend_plain(q: Tensor, pages: PlainPages, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
    rows = []
    for row, slot in enumerate(step.slots.tolist()):
        count = int(step.packed[row])
        table = step.page_table[slot].long()
        used = table[: -(-count // pages.keys.shape[2])]
        keys, values = (t[used].transpose(1, 2).flatten(0, 1)[:count] for t in (pages.keys, pages.values))
        rows.append((keys.float(), values.float(), torch.zeros(count, dtype=torch.bool, device=q.device)))
    return _attend(q, full, step, rows)


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax from partial ones: outputs [..., D] and float32 log-sum-exps [...] over disjoint sets of tokens; float32."""
    total = torch.stack(lses).logsumexp(0)
    finite = total.clamp_min(torch.finfo(torch.float32).min)
    out = sum(out * torch.exp(lse - finite)[..., None] for out, lse in zip(outs, lses, strict=True))
    assert isinstance(out, Tensor)
    return out, total


class Reference:
    """The specification as a backend: any device, no speed."""

    name = "reference"
    pack_heads = staticmethod(pack_heads)
    pack_labels = staticmethod(pack_labels)
    unpack_heads = staticmethod(unpack_heads)
    unpack_labels = staticmethod(unpack_labels)
    attend_heads = staticmethod(attend_heads)
    attend_labels = staticmethod(attend_labels)
    attend_plain = staticmethod(attend_plain)
