# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RET505
"""Keys and values before packing: means are subtracted and the basis applied (``reference.encode_heads``), in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.interface import HeadCodec
from skvq.kernels.triton_gpu.forms import VARYING
from skvq.kernels.triton_gpu.prepare import bfloat_parts
from skvq.kernels.triton_gpu.workspace import RopeTables

TOKENS = tl.constexpr(32)  # of a program; tiles are whole numbers of them
COLUMNS = tl.constexpr(32)  # of the stored basis at a time


@triton.jit
def precise_dot(a, b, WIDE: tl.constexpr):
    """``a b`` to float32's precision on tensor cores: each number is cut into three bfloat16 numbers, so any range will do."""
    if WIDE:
        return tl.dot(a, b, input_precision="ieee")
    else:
        x, y = bfloat_parts(a, 3), bfloat_parts(b, 3)
        acc = tl.dot(x[2], y[0])
        acc = tl.dot(x[1], y[1], acc)
        acc = tl.dot(x[0], y[2], acc)
        acc = tl.dot(x[1], y[0], acc)
        acc = tl.dot(x[0], y[1], acc)
        return tl.dot(x[0], y[0], acc)


@triton.jit
def turned_mean(mean, turn_ptr, place_ptr, tile, place, other, rope_scale, D: tl.constexpr):
    """One half of the key mean after RoPE, [TOKENS, D / 2]: ``other`` is -1 for the first half of the channels and 1 for the
    other.

    The angle of a token is that of its tile's first token (row ``tile`` of ``turn``) plus that of its place in the tile (rows
    ``place`` [TOKENS] of ``place_ptr``).
    """
    j = tl.arange(0, D // 2)
    base_cos, base_sin = tl.load(turn_ptr + tile * D + j)[None, :], tl.load(turn_ptr + tile * D + D // 2 + j)[None, :]
    at = place_ptr + place[:, None] * D + j[None, :]
    cos, sin = tl.load(at), tl.load(at + D // 2)
    cos, sin = base_cos * cos - base_sin * sin, base_sin * cos + base_cos * sin
    a, b = tl.load(mean + j)[None, :], tl.load(mean + D // 2 + j)[None, :]
    return (tl.where(other < 0, a, b) * cos + other * tl.where(other < 0, b, a) * sin) * rope_scale


@triton.jit
def store_product(out, basis, a, b, inside, D: tl.constexpr, WIDE: tl.constexpr):
    """Write ``basis x`` to ``out``; x comes as its first and last D / 2 channels, ``a`` and ``b`` [TOKENS, D / 2]."""
    for start in range(0, D, COLUMNS):
        n = (start + tl.arange(0, COLUMNS))[None, :]
        matrix = basis + n * D + tl.arange(0, D // 2)[:, None]
        y = precise_dot(a, tl.load(matrix), WIDE) + precise_dot(b, tl.load(matrix + D // 2), WIDE)
        tl.store(out + n, y, mask=inside)


@triton.jit(**VARYING)
def encode_kernel(
    key_ptr, value_ptr, key_mean_ptr, value_mean_ptr, key_basis_ptr, value_basis_ptr, turn_ptr, place_ptr,
    key_out_ptr, value_out_ptr, first, tokens, tile_tokens, heads, rope_scale,
    stride_key, stride_value, stride_key_head, stride_value_head,
    D: tl.constexpr, HAS_MEAN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``basis (x - mean)`` of TOKENS tokens of one head. Programs with index 0 on axis 2 do the keys, those with 1 the values.

    ``key`` and ``value`` are [T, KH, D] in 16 bits, the outputs float32 [T, KH, D]; ``turn`` and ``place`` are tables of
    ``workspace.RopeTables``. Reads 2 and writes 4 bytes a number, and reads one [D, D] matrix a program.
    """
    HALF: tl.constexpr = D // 2
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    inside = (t < tokens)[:, None]
    row = t.to(tl.int64)[:, None]
    out = (row * heads + head) * D
    j = tl.arange(0, HALF)[None, :]
    if tl.program_id(2) == 0:
        at = key_ptr + row * stride_key + head * stride_key_head + j
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        if HAS_MEAN:
            tile = (first + tl.program_id(0) * TOKENS) // tile_tokens
            place = (first + t) % tile_tokens
            mean = key_mean_ptr + head * D
            a -= turned_mean(mean, turn_ptr, place_ptr, tile, place, -1.0, rope_scale, D)
            b -= turned_mean(mean, turn_ptr, place_ptr, tile, place, 1.0, rope_scale, D)
        store_product(key_out_ptr + out, key_basis_ptr + head * D * D, a, b, inside, D, WIDE)
    else:
        at = value_ptr + row * stride_value + head * stride_value_head + j
        middle = value_mean_ptr + head * D + j
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32) - tl.load(middle)
        b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32) - tl.load(middle + HALF)
        store_product(value_out_ptr + out, value_basis_ptr + head * D * D, a, b, inside, D, WIDE)


def encode_heads(
    codec: HeadCodec, first: int, keys: Tensor, values: Tensor, tables: RopeTables | None, tile: int, wide: bool
) -> tuple[Tensor, Tensor]:
    """Keys and values [T, KH, D], 16 bits, token ``first`` first, in the stored basis: two new tensors float32 [T, KH, D].

    ``tables`` are those of tiles of ``tile`` tokens; None only where the codec has no key mean. ``wide``: WIDE of the kernel.
    """
    tokens, heads, size = keys.shape
    assert keys.stride(2) == values.stride(2) == 1 and values.shape == keys.shape, (keys.stride(), values.stride())
    assert tile % TOKENS.value == 0 and first % tile == 0, (first, tile)
    out = [torch.empty(tokens, heads, size, dtype=torch.float32, device=keys.device) for _ in range(2)]
    turn, places, scale = (tables.turn[6:], tables.places, tables.scale) if tables else (out[0], out[0], 1.0)
    encode_kernel[(triton.cdiv(tokens, TOKENS.value), heads, 2)](
        keys, values, codec.key_mean, codec.value_mean, codec.key_basis, codec.value_basis, turn, places, *out,
        first, tokens, tile, heads, scale, keys.stride(0), values.stride(0), keys.stride(1), values.stride(1),
        D=size, HAS_MEAN=codec.has_key_mean, WIDE=wide, num_warps=4,
    )  # fmt: skip
    return out[0], out[1]
