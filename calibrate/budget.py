"""Spending a budget of bits: every layer is fitted at several widths, the cost of each is measured, the best choice is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from skvq.calibrate.allocate import choose_bits
from skvq.calibrate.outliers import OutlierTokens
from skvq.calibrate.pages import through_pages
from skvq.calibrate.run import Progress, fit_layer, recorded, stacked
from skvq.calibrate.sensitivity import PROBE_TOKENS, Probe, Store
from skvq.engine.codecs import head_codecs, label_codecs, layouts_of
from skvq.engine.config import BITS, CacheConfig, ModelConfig
from skvq.engine.model import Model
from skvq.kernels.interface import Backend, RopeFrequencies

FIT_WORK, HEAD_WORK = 4, 4
"""Cost of fitting a layer at one width, and of the answers of a probe, in passes of the probe through one layer."""

LayerBits = tuple[tuple[float, float], ...]


def candidates(code_bits: float) -> tuple[float, ...]:
    """Widths worth trying where codes have ``code_bits`` on average: far wider ones are never chosen.

    >>> candidates(1.75), candidates(3.75)
    ((1.5, 2.0, 3.0, 4.0), (1.5, 2.0, 3.0, 4.0, 8.0))
    """
    return tuple(bits for bits in BITS if bits <= max(4.0, 2.5 * code_bits))


def budget_work(model: ModelConfig, texts: Tensor, config: CacheConfig) -> float:
    """What ``calibrate_budget`` will report as progress."""
    widths = len(candidates(config.code_bits))
    return sum(_layer_work(model, texts, widths, layer) for layer in range(model.num_layers))


def _layer_work(model: ModelConfig, texts: Tensor, widths: int, layer: int) -> float:
    to_the_end = model.num_layers - layer + HEAD_WORK
    return texts.numel() / PROBE_TOKENS + (FIT_WORK + 2) * widths + 2 * to_the_end


@torch.no_grad()
def calibrate_budget(
    model: Model,
    frequencies: RopeFrequencies,
    texts: Tensor,
    config: CacheConfig,
    backend: Backend,
    *,
    seed: int,
    progress: Progress,
    outliers: OutlierTokens,
) -> tuple[LayerBits, dict[str, Tensor]]:
    """Bits of each layer within ``config.bits_budget``, and the tensors of ``engine.codecs`` at those bits.

    texts int64 [S, T]; the last of them is the probe: how values are read back is fitted on others. ``progress`` comes to
    ``budget_work``. Memory as ``calibrate`` says, with the tensors of every layer at every width, and the probe's.
    """
    assert config.is_open, "there is no budget to spend"
    widths = candidates(config.code_bits)
    probe = Probe(model, frequencies, texts[-1][:PROBE_TOKENS].to(model.weights.embedding.device), config.window)
    fits: list[dict[float, dict[str, Tensor]]] = []
    losses: list[list[float]] = []  # keys and values of the first layer, of the second, ...
    for stats in recorded(model, frequencies, texts, outliers):
        fitted = {bits: fit_layer(stats, frequencies, config.with_bits(bits, bits), backend, seed) for bits in widths}
        del stats  # before the next layer's are made
        stores = {b: _store(t, config.with_bits(b, b), model.config, frequencies, backend) for b, t in fitted.items()}
        losses += probe.losses(stores)
        probe.advance()
        progress(_layer_work(model.config, texts, len(widths), len(fits)))
        fits.append(fitted)
    chosen = choose_bits(losses, widths, config.code_bits)
    layer_bits = tuple(zip(chosen[::2], chosen[1::2], strict=True))
    return layer_bits, stacked([_mixed(fit[k], fit[v]) for fit, (k, v) in zip(fits, layer_bits, strict=True)])


def _mixed(of_keys: Mapping[str, Tensor], of_values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors, those of keys from one fit and those of values from another: neither depends on the other side."""
    return {name: (of_keys if name.startswith(("key_", "query_")) else of_values)[name] for name in of_keys}


def _store(
    tensors: Mapping[str, Tensor], config: CacheConfig, model: ModelConfig, frequencies: RopeFrequencies, backend: Backend
) -> Store:
    """What pages of one layer hold, for tensors of that layer."""
    one = replace(model, num_layers=1, attention_spans=())
    rows, device = {name: t[None] for name, t in tensors.items()}, frequencies.inv_freq.device
    layout = layouts_of(config, one)[0]
    if config.method == "reorder":
        labels = label_codecs(rows, one, frequencies, device)[0]
        return lambda keys, values: through_pages(keys, values, layout, labels, backend.pack_labels, backend.unpack_labels)
    heads = head_codecs(rows, config, one, frequencies, device)[0]
    return lambda keys, values: through_pages(keys, values, layout, heads, backend.pack_heads, backend.unpack_heads)
