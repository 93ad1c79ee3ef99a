"""Blocks of GGUF files. The gguf package reads Q4_K, Q5_K and Q6_K but cannot write them: theirs are random, and valid."""

from __future__ import annotations

import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

HEADS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Places of the float16 numbers in a block."""
BYTES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
SPANNING = list(BYTES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blocks as the gguf package writes them, or random ones where it cannot, and the weights it reads from them."""
    ggml = GGMLQuantizationType[kind]
    if kind in SPANNING:
        data = random_blocks(kind, rows, columns, seed).numpy()
    else:
        data = quants.quantize(0.1 * random(rows, columns, seed=seed).numpy(), ggml)
    return torch.from_numpy(data), torch.from_numpy(quants.dequantize(data, ggml))


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0, *, fill: int | None = None, scale: float = 1e-3) -> Tensor:
    """uint8 [rows, bytes]: d and dmin of either sign, up to ``scale``; all other bytes random, or ``fill``."""
    assert columns % 256 == 0, columns
    generator, shape = torch.Generator().manual_seed(seed), (rows, columns // 256, BYTES[kind])
    blocks = torch.randint(256, shape, generator=generator) if fill is None else torch.full(shape, fill)
    blocks = blocks.to(torch.uint8)
    for at in HEADS[kind]:
        heads = scale * (2 * torch.rand(*shape[:2], 1, generator=generator) - 1)
        blocks[..., at : at + 2] = heads.half().view(torch.uint8)
    return blocks.flatten(1)
