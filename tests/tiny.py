"""Tiny engines for tests: a config on disk, dummy weights, the specification as backend. Seconds, not minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from config_json import write_config
from loader_fixtures import tiny_config
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.config import CacheConfig
from skvq.engine.container import CHECKSUM, open_container, whole, write_container
from skvq.engine.filters import AttentionSinks
from skvq.engine.generate import Engine
from skvq.engine.report import Bar, Quiet
from skvq.kernels.layout import PAGE_TOKENS


def tiny_folder(folder: Path, **changes: Any) -> Path:
    """A folder that holds config.json and nothing else: enough for dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, tiny_config(**changes))
    return folder


def tiny_cache(**changes: Any) -> CacheConfig:
    """Groups of 32, a window of 16 and 3 sinks, so that a short text is packed in several tiles."""
    return CacheConfig(**({"group_size": 32, "window": 16, "filters": (AttentionSinks(3),)} | changes))


def tiny_engine(folder: Path, cache: CacheConfig, **options: Any) -> Engine:
    """An engine of dummy weights over ``tiny_folder``, float32 on the CPU; the same ids are read alike: no prefix reused."""
    given = {"max_context": 1700, "max_sequences": 4, "backend": "reference", "device": "cpu", "dtype": "float32"}
    quiet = {"report": Quiet(), "prefix_cache": False, "dummy_weights": True}
    return Engine.load(folder, cache=cache, **(quiet | given | options))


def rewritten(source: Path, target: Path, kind: str, changes: Mapping[str, Any], **tensors: Tensor) -> None:
    """A session or checkpoint with other numbers in its header, or other tensors, and the checksum of these."""
    file = open_container(source, kind)
    held = {name: tensor for name, tensor in file.tensors.items() if name != CHECKSUM} | tensors
    write_container(target, kind, file.header | changes, [whole(name, tensor) for name, tensor in held.items()])


def random_ids(count: int, seed: int = 0, vocab: int = 320) -> list[int]:
    """Token ids from a seed."""
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def steps(engine: Engine, sequences: Sequence[SequenceCache], rows: Sequence[Sequence[int]]) -> Tensor:
    """Decode the ids of each row one at a time, all rows together: logits float32 [B, N, V]."""
    return torch.stack([engine.decode_step(sequences, tokens) for tokens in zip(*rows, strict=True)], 1)


def stepped_nll(engine: Engine, ids: Sequence[int]) -> Tensor:
    """What ``Engine.nll`` computes in parallel, the slow way: from nothing, one token at a time, float32 [N - 1]."""
    sequence = engine.new_sequence()
    logits = steps(engine, [sequence], [ids[:-1]])[0]
    sequence.free()
    return nll_of(logits, ids)


def nll_of(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Minus the logarithm of the probability that logits [N - 1, V] give to each id but the first, float32 [N - 1]."""
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def dense_nll(engine: Engine, ids: Sequence[int]) -> Tensor:
    """The same of the model without a cache that packs, float32 [N - 1]."""
    return nll_of(engine.logits(ids)[:-1], ids)


class Listener(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.bars: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def bar(self, label: str, *total: float) -> AbstractContextManager[Bar]:
        self.bars.append(label)
        return super().bar(label, *total)


def arena_of(*sequences: SequenceCache) -> dict[int, list[int]]:
    """Pages by slot of the sequences alive, for ``Arena.check``."""
    return {s.slot: s.pages for s in sequences if s.alive}


def bytes_of(sequence: SequenceCache, tokens: int) -> list[Tensor]:
    """The packed bytes of the first ``tokens`` tokens, every tensor of every layer, through the page table."""
    arena, tile, found = sequence.setup.arena, sequence.setup.regions.tile, []
    if not tokens:
        return found
    for layer in range(arena.shape.layers):
        for tensor in arena.layer(layer).values():
            pages = tensor[sequence.pages]  # [pages, KH, ...]
            tiles = pages.flatten(2).view(*pages.shape[:2], PAGE_TOKENS // tile, -1)
            found.append(tiles.transpose(1, 2).flatten(0, 1)[: tokens // tile].clone())
    return found
