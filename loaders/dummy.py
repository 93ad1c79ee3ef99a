"""Made-up weights and tokenizer, to exercise memory, speed and the cache without a download."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ModelConfig
from skvq.kernels.ggml.formats import BLOCK, FORMATS, BlockFormat
from skvq.loaders.names import ROUTER, expected_shapes
from skvq.loaders.source import QuantizedBlocks, unknown_weight
from skvq.loaders.text import ByteTokenizer, Tokenizer

CHUNK = 1 << 20
"""Numbers drawn from one generator: chunks are drawn in parallel and are the same whatever the number of threads."""

BIAS_DEVIATION = 0.02


class DummySource:
    """Random weights of a given shape, bfloat16 [rows, columns], each made when read and not kept.

    A weight depends on its name only. Norms are one; any other number is one of 256 evenly spaced quantiles of a
    normal distribution, the outermost at 2.9 deviations, picked by a random byte: a billion a second and thread, where
    drawing from the distribution itself gave a fifth of that. Matrices have deviation 1/sqrt(columns), so every layer adds
    values of order one to the residual stream, and activations stay finite at any depth. With ``kind``, a ggml type,
    matrices whose rows are whole blocks of it are given as blocks, but for those of ``whole``: random codes under one scale, of
    the same deviation.
    """

    def __init__(self, config: ModelConfig, kind: str = "", whole: tuple[str, ...] = ()) -> None:
        self.config, self.where = config, "dummy weights"
        self._form, self._whole = FORMATS[kind] if kind else None, whole
        self._shapes = expected_shapes(config)
        self.fingerprint = hashlib.sha256(f"dummy quantiles 0 {config!r}{kind}{' '.join(whole)}".encode()).hexdigest()

    def read(self, name: str) -> Tensor:
        """The weight, bfloat16, freshly drawn and owned by the caller."""
        if name not in self._shapes:
            raise unknown_weight(name, self.where)
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        deviation = 1 / sqrt(shape[-1]) if len(shape) == 2 else BIAS_DEVIATION
        count = prod(shape)
        held = torch.empty(count + count % 2, dtype=torch.bfloat16)
        pairs, table = held.view(torch.int32).numpy(), _pair_table(deviation)
        self._in_chunks(name, count, lambda key, start: _fill(key, pairs[start // 2 : (start + CHUNK) // 2], table))
        return held[:count].view(shape)

    def stored(self, name: str) -> tuple[str, int]:
        """The type of blocks, or bfloat16."""
        shape = self._block_shape(name)
        if self._form is None or shape is None:
            return str(torch.bfloat16), 2 * prod(self._shapes[name])
        return self._form.kind, prod(shape)

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """The weight in blocks, freshly drawn, if it has that form."""
        shape = self._block_shape(name)
        if self._form is None or shape is None:
            return None
        rows, columns = self._shapes[name]
        held = np.empty(-(-prod(shape) // 8), dtype=np.uint64)
        self._in_chunks(name, len(held), lambda key, start: _draw(key, held[start : start + CHUNK]))
        data = torch.from_numpy(held.view(np.uint8)[: prod(shape)]).view(shape)
        _put_scales(data, self._form, 1 / sqrt(columns))
        return QuantizedBlocks(data=data.view(rows, -1), kind=self._form.kind, shape=(rows, columns))

    def expanded(self, name: str) -> str:
        """None is."""
        return ""

    def _in_chunks(self, name: str, count: int, fill: Callable[[str, int], None]) -> None:
        """``fill(key, start)`` for each chunk of so many, by all threads."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda start: fill(f"0 {name} {start}", start), range(0, count, CHUNK)))

    def _block_shape(self, name: str) -> tuple[int, int, int] | None:
        """Rows, blocks that share a scale, and bytes of these, of a matrix that has that form."""
        if name not in self._shapes:
            raise unknown_weight(name, self.where)
        shape = self._shapes[name]
        is_whole = name in self._whole or name.endswith(ROUTER)
        if self._form is None or is_whole or len(shape) != 2 or shape[1] % (BLOCK * self._form.span):
            return None
        return shape[0], shape[1] // (BLOCK * self._form.span), self._form.file_bytes


@functools.cache
def _pair_table(deviation: float) -> NDArray[np.int32]:
    """Two bfloat16 numbers in one word for each pair of random bytes: normal quantiles of a deviation, [65536]."""
    quantiles = torch.special.ndtri((torch.arange(256, dtype=torch.float64) + 0.5) / 256)
    numbers = (quantiles * (deviation / quantiles.square().mean().sqrt())).bfloat16()
    pairs = torch.stack([numbers.expand(256, 256), numbers[:, None].expand(256, 256)], -1)  # [256, 256, 2]
    return pairs.contiguous().view(torch.int32).flatten().numpy()


def _words(key: str, count: int) -> NDArray[np.uint64]:
    """Random bits that depend on the key only."""
    generator = np.random.Generator(np.random.SFC64(list(hashlib.sha256(key.encode()).digest())))
    return generator.integers(0, 2**64, size=count, dtype=np.uint64)


def _draw(key: str, words: NDArray[np.uint64]) -> None:
    """Write random bits."""
    words[:] = _words(key, len(words))


def _put_scales(data: Tensor, form: BlockFormat, deviation: float) -> None:
    """Scales, minima and factors of random blocks uint8 [rows, blocks, bytes]: weights of that deviation around zero."""
    factor = 32 if form.factor_bits else 1
    scale = deviation / factor / sqrt((4**form.bits - 1) / 12)
    heads = [scale, scale * (2**form.bits - 1) / 2 * (1 if form.factor_bits else -1)][: form.head_bytes // 2]
    place = slice(208, 210) if form.kind == "Q6_K" else slice(0, form.head_bytes)
    data[..., place] = torch.tensor(heads, dtype=torch.float16).view(torch.uint8)
    if form.kind == "Q6_K":
        data[..., 192:208] = factor
    elif form.factor_bits:  # 32 in six bits, as ggml packs the factors of eight blocks
        data[..., 4:12], data[..., 12:16] = factor | 2 << 6, 0


def _fill(key: str, pairs: NDArray[np.int32], table: NDArray[np.int32]) -> None:
    """Write random entries of ``table``. Numpy, for it lets other threads run while it draws and while it looks up."""
    np.take(table, _words(key, -(-len(pairs) // 4)).view(np.uint16)[: len(pairs)], out=pairs, mode="clip")


def dummy_tokenizer(vocab_size: int) -> Tokenizer:
    """Ids 0..255 are bytes, the rest of the vocabulary stands for nothing and decodes to ``<id>``."""
    if vocab_size < 256:
        raise ModelError(f"dummy weights need at least 256 tokens, one for each byte; this model has {vocab_size}")
    return ByteTokenizer(vocab_size)
