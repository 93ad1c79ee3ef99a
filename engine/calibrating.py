"""A calibration made now: what it takes, and the work."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from skvq.calibrate.budget import budget_work, calibrate_budget, candidates
from skvq.calibrate.outliers import OutlierTokens
from skvq.calibrate.run import calibrate, rehearse, texts_of
from skvq.calibrate.sensitivity import PROBE_STEP, PROBE_TOKENS
from skvq.calibrate.stats import SAMPLE_TEXTS
from skvq.engine.codecs import tensor_shapes
from skvq.engine.config import CacheConfig
from skvq.engine.dual_chunks import TrueDistances
from skvq.engine.errors import CapacityError
from skvq.engine.loaded import LoadedModel
from skvq.engine.machine import available_memory
from skvq.engine.model_config import ModelConfig
from skvq.engine.report import Reporter
from skvq.engine.sizes import computed_numbers, gib
from skvq.loaders.artifact import (
    Artifact,
    ArtifactHeader,
)

CPU = torch.device("cpu")


def make_artifact(
    loaded: LoadedModel, cache: CacheConfig, ids: list[int], header: ArtifactHeader, report: Reporter
) -> Artifact:
    """Calibrate on the first ``header.tokens`` of ``ids``; a budget is spent, and the header says how.

    Texts are as short as any model was trained on, and not cut into chunks: one calibration serves every context. Tokens whose
    keys stand out are named in the header, and reported. Raises CapacityError if there is no memory for the work.
    """
    model, rope, backend = loaded.model, replace(loaded.rope, distances=TrueDistances()), loaded.backend
    texts = texts_of(ids, header.tokens)
    header = replace(header, tokens=texts.numel())
    count, length = texts.shape
    needed = {model.device: work_bytes(model.config, cache, count, length, model.dtype.itemsize)}
    needed[CPU] = needed.get(CPU, 0) + kept_bytes(model.config, cache)
    for device, nbytes in needed.items():
        if nbytes > (left := available_memory(device)):
            raise CapacityError(
                f"a calibration takes about {gib(nbytes)} beside the model, only {gib(left)} is available: make one where "
                "there is more (skvq calibrate) and pass its file (--calibration), or use --method fp"
            )
    outliers = OutlierTokens(texts)
    rehearse(model, rope, texts, cache, backend)
    if cache.is_open:
        label = f"choosing bits for {cache.method} on {texts.numel():,} tokens"
        with report.bar(label, budget_work(model.config, texts, cache)) as bar:
            layer_bits, tensors = calibrate_budget(
                model, rope, texts, cache, backend, seed=header.seed, progress=bar.advance, outliers=outliers
            )
        header = replace(header, layer_bits=layer_bits)
    else:
        with report.bar(f"calibrating {cache.method} on {texts.numel():,} tokens", model.config.num_layers) as bar:
            tensors = calibrate(model, rope, texts, cache, backend, seed=header.seed, progress=bar.advance, outliers=outliers)
    found = outliers.found()
    if found:
        report.message(
            f"the keys of token ids {', '.join(map(str, found))} are outliers wherever they occur: --filter key-outliers, or "
            f'--filter "token-ids(ids={list(found)})", keeps these tokens in 16 bits'
        )
    return Artifact(replace(header, outlier_tokens=found), tensors)


FITS = {"rotate": 3.0, "reorder": 1.5, "plain": 1.5}
"""A layer's statistics and what fits make of them at one time, in multiples of the statistics, beside ``LIBRARIES`` bytes; as
measured on a CPU with 3 to 32 kv heads of 64 and 128 channels."""


LIBRARIES = 64 << 20


def work_bytes(model: ModelConfig, cache: CacheConfig, texts: int, tokens: int, size: int) -> int:
    """About what calibration holds at a time beside the model: a text's activations, statistics and fits of a layer
    (``calibrate.stats``), and for a budget of bits the answers of a probe, exact, disturbed and in between."""
    kv, sample = model.num_kv_heads * model.head_size, min(texts, SAMPLE_TEXTS)
    statistics = 8 * tokens * kv + 16 * kv * model.head_size + 8 * sample * tokens * kv
    answers = 3 * 4 * model.vocab_size * min(tokens, PROBE_TOKENS) // PROBE_STEP if cache.is_open else 0
    return tokens * computed_numbers(model) * max(size, 4) + int(FITS[cache.method] * statistics) + answers + LIBRARIES


def kept_bytes(model: ModelConfig, cache: CacheConfig) -> int:
    """What it holds in host memory at its end: tensors of all layers, at each width while a budget is spent, and twice those of
    the file, stacked and as they are written."""
    widths = len(candidates(cache.code_bits)) if cache.is_open else 1
    return (widths + 2) * 4 * sum(map(prod, tensor_shapes(cache, model).values()))
