"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and later.

Terms used in this folder, besides the letters of ``interface.py`` and the planes of ``layout.py``:

    column    a query head at a query position. The N * H / KH queries that read one kv head are the columns of one product.
    chunk     the columns that one program takes together, NH of them: 4 or 8.
    split     one of the programs among which the tokens of a sequence are divided. Each leaves a partial softmax: a sum of
              weighted values, the maximum of its scores (in base 2) and the sum of its weights. ``combine`` makes one of all.
    part      the tokens that a program takes in one pass of its loop: a tile or half of one.
    share     a fraction of a tile or of a part that one tile of the tensor core covers, usually 32 tokens.
    half      a float16 number. Not to be taken for the two halves of a head that RoPE pairs.
    trits     codes of 1.5 bits, five to a byte. Where bits are whole numbers, 15 stands for them.
    PDL       programmatic dependent launch (``overlap.py``).
    ASM       inline assembly may be used. False under Triton's interpreter, which runs the kernels on the CPU for tests.
    WIDE      dots in float32: also for the interpreter, which has no dot of bfloat16.
"""

from skvq.kernels.triton_gpu.backend import TritonGpu

__all__ = ["TritonGpu"]
