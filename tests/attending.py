"""One layer's attention in every mode over the same queries, keys and values: whatever differs is the cache's doing.

A whole model would hide it: another order of float32 sums flips a 16-bit rounding, and now and then a code, in the next layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from simulated import SimulatedLayer, schedule
from tiny import tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine.absorb import absorb
from skvq.engine.cache import SequenceCache
from skvq.engine.decode_regime import DecodeRegimeLayer
from skvq.engine.generate import Engine
from skvq.engine.layer_caches import DecodeBatch, ExactLayer, StreamingLayer
from skvq.engine.rope import at_positions

WINDOW, SINKS = 16, 3
SAME = 64 * torch.finfo(torch.float32).eps  # sums of numbers of order one, in another order
CACHES: dict[str, dict[str, Any]] = {
    "fp": {"method": "fp"},
    "plain K2V2": {"method": "plain"},
    "plain K8V8": {"method": "plain", "key_bits": 8, "value_bits": 8},
    "reorder K2V1.5": {"method": "reorder", "value_bits": 1.5},
    "reorder K3V2": {"method": "reorder", "key_bits": 3},
    "rotate K2V2": {},
    "rotate K1.5V1.5": {"key_bits": 1.5, "value_bits": 1.5},
    "rotate K1.5V4": {"key_bits": 1.5, "value_bits": 4},
    "rotate K4V3": {"key_bits": 4, "value_bits": 3},
}


class Engines(dict[str, Engine]):
    """Engines of one layer with grouped heads by the cache's name, made when first asked for."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        super().__init__()
        self.folder = tiny_folder(folder, num_layers=1, **changes)

    def __missing__(self, name: str) -> Engine:
        self[name] = tiny_engine(self.folder, tiny_cache(**CACHES[name]))
        return self[name]


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What a layer is given for a text: unrotated queries, keys and values, and the text's ids."""

    q: Tensor  # [1, T, H, D]
    k: Tensor  # [1, T, KH, D]
    v: Tensor  # [1, T, KH, D]
    ids: list[int]

    def __getitem__(self, part: slice) -> Trace:
        return Trace(q=self.q[:, part], k=self.k[:, part], v=self.v[:, part], ids=self.ids[part])

    def __len__(self) -> int:
        return len(self.ids)


def trace(engine: Engine, count: int, seed: int = 0) -> Trace:
    """A random text, keys with a bias as Qwen's have."""
    config, generator = engine.parts.model.config, torch.Generator().manual_seed(seed)
    q = torch.randn(1, count, config.num_heads, config.head_size, generator=generator)
    k, v = torch.randn(2, 1, count, config.num_kv_heads, config.head_size, generator=generator)
    bias = torch.randn(config.head_size, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(config.vocab_size, (count,), generator=generator).tolist()
    return Trace(q=2 * q, k=k + bias, v=v, ids=ids)


def _rope(engine: Engine, start: int, stop: int) -> object:
    return at_positions(engine.parts.rope, torch.arange(start, stop)[None])


def exact(engine: Engine, sequence: SequenceCache, text: Trace, chunk: int = 1000) -> Tensor:
    """Exact prefill of an empty sequence: attention output [T, H, D]."""
    count, config = len(text), engine.parts.model.config
    sequence.reserve(count)
    buffers = torch.empty(2, config.num_kv_heads, count, config.head_size)
    mass, outs = torch.zeros(count), []
    for a in range(0, count, chunk):
        b = min(a + chunk, count)
        layer = ExactLayer(sequence.setup, 0, *buffers, mass, a)
        outs.append(layer.attend(text.q[:, a:b], text.k[:, a:b], text.v[:, a:b], _rope(engine, a, b))[0])
    absorb(sequence, 0, *(buffer.transpose(0, 1) for buffer in buffers), mass, torch.tensor(text.ids))
    sequence.commit(text.ids)
    return torch.cat(outs)


def stream(engine: Engine, sequence: SequenceCache, text: Trace) -> Tensor:
    """Streaming prefill of one chunk: attention output [T, H, D]."""
    sequence.reserve(len(text))
    layer = StreamingLayer(sequence, 0, torch.tensor(text.ids))
    first = sequence.origin + sequence.length
    out = layer.attend(text.q, text.k, text.v, _rope(engine, first, first + len(text)))[0]
    sequence.commit(text.ids)
    return out


def decode(engine: Engine, sequences: Sequence[SequenceCache], texts: Sequence[Trace]) -> Tensor:
    """Decode texts of one length together, a token at a time: attention output [B, T, H, D]."""
    batch = DecodeBatch(engine.parts.setup, len(sequences))
    outs = []
    for i in range(len(texts[0])):
        q, k, v = (torch.cat([getattr(text, name)[:, i : i + 1] for text in texts]) for name in "qkv")
        with batch.step(sequences, [text.ids[i] for text in texts]):
            batch.mark_slots()
            outs.append(
                next(batch.layers(batch.max_packed)).attend(q, k, v, at_positions(engine.parts.rope, batch.rope_positions))
            )
    return torch.cat(outs, 1)


def scored(engine: Engine, text: Trace) -> Tensor:
    """The decode regime of the whole text at once: attention output [T, H, D]."""
    sequence = engine.new_sequence()
    sequence.reserve(len(text))
    layer = DecodeRegimeLayer(sequence, 0, torch.tensor(text.ids))
    rope = _rope(engine, 0, len(text))
    layer.take(0, text.q, text.k, text.v, rope)
    out = layer.attend(0, text.q, rope)[0]
    sequence.free()
    return out


def defined(engine: Engine, text: Trace, chunks: Sequence[int], sinks: int) -> Tensor:
    """What all of these should be, by definition: chunks of these lengths prefilled, the rest decoded; [T, H, D]."""
    layer = SimulatedLayer(engine, 0, sinks, *schedule(len(text), chunks))
    return layer.attend(text.q, text.k, text.v, _rope(engine, 0, len(text)))[0]
