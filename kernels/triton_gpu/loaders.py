# mypy: ignore-errors
# ruff: noqa: N803, RET505, RUF005
"""Tile loaders: bytes of codes -> fp16 planes for the tensor cores, without one integer-to-float conversion.

A code left in the low mantissa bits of a half IS the number ``code * 2^-24`` (a subnormal), so unpacking is a mask. The
assembly forms take four bytes b0..b3 as one word and cut it into the 16-bit lanes ``(b0, b2)`` and ``(b1, b3)``: the planes
come out with **bytes 1 and 2 of every four exchanged** (``perm4``). Both contractions absorb that for nothing: rows of q are
stored in that order (keys), tokens of the scores are loaded in that order (values). That is right only where four registers
hold four neighbours of a row, which is the compiler's choice: ``tests/test_ptx.py`` sees what it chose. The portable form
(``ASM`` false: the interpreter has no assembly) keeps the order of the bytes.

Planes of 2 bits may be CUMULATIVE, a field with all below it, ``x & (4^(p+1) - 1)``: one mask less a word; it is undone by
differences of q (keys) or of accumulators (values). Planes of trits are the prefixes ``D_k = 3 D_(k-1) + t_k`` =
``byte * 3^k >> 8``: one multiplication and one byte permutation, where cutting a trit out takes three; undone by
``score_k = Z_k - 3 Z_(k-1)`` (keys) and by the weights ``P_k - 3 P_(k+1)`` in two halves (values).

NORMAL planes are the fallback for tensor cores that flush subnormals, and the better choice for values of 4 and 8 bits: the
same bits under the exponent of 1024, less ``1024 + offset``, hence the exact integer ``code - offset`` around zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _mask_assembly(bits: int, cumulative: bool, exponent: int = 0) -> str:
    """Planes of ``bits`` bits of one word: even lanes, then odd lanes of each plane, ``exponent`` put above each."""
    planes = 8 // bits
    lines = [f"prmt.b32 odd, ${2 * planes}, 0, 0x4341;", f"and.b32 even, ${2 * planes}, 0x00FF00FF;"]
    for p in range(planes):
        low = 0 if cumulative else bits * p
        mask = ((1 << bits * (p + 1)) - (1 << low)) * 0x00010001
        for lane, name in enumerate(("even", "odd")):
            # the word itself serves the even lanes: the mask cuts the neighbour off as well
            source = f"${2 * planes}" if name == "even" else name
            if exponent:
                line = f"lop3.b32 ${2 * p + lane}, {source}, 0x{mask:08X}, 0x{exponent * 0x00010001:08X}, 0xEA;"
            elif mask == 0x00FF00FF:
                line = f"mov.b32 ${2 * p + lane}, {name};"
            else:
                line = f"and.b32 ${2 * p + lane}, {source}, 0x{mask:08X};"
            lines.append(line)
    return "{ .reg .b32 even, odd; " + " ".join(lines) + " }"


def _trit_assembly() -> str:
    """Prefixes D_1 .. D_5 of the five trits of each byte of one word."""
    lines = ["and.b32 even, $10, 0x00FF00FF;", "prmt.b32 odd, $10, 0, 0x4341;"]
    for k in range(5):
        for lane, name in enumerate(("even", "odd")):
            lines += [f"mul.lo.u32 t, {name}, {3 ** (k + 1)};", f"prmt.b32 ${2 * k + lane}, t, 0, 0x4341;"]
    return "{ .reg .b32 even, odd, t; " + " ".join(lines) + " }"


ASM_1 = tl.constexpr(_mask_assembly(1, False))
ASM_2 = tl.constexpr(_mask_assembly(2, False))
ASM_2_CUMULATIVE = tl.constexpr(_mask_assembly(2, True))
ASM_4 = tl.constexpr(_mask_assembly(4, False))
ASM_8 = tl.constexpr(_mask_assembly(8, False))
ASM_1_NORMAL = tl.constexpr(_mask_assembly(1, False, 0x6400))
ASM_2_NORMAL = tl.constexpr(_mask_assembly(2, False, 0x6400))
ASM_4_NORMAL = tl.constexpr(_mask_assembly(4, False, 0x6400))
ASM_8_NORMAL = tl.constexpr(_mask_assembly(8, False, 0x6400))
ASM_TRIT = tl.constexpr(_trit_assembly())


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
REGS_1 = tl.constexpr("=r," * 16 + "r")
REGS_2 = tl.constexpr("=r," * 8 + "r")
REGS_4 = tl.constexpr("=r," * 4 + "r")
REGS_8 = tl.constexpr("=r," * 2 + "r")
REGS_TRIT = tl.constexpr("=r," * 10 + "r")


@triton.jit
def perm4(i, ASM: tl.constexpr):
    """The byte that stands at place ``i`` after an assembly loader: 0, 2, 1, 3 in every four."""
    if ASM:
        return (i & -4) | ((i & 1) << 1) | ((i >> 1) & 1)
    else:
        return i


@triton.jit
def _half(x, NORMAL: tl.constexpr):
    bits = x.to(tl.uint16) | 0x6400 if NORMAL else x.to(tl.uint16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def _planes_1(x, NORMAL: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_1_NORMAL if NORMAL else ASM_1, REGS_1, [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
            tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        out = ()
        for p in tl.static_range(8):
            out = out + (_half(x & (1 << p), NORMAL),)
        return out


@triton.jit
def _planes_2(x, CUMULATIVE: tl.constexpr, NORMAL: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if CUMULATIVE:
            return tl.inline_asm_elementwise(
                ASM_2_CUMULATIVE, REGS_2, [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                ASM_2_NORMAL if NORMAL else ASM_2, REGS_2, [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=4,
            )  # fmt: skip
    else:
        if CUMULATIVE:
            return (_half(x & 0x03, False), _half(x & 0x0F, False), _half(x & 0x3F, False), _half(x, False))
        else:
            return (_half(x & 0x03, NORMAL), _half(x & 0x0C, NORMAL), _half(x & 0x30, NORMAL), _half(x & 0xC0, NORMAL))


@triton.jit
def _planes_4(x, NORMAL: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_4_NORMAL if NORMAL else ASM_4, REGS_4, [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return (_half(x & 0x0F, NORMAL), _half(x & 0xF0, NORMAL))


@triton.jit
def _planes_8(x, NORMAL: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        asm: tl.constexpr = ASM_8_NORMAL if NORMAL else ASM_8
        return (tl.inline_asm_elementwise(asm, REGS_8, [x], dtype=tl.float16, is_pure=True, pack=4),)
    else:
        return (_half(x, NORMAL),)


@triton.jit
def _prefixes(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_TRIT, REGS_TRIT, [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        w = x.to(tl.uint16)
        return (
            _half(w * 3 >> 8, False),
            _half(w * 9 >> 8, False),
            _half(w * 27 >> 8, False),
            _half(w * 81 >> 8, False),
            _half(w * 243 >> 8, False),
        )


@triton.jit
def planes(x, WIDTH: tl.constexpr, OFFSET: tl.constexpr, CUMULATIVE: tl.constexpr, NORMAL: tl.constexpr, ASM: tl.constexpr):
    """Tuple of fp16 planes of the bytes ``x``: 8 / WIDTH of them, or the five prefixes of trits (WIDTH 15).

    Plane p holds ``(field_p - OFFSET) * 2^(WIDTH p)`` if NORMAL, else ``field_p * 2^(WIDTH p - 24)``.
    """
    if WIDTH == 1:
        raw = _planes_1(x, NORMAL, ASM)
    elif WIDTH == 2:
        raw = _planes_2(x, CUMULATIVE, NORMAL, ASM)
    elif WIDTH == 4:
        raw = _planes_4(x, NORMAL, ASM)
    elif WIDTH == 8:
        raw = _planes_8(x, NORMAL, ASM)
    else:
        raw = _prefixes(x, ASM)
    if NORMAL:
        out = ()
        for p in tl.static_range(len(raw)):
            x = raw[p]
            if WIDTH == 15:
                x = (x.to(tl.uint16, bitcast=True) | 0x6400).to(tl.float16, bitcast=True)
            out = out + (x - (1024.0 + OFFSET * (1 if WIDTH == 15 else 1 << (WIDTH * p))),)
        return out
    else:
        return raw


@triton.jit
def pair_rows(x):
    """Pairs of planes of 8 rows (values of 3 bits, head size 64) become one of 16: row ``2 b + i`` is row b of plane i."""
    out = ()
    for p in tl.static_range(len(x) // 2):
        both = tl.join(x[2 * p], x[2 * p + 1])
        out = out + (tl.reshape(tl.permute(both, (0, 2, 1)), [16, x[0].shape[1]]),)
    return out


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
