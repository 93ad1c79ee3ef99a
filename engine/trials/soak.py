"""``skvq bench soak``: random append, fork, truncate, save, restore and free, with every invariant checked after each step.
A sequence whose context is full drops its oldest pages and continues.

Each sequence has a shadow: what reading it back must give. A token in the window or retained reads back as it was given, bit
for bit; a packed one reads back close to it once, and from then on exactly as it did then, whatever else happens.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import CacheSetup
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CapacityError, SkvqError
from skvq.engine.filters import AttentionSinks, TokenIds
from skvq.engine.guard import own_settings
from skvq.engine.model_config import ModelConfig
from skvq.engine.report import Reporter
from skvq.engine.session import fill_from, open_session
from skvq.engine.stress import append, bare_setup, seeded
from skvq.kernels.interface import Backend

CONTEXT = 3000
SEQUENCES = 4
FILES = 3
LONGEST_APPEND = 400
CLOSEST = 0.9
"""Least cosine between a token and what it reads back as when it is packed; an unrelated token has about zero."""

SHAPE = ModelConfig(
    family="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_size=32,
)
CACHE = CacheConfig(
    method="plain",
    key_bits=4,
    value_bits=4,
    group_size=32,
    window=100,
    filters=(AttentionSinks(3), TokenIds(frozenset({7}), 9)),
)


class SoakError(SkvqError):
    """An invariant is broken; the message names step and seed."""


@dataclass(slots=True)
class Shadow:
    """What a sequence must read back as: [2, L, T, KH, D] float32 (keys, values), how much of it was packed, and dropped."""

    content: Tensor
    packed: int
    dropped: int = 0

    def clone(self) -> Shadow:
        """An independent copy."""
        return Shadow(self.content.clone(), self.packed, self.dropped)

    def drop(self, dropped: int) -> None:
        """Forget the oldest tokens as a full sequence does, so that ``dropped`` are gone in all."""
        count, self.dropped = dropped - self.dropped, dropped
        self.content, self.packed = self.content[:, :, count:], self.packed - count

    def truncate(self, length: int, packed: int, dtype: torch.dtype) -> None:
        """Forget tokens from ``length`` on; those that leave their tile for the window are rounded to 16 bits."""
        self.content = self.content[:, :, :length].clone()
        self.content[:, :, packed:] = self.content[:, :, packed:].to(dtype).float()
        self.packed = packed


def read_back(sequence: SequenceCache) -> Tensor:
    """Everything a sequence holds, as attention sees it: [2, L, T, KH, D] float32."""
    layers = []
    for layer in range(sequence.setup.arena.shape.layers):
        keys, values, _ = sequence.window(layer, sequence.length)
        parts = [torch.stack([keys.float(), values.float()])]
        if sequence.packed:
            parts.insert(0, torch.stack(sequence.stage(layer, 0, sequence.packed)))
        layers.append(torch.cat(parts, 1))
    return torch.stack(layers, 1)


def verify(sequence: SequenceCache, shadow: Shadow) -> None:
    """Assert that the sequence reads back as its shadow says; learn what newly packed tokens read back as."""
    now, was = read_back(sequence), shadow.content
    assert now.shape == was.shape, f"{now.shape[2]} tokens instead of {was.shape[2]}"
    fresh = slice(shadow.packed, sequence.packed)
    close = torch.cosine_similarity(now[:, :, fresh].flatten(3), was[:, :, fresh].flatten(3), -1)
    assert bool((close > CLOSEST).all()), f"a token packed in {fresh.start}..{fresh.stop - 1} reads back as another"
    was[:, :, fresh] = now[:, :, fresh]
    wrong = (now != was).any(-1).any(-1).any(0).any(0)
    assert not bool(wrong.any()), f"token {int(wrong.nonzero()[0, 0])} of {len(wrong)} has changed"
    shadow.packed = sequence.packed


class Soak:
    """The state of a soak: sequences with their shadows, files with theirs."""

    def __init__(self, setup: CacheSetup, seed: int, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.random = random.Random(seed)
        self.generator = seeded(seed)
        self.live: list[tuple[SequenceCache, Shadow]] = []
        self.saved: dict[Path, Shadow] = {}
        self.count: Counter[str] = Counter()
        self.nbytes = setup.arena.nbytes
        self.most_tokens = self.most_dropped = 0
        for name, tensor in setup.arena.tensors.items():
            if name not in ("full_positions", "page_table"):
                tensor.view(torch.uint8).fill_(0x7F)  # NaN in every type: what was never written must never be read
        self.operations: dict[str, Callable[[], None]] = {
            "append": self.append, "new": self.new, "fork": self.fork, "truncate": self.truncate,
            "save": self.save, "restore": self.restore, "free": self.free,
        }  # fmt: skip

    def step(self) -> str:
        """One random operation and all checks; its name."""
        name = self.random.choices(list(self.operations), weights=(10, 2, 3, 3, 1, 2, 2))[0]
        if not self.live and name != "restore":
            name = "new"
        try:
            self.operations[name]()
            self.count[name] += 1
        except CapacityError:
            self.count["refused"] += 1
        self.check()
        return name

    def check(self) -> None:
        """No page lost, none shared wrongly, no byte more or less, nothing changed."""
        self.setup.arena.check({s.slot: s.pages for s, _ in self.live})
        assert self.setup.arena.nbytes == self.nbytes, "the arena has grown"
        self.most_dropped = max(self.most_dropped, *(s.dropped for s, _ in self.live), 0)
        self.most_tokens = max(self.most_tokens, sum(s.length for s, _ in self.live))
        if self.live:
            verify(*self.live[-1])  # the one just used
            verify(*self.random.choice(self.live))

    def check_all(self) -> None:
        """Every sequence reads back as it should."""
        for sequence, shadow in self.live:
            verify(sequence, shadow)

    def pick(self) -> tuple[SequenceCache, Shadow]:
        """A random live sequence, moved to the end of the list."""
        self.live.append(self.live.pop(self.random.randrange(len(self.live))))
        return self.live[-1]

    def new(self) -> None:
        shape = self.setup.arena.shape
        empty = torch.zeros(2, shape.layers, 0, shape.kv_heads, shape.head_size, dtype=torch.float32)
        self.live.append((SequenceCache(self.setup), Shadow(empty, 0)))

    def append(self) -> None:
        sequence, shadow = self.pick()
        shape = self.setup.arena.shape
        count = self.random.randint(1, LONGEST_APPEND)
        new = torch.randn(
            2, shape.layers, count, shape.kv_heads, shape.head_size, dtype=torch.float32, generator=self.generator
        ).to(shape.dtype)
        try:
            append(sequence, list(new[0]), list(new[1]), [self.random.randrange(256) for _ in range(count)])
        finally:
            shadow.drop(sequence.dropped)  # refused for want of pages or not
        shadow.content = torch.cat([shadow.content, new.float()], 2)

    def fork(self) -> None:
        sequence, shadow = self.pick()
        self.live.append((sequence.fork(), shadow.clone()))

    def truncate(self) -> None:
        sequence, shadow = self.pick()
        length = self.random.randint(max(0, sequence.length - 600), sequence.length)
        sequence.truncate(length)
        shadow.truncate(length, sequence.packed, self.setup.arena.shape.dtype)
        shadow.dropped = sequence.dropped

    def save(self) -> None:
        sequence, shadow = self.pick()
        verify(sequence, shadow)
        path = self.folder / f"{self.random.randrange(FILES)}.session"
        sequence.save(path)
        self.saved[path] = shadow.clone()

    def restore(self) -> None:
        if not self.saved:
            return
        path = self.random.choice(sorted(self.saved))
        file = open_session(self.setup.identity, path)
        sequence = SequenceCache(self.setup)
        try:
            fill_from(sequence, file)
        except CapacityError:
            sequence.free()
            raise
        self.live.append((sequence, self.saved[path].clone()))

    def free(self) -> None:
        self.pick()[0].free()
        self.live.pop()


def soak(steps: int, seed: int, backend: Backend, report: Reporter) -> dict[str, Any]:
    """Run ``steps`` random operations on a small cache. Raises SoakError when an invariant breaks; figures if none does."""
    device = torch.device("cpu")
    setup = bare_setup(
        SHAPE,
        CACHE,
        max_context=CONTEXT,
        max_sequences=SEQUENCES,
        backend=backend,
        dtype=torch.float32,
        device=device,
        on_full="shift",
    )
    start = time.perf_counter()
    try:
        kept = tempfile.TemporaryDirectory(prefix="skvq-soak-")
    except OSError as error:
        raise SkvqError(f"no folder for temporary files can be written ({error.strerror}): set TMPDIR") from None
    with own_settings(device), kept as folder:
        state = Soak(setup, seed, Path(folder))
        _run(state, steps, seed, report)
    return {
        "steps": steps,
        "seed": seed,
        "operations": dict(sorted(state.count.items())),
        "most_tokens": state.most_tokens,
        "most_dropped": state.most_dropped,
        "arena_bytes": state.nbytes,
        "backend": backend.name,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _run(state: Soak, steps: int, seed: int, report: Reporter) -> None:
    done = "nothing"
    with report.bar(f"soaking, {steps:,} steps", steps) as bar:
        for step in range(steps):
            try:
                done = state.step()
            except AssertionError as error:
                raise SoakError(f"step {step} of seed {seed} ({done} went before): {error}") from error
            bar.advance(1)
    state.check_all()
