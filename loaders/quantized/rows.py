"""One number of 8 bits for each weight, with a scale for a row, a block of both dimensions, or the whole matrix.

    compressed-tensors  weight int8 or float8, weight_scale       [1], [out] or [out, 1], of blocks [out/b, in/b]
    fp8                 weight float8, weight_scale_inv           of blocks, rounded up
    fbgemm, modelopt    weight float8, weight_scale               as above
    bitsandbytes, 8-bit weight int8, SCB [out]                    the largest weight of the row

int8 is Q8_0; float8 (E4M3) has no blocks that hold it. Scales of 8-bit activations are left alone: we compute in more bits.

Sources: compressed-tensors' ``naive_quantized``, transformers' ``finegrained_fp8``, bitsandbytes' ``Int8Params``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from skvq.kernels.ggml.formats import BLOCK
from skvq.loaders.quantized.scheme import WHOLE_TYPES, Part, Scheme, to_q8_0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Scheme):
    """See the module. ``block``: rows and columns of a block that has a scale; () for a scale of a row or of all."""

    library: str
    is_float: bool  # else int8, whose blocks have multiples of 32 columns
    block: tuple[int, int] | tuple[()] = ()

    @property
    def label(self) -> str:
        return "FP8" if self.is_float else "int8"

    @property
    def kind(self) -> str:
        return "" if self.is_float else "Q8_0"

    @property
    def unit(self) -> int:
        return 1 if self.is_float else BLOCK

    def parts(self, outs: int, ins: int) -> tuple[Part, ...]:
        names = ("SCB",) if self.library == "bitsandbytes" else ("weight_scale", "weight_scale_inv")
        shapes: tuple[tuple[int, ...], ...] = ((outs,), (outs, 1), (1,), (1, 1), ())
        if self.block:
            shapes = ((-(-outs // self.block[0]), -(-ins // self.block[1])),)
        return Part(("weight",), ("F8_E4M3",) if self.is_float else ("I8",), ((outs, ins),)), Part(names, WHOLE_TYPES, shapes)

    def expand(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        codes, scales = tensors
        return codes.float() * self._scales(scales, codes)

    def blocks(self, tensors: Sequence[Tensor]) -> Tensor:
        codes, scales = tensors
        return to_q8_0(codes, self._scales(scales, codes).expand(len(codes), -1)[:, ::BLOCK])

    def _scales(self, scales: Tensor, codes: Tensor) -> Tensor:
        """float32 [out or 1, in or 1], of each weight."""
        if self.block:
            rows, columns = self.block
            wide = scales.float().repeat_interleave(rows, 0)[: len(codes)]
            return wide.repeat_interleave(columns, 1)[:, : codes.shape[1]]
        of_rows = scales.float().view(-1, 1)
        return of_rows / 127 if self.library == "bitsandbytes" else of_rows
