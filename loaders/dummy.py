"""Weights and a tokenizer out of nothing, so that memory, speed and the cache can be exercised without a download."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from math import prod, sqrt

import torch

from skvq.engine.config import ModelConfig
from skvq.engine.errors import ModelError
from skvq.loaders.names import expected_shapes
from skvq.loaders.source import QuantizedBlocks, unknown_weight
from skvq.loaders.text import ByteTokenizer, Tokenizer

CHUNK = 1 << 22
"""Values drawn from one generator: chunks are drawn in parallel and are the same whatever the number of threads."""

BIAS_DEVIATION = 0.02


class DummySource:
    """Random weights of a given shape, bfloat16 [rows, columns], each made when read and not kept.

    A weight depends on its name and the seed only. Matrices are normal with deviation 1/sqrt(columns), norms are one:
    every layer adds values of order one to the residual stream, so activations stay finite at any depth.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._config = config
        self._seed = seed
        self._shapes = expected_shapes(config)
        self._fingerprint = hashlib.sha256(f"dummy {seed} {config!r}".encode()).hexdigest()

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._config

    @property
    def where(self) -> str:
        """A name for messages."""
        return f"dummy weights (seed {self._seed})"

    @property
    def fingerprint(self) -> str:
        """Hex digest of config and seed."""
        return self._fingerprint

    def read(self, name: str) -> torch.Tensor:
        """The weight, bfloat16, freshly drawn and owned by the caller."""
        if name not in self._shapes:
            raise unknown_weight(name, self.where)
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        deviation = 1 / sqrt(shape[-1]) if len(shape) == 2 else BIAS_DEVIATION
        flat = torch.empty(prod(shape), dtype=torch.bfloat16)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            starts = range(0, len(flat), CHUNK)
            list(pool.map(lambda start: self._fill(f"{name} {start}", flat[start : start + CHUNK], deviation), starts))
        return flat.view(shape)

    def stored(self, name: str) -> tuple[str, int]:
        """Always bfloat16."""
        if name not in self._shapes:
            raise unknown_weight(name, self.where)
        return str(torch.bfloat16), 2 * prod(self._shapes[name])

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """None: dummy weights are not stored in blocks."""
        return None

    def _fill(self, key: str, part: torch.Tensor, deviation: float) -> None:
        digest = hashlib.sha256(f"{self._seed} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        part.normal_(0.0, deviation, generator=generator)


def dummy_tokenizer(vocab_size: int) -> Tokenizer:
    """Ids 0..255 are bytes, the rest of the vocabulary stands for nothing and decodes to ``<id>``."""
    if vocab_size < 256:
        raise ModelError(f"dummy weights need at least 256 tokens, one for each byte; this model has {vocab_size}")
    return ByteTokenizer(vocab_size)
