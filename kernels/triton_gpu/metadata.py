# mypy: ignore-errors
# ruff: noqa: N803, RET505
"""Metadata words taken apart: the four E4M3 bytes of a token and group, scale and mid of keys, then of values."""

from __future__ import annotations

import triton
import triton.language as tl


def _meta_assembly(selector: str) -> str:
    """Two E4M3 bytes of a word to the halves with the same sign and the value times 2^-8."""
    return (
        f"{{ .reg .b32 x, u; prmt.b32 x, $1, 0, {selector}; shr.u32 u, x, 1; and.b32 u, u, 0x3F803F80; "
        "lop3.b32 $0, x, 0x80008000, u, 0xEA; }"
    )


def _halves_assembly(scale: str, mid: str, *, flagged: bool) -> str:
    """Scales, then mids, of two words to pairs of halves with the same value times 2^-8.

    A byte and its sign eight times over, moved up by seven bits, is the half but for bits of the sign. Scales have none, but
    those of keys a flag in its place: ``flagged``.
    """
    keep = "and.b32 $0, $0, 0x3F803F80; " if flagged else ""
    return (
        f"{{ .reg .b32 x; prmt.b32 x, $2, $3, {scale}; shl.b32 $0, x, 7; {keep}"
        f"prmt.b32 x, $2, $3, {mid}; shl.b32 x, x, 7; and.b32 $1, x, 0xBF80BF80; }}"
    )


ASM_HALVES_LOW = tl.constexpr(_halves_assembly("0xC480", "0xD591", flagged=True))
ASM_HALVES_HIGH = tl.constexpr(_halves_assembly("0xE6A2", "0xF7B3", flagged=False))
ASM_META_LOW = tl.constexpr(_meta_assembly("0x1404"))
ASM_META_HIGH = tl.constexpr(_meta_assembly("0x3424"))
ASM_FP8_LOW = tl.constexpr("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; cvt.rn.f16x2.e4m3x2 $0, lo; }")
ASM_FP8_HIGH = tl.constexpr("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; cvt.rn.f16x2.e4m3x2 $0, hi; }")


@triton.jit
def metadata(word, VALUES: tl.constexpr, ASM: tl.constexpr, FP8: tl.constexpr):
    """Words of E4M3 bytes -> scale and mid of the keys or of the values, float32, each times 2^-8 (times 1 if FP8).

    The retained flag makes the key scale negative. FP8: the card converts E4M3 itself (sm_89 and later).
    """
    if FP8:
        if VALUES:
            both = tl.inline_asm_elementwise(ASM_FP8_HIGH, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
        else:
            both = tl.inline_asm_elementwise(ASM_FP8_LOW, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    elif ASM:
        if VALUES:
            both = tl.inline_asm_elementwise(ASM_META_HIGH, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
        else:
            both = tl.inline_asm_elementwise(ASM_META_LOW, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:
        if VALUES:
            both = ((word >> 9) & 0x3F80) | ((word >> 8) & 0x8000) | ((word >> 1) & 0x3F800000) | (word & -0x80000000)
        else:
            both = ((word & 0x7F) << 7) | ((word & 0x80) << 8) | ((word & 0x7F00) << 15) | ((word & 0x8000) << 16)
    return _low_half(both), _high_half(both)


@triton.jit
def _low_half(x):
    return (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _high_half(x):
    return (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def meta_halves(word, VALUES: tl.constexpr, ASM: tl.constexpr):
    """``metadata`` in fp16, times 2^-8 on every card, without the retained flag."""
    if ASM:
        asm: tl.constexpr = ASM_HALVES_HIGH if VALUES else ASM_HALVES_LOW
        return tl.inline_asm_elementwise(asm, "=r,=r,r,r", [word], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        low = word >> 16 if VALUES else word
        scale, mid = (low & 0x7F) << 7, ((low & 0x7F00) >> 1) | (low & 0x8000)
        return scale.to(tl.int16).to(tl.float16, bitcast=True), mid.to(tl.int16).to(tl.float16, bitcast=True)
