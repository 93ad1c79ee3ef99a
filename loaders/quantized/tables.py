"""bitsandbytes' 4 bits: codes into a table of 16 numbers, times the largest weight of every 64 (QLoRA, arXiv 2305.14314).

    weight                                 uint8 [out in / 2, 1]  two codes a byte, the first in its upper half
    weight.quant_map                       [16]                   what codes stand for
    weight.absmax                          [blocks]               the largest weights, or, quantized again, uint8:
    weight.nested_quant_map, nested_absmax [256], [blocks / 256]  map[code] * nested_absmax + nested_offset
    weight.quant_state.bitsandbytes__nf4   JSON in bytes          blocksize, nested_blocksize, nested_offset

No block type of GGUF has such tables: weights are expanded. Source: bitsandbytes' ``QuantState``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from skvq.engine.errors import ModelError
from skvq.loaders.fields import reason
from skvq.loaders.quantized.scheme import WHOLE_TYPES, Part, Scheme

BLOCK_SIZE, NESTED_SIZE = 64, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables(Scheme):
    """See the module. ``table``: nf4 or fp4; ``nested``: whether the largest weights are quantized again."""

    table: str
    nested: bool

    @property
    def label(self) -> str:
        return f"bitsandbytes {self.table}"

    def parts(self, outs: int, ins: int) -> tuple[Part, ...]:
        half, blocks = -(-outs * ins // 2), -(-outs * ins // BLOCK_SIZE)
        largest = Part(("weight.absmax",), ("U8",) if self.nested else WHOLE_TYPES, ((blocks,),))
        again = (
            Part(("weight.nested_quant_map",), WHOLE_TYPES, ((256,),)),
            Part(("weight.nested_absmax",), WHOLE_TYPES, ((-(-blocks // NESTED_SIZE),),)),
        )
        return (
            Part(("weight",), ("U8",), ((half, 1), (1, half), (half,))),
            Part(("weight.quant_map",), WHOLE_TYPES, ((16,),)),
            Part((f"weight.quant_state.bitsandbytes__{self.table}",), ("U8",), ()),
            largest,
            *(again if self.nested else ()),
        )

    def check(self, tensors: Sequence[Tensor]) -> None:
        _offset(tensors[2])

    def expand(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        packed, table, state, largest, *again = tensors
        offset = _offset(state)
        if again:
            numbers, scales = again
            largest = numbers.float()[largest.long()] * scales.float().repeat_interleave(NESTED_SIZE)[: len(largest)] + offset
        pairs = packed.flatten()
        codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten()[: prod(shape)]
        return (table.float()[codes.long()] * largest.float().repeat_interleave(BLOCK_SIZE)[: len(codes)]).view(shape)


def _offset(state: Tensor) -> float:
    """What is added to the largest weights. ModelError if the state is of other blocks."""
    try:
        found: Any = json.loads(state.numpy().tobytes())
        sizes, offset = (found["blocksize"], found.get("nested_blocksize", NESTED_SIZE)), float(found.get("nested_offset", 0.0))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"its quant_state is not what bitsandbytes writes ({reason(error)}): download it again") from error
    if sizes != (BLOCK_SIZE, NESTED_SIZE):
        raise ModelError(f"its blocks are {sizes}, this engine reads {(BLOCK_SIZE, NESTED_SIZE)}")
    return offset
