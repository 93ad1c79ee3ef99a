"""Weights of any source with its matrices of whole numbers rounded to 8 bits while they are read, for ``NAME:Q8_0``.

Every 32 neighbours of a row share a scale, the largest of them over 127 in float16 (``quantize_row_q8_0`` of ggml): 8.5 bits a
weight. What cannot be cut that way, what chooses experts, and matrices that are in blocks already, stay as they are.
"""

from __future__ import annotations

import hashlib
from math import prod

import torch
from torch import Tensor

from skvq.engine.errors import ModelError
from skvq.kernels.ggml.formats import BLOCK, FORMATS
from skvq.loaders.names import ROUTER, expected_shapes
from skvq.loaders.quantized.scheme import to_q8_0
from skvq.loaders.source import QuantizedBlocks, WeightSource

ROUNDED = "Q8_0"
PIECE = 1 << 18
"""Weights rounded at a time, which lie in the CPU's cache: of larger pieces a billion takes 28 s, of these 6."""


class RoundedSource:
    """See the module. Raises ModelError if there is nothing to round."""

    def __init__(self, source: WeightSource) -> None:
        self._source, self.config, self.where = source, source.config, source.where
        self.fingerprint = hashlib.sha256(f"{source.fingerprint} {ROUNDED}".encode()).hexdigest()
        self._shapes = {
            name: (shape[0], shape[1])
            for name, shape in expected_shapes(source.config).items()
            if len(shape) == 2 and shape[1] % BLOCK == 0 and source.stored(name)[0] not in FORMATS and not name.endswith(ROUTER)
        }
        if not self._shapes:
            raise ModelError(f"{source.where}: its weights are in blocks already: leave :{ROUNDED} out")

    def read(self, name: str) -> Tensor:
        """The weight: rounded, float32, or as the source has it."""
        blocks = self.blocks(name) if name in self._shapes else None
        if blocks is None:
            return self._source.read(name)
        split = blocks.data.view(len(blocks.data), -1, FORMATS[ROUNDED].file_bytes)
        scales, codes = split[..., :2].contiguous().view(torch.float16), split[..., 2:].contiguous().view(torch.int8)
        return (codes.float() * scales.float()).view(blocks.shape)

    def stored(self, name: str) -> tuple[str, int]:
        """Type and bytes of its blocks, or of what the source has."""
        if name not in self._shapes:
            return self._source.stored(name)
        return ROUNDED, prod(self._shapes[name]) // BLOCK * FORMATS[ROUNDED].file_bytes

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """The weight rounded, or in the blocks that the source has."""
        if name not in self._shapes:
            return self._source.blocks(name)
        weight = self._source.read(name)
        pieces = torch.split(weight, max(1, PIECE // weight.shape[1]))
        return QuantizedBlocks(data=torch.cat([rounded(rows) for rows in pieces]), kind=ROUNDED, shape=self._shapes[name])

    def expanded(self, name: str) -> str:
        """Nothing that is rounded is."""
        return "" if name in self._shapes else self._source.expanded(name)


def rounded(weight: Tensor) -> Tensor:
    """Rows of Q8_0 blocks uint8 [out, bytes] of weights [out, in]."""
    groups = weight.float().view(len(weight), -1, BLOCK)
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (groups / scales.float().clamp_(min=1e-30)[..., None]).round_().clamp_(-127, 127)
    return to_q8_0(codes.to(torch.int8).flatten(1), scales)
