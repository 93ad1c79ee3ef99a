# mypy: ignore-errors
# ruff: noqa: N803, RET505, RUF005
"""Bytes of codes to float16 planes for the tensor cores, without one integer-to-float conversion.

**A code is a subnormal.** Left in the low mantissa bits of a half, a code IS the number ``code * 2^-24``: unpacking is a mask.

**Bytes 1 and 2 of every four change places** (``perm4``). The assembly takes four bytes b0 .. b3 as one word and cuts it into
the 16-bit lanes (b0, b2) and (b1, b3). Both products of attention absorb that at no cost: for keys the rows of q are stored in
that order, for values the tokens of the scores are loaded in it. It is right only where four registers hold four neighbours of
a row, which is the compiler's choice; ``tests/test_triton_sass.py`` sees what it chose. The portable form (not ASM) keeps the
order of the bytes.

**Cumulative planes of 2 bits.** A field together with all below it, ``x & (4^(p+1) - 1)``, saves a mask a word. For keys,
differences of the rows of q undo it; for values, differences of the sums.

**Trits.** Planes are prefixes: ``D_k = 3 D_(k-1) + t_k = byte * 3^k >> 8`` is one multiplication and one byte permutation,
where a trit alone would take three. Undone by ``score_k = Z_k - 3 Z_(k-1)`` for keys, and for values by weights ``P_k - 3
P_(k+1)``, which take two halves each.

**Normal planes.** The same bits under the exponent of 1024, less ``1024 + offset``: the exact integer ``code - offset``,
around zero. Values of 4 and 8 bits are better off with them.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _mask_assembly(bits: int, cumulative: bool, exponent: int = 0) -> str:
    """PTX that cuts one word into 8 / bits planes: two registers each, of lanes (b0, b2), then of lanes (b1, b3).

    ``exponent`` is put above every field: 0x6400 makes normal numbers of 1024 and more.
    """
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
    """PTX that makes the prefixes D_1 .. D_5 of the bytes of one word: two registers each, as in ``_mask_assembly``."""
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
ASM_4_NORMAL = tl.constexpr(_mask_assembly(4, False, 0x6400))
ASM_8_NORMAL = tl.constexpr(_mask_assembly(8, False, 0x6400))
ASM_TRIT = tl.constexpr(_trit_assembly())
REGS_1 = tl.constexpr("=r," * 16 + "r")
REGS_2 = tl.constexpr("=r," * 8 + "r")
REGS_4 = tl.constexpr("=r," * 4 + "r")
REGS_8 = tl.constexpr("=r," * 2 + "r")
REGS_TRIT = tl.constexpr("=r," * 10 + "r")


@triton.jit
def perm4(i, ASM: tl.constexpr):
    """Which byte stands at place ``i`` after the assembly: 0, 2, 1, 3 of every four."""
    if ASM:
        return (i & -4) | ((i & 1) << 1) | ((i >> 1) & 1)
    else:
        return i


@triton.jit
def _as_half(x, NORMAL: tl.constexpr):
    """The bits of ``x`` as those of a half: a subnormal, or with NORMAL 1024 and more."""
    bits = x.to(tl.uint16) | 0x6400 if NORMAL else x.to(tl.uint16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def _planes_1(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_1, REGS_1, [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
            tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        out = ()
        for p in tl.static_range(8):
            out = out + (_as_half(x & (1 << p), False),)
        return out


@triton.jit
def _planes_2(x, CUMULATIVE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if CUMULATIVE:
            return tl.inline_asm_elementwise(
                ASM_2_CUMULATIVE, REGS_2, [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                ASM_2, REGS_2, [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
    else:
        if CUMULATIVE:
            return (_as_half(x & 0x03, False), _as_half(x & 0x0F, False), _as_half(x & 0x3F, False), _as_half(x, False))
        else:
            return (_as_half(x & 0x03, False), _as_half(x & 0x0C, False), _as_half(x & 0x30, False), _as_half(x & 0xC0, False))


@triton.jit
def _planes_4(x, NORMAL: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_4_NORMAL if NORMAL else ASM_4, REGS_4, [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return (_as_half(x & 0x0F, NORMAL), _as_half(x & 0xF0, NORMAL))


@triton.jit
def _planes_8(x, NORMAL: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        asm: tl.constexpr = ASM_8_NORMAL if NORMAL else ASM_8
        return (tl.inline_asm_elementwise(asm, REGS_8, [x], dtype=tl.float16, is_pure=True, pack=4),)
    else:
        return (_as_half(x, NORMAL),)


@triton.jit
def _prefixes(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_TRIT, REGS_TRIT, [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        w = x.to(tl.uint16)
        return (
            _as_half(w * 3 >> 8, False),
            _as_half(w * 9 >> 8, False),
            _as_half(w * 27 >> 8, False),
            _as_half(w * 81 >> 8, False),
            _as_half(w * 243 >> 8, False),
        )


@triton.jit
def planes(x, WIDTH: tl.constexpr, CUMULATIVE: tl.constexpr, NORMAL: tl.constexpr, ASM: tl.constexpr):
    """The planes of the bytes ``x``, float16 each: a tuple of 8 / WIDTH, or for trits (WIDTH 15) of the five prefixes.

    Plane p holds ``field_p * 2^(WIDTH p - 24)``, or if NORMAL ``(field_p - 2^(WIDTH - 1)) * 2^(WIDTH p)``, for 4 and 8 bits.
    """
    if WIDTH == 1:
        raw = _planes_1(x, ASM)
    elif WIDTH == 2:
        raw = _planes_2(x, CUMULATIVE, ASM)
    elif WIDTH == 4:
        raw = _planes_4(x, NORMAL, ASM)
    elif WIDTH == 8:
        raw = _planes_8(x, NORMAL, ASM)
    else:
        raw = _prefixes(x, ASM)
    if NORMAL:
        tl.static_assert(WIDTH == 4 or WIDTH == 8)
        out = ()
        for p in tl.static_range(len(raw)):
            out = out + (raw[p] - (1024.0 + 2 ** (WIDTH - 1) * (1 << (WIDTH * p))),)
        return out
    else:
        return raw


@triton.constexpr_function
def has_normal_planes(bits):
    """Whether values of ``bits`` bits are loaded as NORMAL planes; keys never are."""
    return bits == 4 or bits == 8


@triton.jit
def pair_rows(x):
    """Every two planes [8, n] as one [16, n], as the tensor core wants it: row ``2 b + i`` is row b of plane i of the two.

    For values of 3 bits at head size 64, whose single bits lie in eight bytes a token.
    """
    out = ()
    for p in tl.static_range(len(x) // 2):
        both = tl.join(x[2 * p], x[2 * p + 1])
        out = out + (tl.reshape(tl.permute(both, (0, 2, 1)), [16, x[0].shape[1]]),)
    return out
