# mypy: ignore-errors
# ruff: noqa: N803, RET505
"""Codes as float16 subnormals that can be multiplied by a scale at once: high in the mantissa, bytes in their own order.

A field whose lowest bit is bit b of a half is the number ``field * 2^(b - 24)``, exactly, so a fused multiply-add can take it
as it is. With b >= 4, and scales below 2^16, the product keeps the 11 bits of a half. Bytes keep their order, unlike those of
``loaders``: here registers follow the layout of a tensor core's sums, where four bytes of a word are no neighbours of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.loaders import REGS_2, REGS_4, REGS_8


def _raised_assembly(bits: int) -> str:
    """PTX that cuts one word into 8 / bits planes: two registers each, of the word's lower two bytes, then of its upper two."""
    count = 8 // bits
    lines = []
    for name, selector in (("low", "0x4140"), ("high", "0x4342")):
        lines += [f"prmt.b32 {name}, ${2 * count}, 0, {selector};", f"shl.b32 {name}_up, {name}, {3 if bits == 8 else 4};"]
    for p in range(count):
        mask = ((1 << bits) - 1 << (3 if bits == 8 else 4 + bits * p % 4)) * 0x00010001
        for lane, name in enumerate(("low", "high")):
            lines.append(f"and.b32 ${2 * p + lane}, {name if bits * p >= 4 else name + '_up'}, 0x{mask:08X};")
    return "{ .reg .b32 low, high, low_up, high_up; " + " ".join(lines) + " }"


RAISED_2 = tl.constexpr(_raised_assembly(2))
RAISED_4 = tl.constexpr(_raised_assembly(4))
RAISED_8 = tl.constexpr(_raised_assembly(8))


@triton.jit
def raised_planes(x, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """The planes of the bytes ``x``, fields of 2, 4 or 8 bits, float16: plane p holds ``field_p * raised(WIDTH, p)``."""
    if WIDTH == 2:
        if ASM:
            return tl.inline_asm_elementwise(
                RAISED_2, REGS_2, [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            w = x.to(tl.uint16)
            return _half(w << 4 & 0x30), _half(w << 4 & 0xC0), _half(w & 0x30), _half(w & 0xC0)
    elif WIDTH == 4:
        if ASM:
            return tl.inline_asm_elementwise(RAISED_4, REGS_4, [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4)
        else:
            w = x.to(tl.uint16)
            return _half(w << 4 & 0xF0), _half(w & 0xF0)
    else:
        tl.static_assert(WIDTH == 8)
        if ASM:
            return (tl.inline_asm_elementwise(RAISED_8, REGS_8, [x], dtype=tl.float16, is_pure=True, pack=4),)
        else:
            return (_half(x.to(tl.uint16) << 3),)


@triton.jit
def _half(x):
    return x.to(tl.float16, bitcast=True)


@triton.constexpr_function
def raised(width, plane):
    """What one step of a code is in plane ``plane`` of ``raised_planes``: a power of two."""
    return 2.0 ** ((3 if width == 8 else 4 + width * plane % 4) - 24)


@triton.jit
def load_raised(base, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """``raised_planes`` of the bytes [ROWS, COLUMNS] at ``base``, rows ROW bytes apart."""
    return raised_planes(tl.load(base + (tl.arange(0, ROWS)[:, None] * ROW + tl.arange(0, COLUMNS)[None, :])), WIDTH, ASM)
