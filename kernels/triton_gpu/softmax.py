# mypy: ignore-errors
# ruff: noqa: N803, RET505
"""What every softmax here needs: it is taken in base 2, and a score of NEVER stands for a token that is not seen."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(-1.0e30)


@triton.jit
def exp2(x, ASM: tl.constexpr):
    """2^x. One instruction with ASM; ``tl.exp2`` takes three more, for results that are subnormal."""
    if ASM:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)
