"""Codes of 4 or 8 bits packed in words of 32, with a scale and a zero, or a bias, for each group of input channels.

A weight is ``scale * (code - zero)``, or ``scale * code + bias``. A word holds n codes, 8 or 4, the first in its lowest bits;
those of AWQ are of outputs 0 2 4 6 1 3 5 7.

    awq, gemm           qweight [in, out/n]         qzeros [in/g, out/n]                        scales [in/g, out]
    gptq                qweight [in/n, out]         qzeros [in/g, out/n], less 1                scales [in/g, out]
    compressed-tensors  weight_packed [out, in/n]   weight_zero_point [out/n, in/g], or half    weight_scale [out, in/g]
    mlx                 weight [out, in/n]          biases [out, in/g]                          scales [out, in/g]

Codes of 8 bits around 128 are Q8_0.

Sources: AutoAWQ's WQLinear_GEMM, AutoGPTQ's QuantLinear (``gptq_v2`` has zeros as they are), compressed-tensors'
``pack_quantized``, mlx's ``affine_quantize``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skvq.engine.errors import ModelError
from skvq.kernels.ggml.formats import BLOCK
from skvq.loaders.quantized.scheme import WHOLE_TYPES, Part, Scheme, to_q4_1, to_q8_0

WORDS = ("I32", "U32")
ORDERS = ("g_idx", "weight_g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers(Scheme):
    """See the module. group: input channels that share a scale, 0: all of a row; less: what zeros are stored less by."""

    library: str
    bits: int
    group: int
    less: int = 0
    has_zeros: bool = True
    reordered: bool = False  # channels are not in order of groups (desc_act)
    around_half: bool = False  # all zeros are half of the range

    @property
    def label(self) -> str:
        return f"{self.library} with reordered channels" if self.reordered else self.library

    @property
    def kind(self) -> str:
        if self.reordered or (self.bits == 8 and not self.around_half):
            return ""
        return "Q4_1" if self.bits == 4 else "Q8_0"

    @property
    def embeds(self) -> bool:
        return self.library == "mlx"

    @property
    def unit(self) -> int:
        return self.group or BLOCK

    def parts(self, outs: int, ins: int) -> tuple[Part, ...]:
        groups, n = ins // (self.group or ins), 32 // self.bits
        order = (Part(ORDERS, WORDS, ((ins,),)),) if self.reordered else ()
        if self.library == "mlx":
            return (
                Part(("weight",), WORDS, ((outs, ins // n),)),
                Part(("scales",), WHOLE_TYPES, ((outs, groups),)),
                Part(("biases",), WHOLE_TYPES, ((outs, groups),)),
            )
        if self.library == "compressed-tensors":
            zeros = Part(("weight_zero_point",), WORDS, ((outs // n, groups),))
            return (
                Part(("weight_packed",), WORDS, ((outs, ins // n),)),
                Part(("weight_scale",), WHOLE_TYPES, ((outs, groups),)),
                *((zeros,) if self.has_zeros else ()),
                *order,
            )
        return (
            Part(("qweight",), WORDS, ((ins, outs // n) if self.library == "awq" else (ins // n, outs),)),
            Part(("scales",), WHOLE_TYPES, ((groups, outs),)),
            Part(("qzeros",), WORDS, ((groups, outs // n),)),
            *order,
        )

    def expand(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        codes, scales, minima = self._numbers(tensors)
        if self.reordered:
            groups = tensors[-1].long()
            return torch.addcmul(minima[:, groups], scales[:, groups], codes)
        return torch.addcmul(minima[..., None], scales[..., None], codes.view(*scales.shape, -1)).reshape(shape)

    def blocks(self, tensors: Sequence[Tensor]) -> Tensor:
        codes, scales, minima = self._numbers(tensors)
        return to_q4_1(codes, scales, minima) if self.bits == 4 else to_q8_0((codes ^ 128).view(torch.int8), scales)

    def check(self, tensors: Sequence[Tensor]) -> None:
        if self.kind == "Q8_0" and self.library == "gptq" and bool((self._zeros(tensors[2]) != 128).any()):
            raise ModelError("its zeros are not 128, and config.json says that they are (sym)")

    def ordered_by(self, indices: Sequence[Tensor]) -> Integers:
        return replace(self, reordered=any(self._is_reordered(index) for index in indices)) if indices else self

    def _is_reordered(self, index: Tensor) -> bool:
        size = self.group or len(index)
        if not len(index) or int(index.min()) < 0 or int(index.max()) * size >= len(index):
            raise ModelError(f"g_idx names groups that there are not: each has {size} of {len(index)} channels")
        return not torch.equal(index.long(), torch.arange(len(index)) // size)

    def _numbers(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [out, in], scales and minima float32 [out, groups]."""
        packed, scales, *others = tensors
        if self.library == "mlx":
            return self._codes(packed), scales.float(), others[0].float()
        if self.library == "compressed-tensors":
            zeros = self._codes(others[0].T).T if self.has_zeros else torch.full(scales.shape, 1 << self.bits - 1)
            return self._codes(packed), scales.float(), -scales.float() * zeros
        codes = self._codes(packed).T.contiguous() if self.library == "awq" else self._codes(packed.T)
        return codes, scales.T.float(), -scales.T.float() * self._zeros(others[0])

    def _zeros(self, words: Tensor) -> Tensor:
        """Of AWQ and GPTQ, [out, groups]."""
        return self._codes(words).T + self.less & (1 << self.bits) - 1

    def _codes(self, words: Tensor) -> Tensor:
        """The codes of each word [rows, n], uint8."""
        packed = words.contiguous().view(torch.uint8)  # [rows, 4 n], the lowest byte of a word first
        if self.bits == 8:
            return packed
        codes = torch.stack([packed & 15, packed >> 4], -1).view(len(words), -1, 8)
        if self.library == "awq":
            codes = codes[..., torch.tensor(AWQ_ORDER).argsort()]
        return codes.reshape(len(words), -1)
