"""One pass over the corpus, layer by layer: record, fit, continue. Deterministic: same input, same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor

from skvq.calibrate.hidden import HiddenStates
from skvq.calibrate.outliers import OutlierTokens
from skvq.calibrate.reorder import fit_plain, fit_reorder
from skvq.calibrate.rotate import fit_rotate
from skvq.calibrate.stats import LayerStats, Recorder
from skvq.calibrate.threads import one_thread
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CalibrationError, broken_model
from skvq.engine.model import Model
from skvq.engine.rope import ModelRope, StepRope, at_positions
from skvq.kernels.interface import Backend, RopeFrequencies

TEXT_TOKENS = 2048
"""Tokens of one calibration text; a corpus is cut into texts of this length."""

REHEARSED = 64
"""Tokens of ``rehearse``."""

Progress = Callable[[float], None]
"""Called for each piece of work when it is done, in units proportional to time."""


def texts_of(ids: Sequence[int], tokens: int) -> Tensor:
    """The first ``tokens`` ids cut into texts of equal length, at most TEXT_TOKENS: int64 [S, T].

    Fewer than S tokens are left over.
    """
    ids = ids[:tokens]
    if len(ids) < 32:
        raise CalibrationError(f"the calibration text has {len(ids)} tokens, at least 32 are needed: give a longer --text")
    count = -(-len(ids) // TEXT_TOKENS)
    length = len(ids) // count
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def calibrate(
    model: Model,
    model_rope: ModelRope,
    texts: Tensor,
    config: CacheConfig,
    backend: Backend,
    *,
    seed: int,
    progress: Progress,
    outliers: OutlierTokens,
) -> dict[str, Tensor]:
    """Tensors of ``engine.codecs`` for every layer, stacked, from texts int64 [S, T]; ``progress`` comes to the layers' number.

    ``outliers`` sees every layer. Besides the model, the texts' ids and what is returned, memory holds one text's activations,
    one layer's statistics (``stats``) and what a fit makes of their sample, a few times its size; none of it grows with S once
    the sample is full. Hidden states of all texts lie in a file (``hidden``).

    Deterministic, also from one number of threads to another where the model's own products are: statistics and fits run on one
    thread of torch, the model on all. Products by MKL and attention of SmolLM2 are the same on one thread and on two; MKL does
    not promise that for every shape and machine.
    """
    layers: list[dict[str, Tensor]] = []
    bits = config.bits_of_heads(model.config)
    for stats in recorded(model, model_rope, texts, outliers):
        heads, rope = bits[len(layers)], model_rope.of(len(layers))
        fits = {pair: fit_layer(stats, rope, config.with_bits(*pair), backend, seed) for pair in sorted(set(heads))}
        layers.append(mixed([(fits[pair], fits[pair]) for pair in heads]))
        del stats  # before the next layer's are made
        progress(1.0)
    return stacked(layers)


def rehearse(model: Model, model_rope: ModelRope, texts: Tensor, config: CacheConfig, backend: Backend) -> None:
    """Calibrate one layer on a few tokens and forget it.

    Kernels are compiled here, a minute of it on a new machine, and not in the first of the layers that progress counts.
    """
    few = texts[:1, :REHEARSED]
    stats = next(recorded(model, model_rope, few, OutlierTokens(few)))
    fit_layer(stats, model_rope.of(0), config.with_bits(config.key_bits, config.value_bits), backend, seed=0)


def recorded(model: Model, model_rope: ModelRope, texts: Tensor, outliers: OutlierTokens) -> Iterator[LayerStats]:
    """What each layer sees of texts int64 [S, T], one layer after another, text by text."""
    shape, device = model.config, model.device
    count, length = texts.shape
    rope = at_positions(model_rope, torch.arange(length, device=device)[None])
    with HiddenStates(count, length, shape.hidden_size, model.dtype, device) as hidden:
        for at in range(count):
            hidden[at] = model.embed(texts[at].to(device))
        for index in range(shape.num_layers):
            yield _recorded_layer(model, index, rope, texts, hidden, outliers)


def _recorded_layer(
    model: Model, index: int, rope: StepRope, texts: Tensor, hidden: HiddenStates, outliers: OutlierTokens
) -> LayerStats:
    """What one layer sees; ``hidden`` goes through it."""
    shape = model.config
    recorder = Recorder(
        len(texts), rope.of(index), shape.num_heads, shape.num_kv_heads, shape.head_size, shape.attention_spans[index]
    )
    for at, text in enumerate(texts):
        x = model.layer(index, hidden[at][None], rope, recorder)[0]
        if not isfinite(float(recorder.key_norms.sum() + x.sum(dtype=torch.float32))):
            raise broken_model(f"what layer {index} computes is not all finite numbers")
        hidden[at] = x
        outliers.see(text, recorder.key_norms)
    outliers.advance()
    return recorder.stats(model.output_matrix(index))


def stacked(layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of all layers, the layer first."""
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def mixed(heads: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> dict[str, Tensor]:
    """A layer's tensors from the fits (of keys, of values) that each kv head takes: neither side depends on the other.

    Where all heads take the same, tensors need not have heads.
    """
    one = all(keys is heads[0][0] and values is heads[0][1] for keys, values in heads)
    found = {}
    for name in heads[0][0]:
        side = 0 if name.startswith(("key_", "query_")) else 1
        tensors = [fits[side][name] for fits in heads]
        found[name] = tensors[0] if one else torch.stack([tensor[head] for head, tensor in enumerate(tensors)])
    return found


def fit_layer(stats: LayerStats, rope: RopeFrequencies, config: CacheConfig, backend: Backend, seed: int) -> dict[str, Tensor]:
    """Tensors of one layer at the config's key and value bits, on the CPU."""
    with one_thread():
        return {name: t.cpu() for name, t in _fit(stats, rope, config, backend, seed).items()}


def _fit(stats: LayerStats, rope: RopeFrequencies, config: CacheConfig, backend: Backend, seed: int) -> dict[str, Tensor]:
    if config.method == "reorder":
        return fit_reorder(stats, config, seed)
    if config.method == "plain":
        return fit_plain(stats, config)
    return fit_rotate(stats, rope, config, backend)
