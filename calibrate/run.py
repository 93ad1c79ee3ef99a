"""One pass over the corpus, layer by layer: record, fit, go on. Deterministic: same input, same bytes."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from skvq.calibrate.outliers import OutlierTokens
from skvq.calibrate.reorder import fit_plain, fit_reorder
from skvq.calibrate.rotate import fit_rotate
from skvq.calibrate.stats import SINKS, LayerStats, Recorder
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CalibrationError
from skvq.engine.model import Model
from skvq.engine.rope import at_positions
from skvq.kernels.interface import Backend, RopeFrequencies

TEXT_TOKENS = 2048
"""Tokens of one calibration text; a corpus is cut into texts of this length."""

Progress = Callable[[int, int], None]


def built_in_corpus() -> str:
    """466 KB of English reference prose that Python itself ships: the default, so that nothing is downloaded."""
    return "\n\n".join(pydoc_data.topics.topics.values())


def texts_of(ids: Sequence[int], tokens: int) -> Tensor:
    """The first ``tokens`` ids cut into texts of TEXT_TOKENS: int64 [S, T]."""
    ids = ids[:tokens]
    length = min(TEXT_TOKENS, len(ids))
    if length < 32:
        raise CalibrationError(f"the calibration text has {len(ids)} tokens, at least 32 are needed: give a longer --text")
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


@torch.no_grad()
def calibrate(
    model: Model,
    frequencies: RopeFrequencies,
    texts: Tensor,
    config: CacheConfig,
    backend: Backend,
    *,
    seed: int,
    progress: Progress,
    outliers: OutlierTokens,
) -> dict[str, Tensor]:
    """Tensors of ``engine.codecs`` for every layer, stacked, from texts int64 [S, T]. ``progress(layers done, layers)``.

    ``outliers`` sees every layer's statistics.
    """
    layers: list[dict[str, Tensor]] = []
    bits = config.bits_of_layers(model.config.num_layers)
    for index, stats in enumerate(recorded(model, frequencies, texts)):
        outliers.see(stats)
        layers.append(fit_layer(stats, frequencies, config.with_bits(*bits[index]), backend, seed))
        progress(index + 1, len(bits))
    return stacked(layers)


def recorded(model: Model, frequencies: RopeFrequencies, texts: Tensor) -> Iterator[LayerStats]:
    """What each layer sees of texts int64 [S, T], one layer after another."""
    shape = model.config
    count, length = texts.shape
    device = model.weights.embedding.device
    rope = at_positions(frequencies, torch.arange(length, device=device)[None])
    hidden = [model.embed(text[None].to(device)) for text in texts]  # [1, T, d] each
    for index in range(shape.num_layers):
        recorder = Recorder(
            count, length, shape.num_heads, shape.num_kv_heads, shape.head_size, shape.attention_spans[index], device
        )
        hidden = [model.layer(index, x, rope, recorder) for x in hidden]
        yield recorder.stats(model.weights.layers[index].output.dense())


def stacked(layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of all layers, the layer first."""
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def fit_layer(
    stats: LayerStats, frequencies: RopeFrequencies, config: CacheConfig, backend: Backend, seed: int
) -> dict[str, Tensor]:
    """Tensors of one layer at the config's key and value bits, on the CPU."""
    return {name: t.cpu() for name, t in _fit(stats, frequencies, config, backend, seed).items()}


def _fit(
    stats: LayerStats, frequencies: RopeFrequencies, config: CacheConfig, backend: Backend, seed: int
) -> dict[str, Tensor]:
    if config.method == "reorder":
        return fit_reorder(stats, config, seed)
    if config.method == "plain":
        return fit_plain(stats, config)
    mean = stats.keys[:, min(SINKS, stats.keys.shape[1] // 2) :].flatten(0, 1).mean(0)
    rope = at_positions(frequencies, torch.arange(stats.keys.shape[1], device=mean.device)[None])
    turned = rope.turn(mean.expand(1, stats.keys.shape[1], -1, -1))  # [1, T, KH, D]
    return fit_rotate(stats, turned, frequencies, config, backend) | {"key_mean": mean}
