"""Spending a bit budget: every layer is fitted at several widths, the cost of each is measured, the best choice is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from skvq.calibrate.outliers import OutlierTokens
from skvq.calibrate.pages import through_pages
from skvq.calibrate.run import Progress, fit_layer, mixed, recorded, stacked
from skvq.calibrate.sensitivity import PROBE_TOKENS, Probe, Store
from skvq.engine.allocate import as_layer_bits, choose_bits
from skvq.engine.codecs import head_codecs, label_codecs, layouts_of
from skvq.engine.config import BITS, CacheConfig, LayerWidths
from skvq.engine.model import Model
from skvq.engine.model_config import ModelConfig
from skvq.engine.rope import ModelRope
from skvq.kernels.interface import Backend

FIT_WORK, HEAD_WORK = 4, 4
"""Cost of fitting a layer at one width, and of the answers of a probe, in passes of the probe through one layer."""


def candidates(code_bits: float) -> tuple[float, ...]:
    """Widths worth trying where codes have ``code_bits`` on average: far wider ones are never chosen.

    >>> candidates(1.75), candidates(3.75)
    ((1.5, 2.0, 3.0, 4.0), (1.5, 2.0, 3.0, 4.0, 8.0))
    """
    return tuple(bits for bits in BITS if bits <= max(4.0, 2.5 * code_bits))


def budget_work(model: ModelConfig, texts: Tensor, config: CacheConfig) -> float:
    """What ``calibrate_budget`` will report as progress."""
    widths = len(candidates(config.code_bits))
    return sum(_layer_work(model, texts, widths, len(_parts(model, config)), layer) for layer in range(model.num_layers))


def _layer_work(model: ModelConfig, texts: Tensor, widths: int, parts: int, layer: int) -> float:
    to_the_end = model.num_layers - layer + HEAD_WORK
    return texts.numel() / PROBE_TOKENS + (FIT_WORK + 2 * parts) * widths + 2 * to_the_end


def _parts(model: ModelConfig, config: CacheConfig) -> list[slice]:
    """Kv heads of a layer whose bits are chosen together."""
    heads = model.num_kv_heads
    return [slice(head, head + 1) for head in range(heads)] if config.by_head else [slice(0, heads)]


def calibrate_budget(
    model: Model,
    model_rope: ModelRope,
    texts: Tensor,
    config: CacheConfig,
    backend: Backend,
    *,
    seed: int,
    progress: Progress,
    outliers: OutlierTokens,
) -> tuple[tuple[LayerWidths, ...], dict[str, Tensor]]:
    """Bits of each layer, or of each of its kv heads, within ``config.bits_budget``, and tensors of ``engine.codecs`` at those.

    texts int64 [S, T]; the last of them is the probe: how values are read back is fitted on others. ``progress`` comes to
    ``budget_work``. Memory as ``calibrate`` says, with the tensors of every layer at every width, and the probe's.
    """
    assert config.is_open, "there is no budget to spend"
    widths = candidates(config.code_bits)
    probe = Probe(model, model_rope, texts[-1][:PROBE_TOKENS].to(model.device), config.window)
    fits: list[dict[float, dict[str, Tensor]]] = []
    losses: list[list[float]] = []  # keys and values of the first head (or layer), of the second, ...
    parts = _parts(model.config, config)
    for stats in recorded(model, model_rope, texts, outliers):
        rope = model_rope.alone(len(fits))
        fitted = {bits: fit_layer(stats, rope.turned, config.with_bits(bits, bits), backend, seed) for bits in widths}
        del stats  # before the next layer's are made
        stores = {b: _store(t, config.with_bits(b, b), model.config, rope, backend) for b, t in fitted.items()}
        losses += probe.losses(stores, parts)
        probe.advance()
        progress(_layer_work(model.config, texts, len(widths), len(parts), len(fits)))
        fits.append(fitted)
    layer_bits = as_layer_bits(choose_bits(losses, widths, config.code_bits), len(parts))
    chosen = replace(config, layer_bits=layer_bits).bits_of_heads(model.config)
    layers = [mixed([(fit[k], fit[v]) for k, v in heads]) for fit, heads in zip(fits, chosen, strict=True)]
    return layer_bits, stacked(layers)


def _store(tensors: Mapping[str, Tensor], config: CacheConfig, model: ModelConfig, rope: ModelRope, backend: Backend) -> Store:
    """What pages of one layer hold, for tensors of that layer."""
    one = replace(model, num_layers=1, attention_spans=(), unturned_layers=())
    rows, device = {name: t[None] for name, t in tensors.items()}, rope.turned.inv_freq.device
    layout = layouts_of(config, one)[0][0]
    if config.method == "reorder":
        labels = label_codecs(rows, one, rope, device)[0][0]
        return lambda keys, values: through_pages(keys, values, layout, labels, backend.labels)
    heads = head_codecs(rows, config, one, rope, device)[0][0]
    return lambda keys, values: through_pages(keys, values, layout, heads, backend.heads)
