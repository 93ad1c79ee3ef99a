"""Which calibration an engine uses: the one it is given, the one cached for this user, or one made now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from skvq.calibrate.run import built_in_corpus, calibrate, texts_of
from skvq.engine.codecs import check_tensors
from skvq.engine.config import CacheConfig
from skvq.engine.errors import SkvqError
from skvq.engine.model import Model
from skvq.engine.report import Reporter
from skvq.kernels.interface import Backend, RopeFrequencies
from skvq.loaders.artifact import Artifact, ArtifactHeader, load_artifact, save_artifact
from skvq.loaders.files import cache_folder

DEFAULT_TOKENS = 8192
DUMMY_TOKENS = 256
BUILT_IN = "pydoc_data.topics"


def make_artifact(
    model: Model,
    rope: RopeFrequencies,
    cache: CacheConfig,
    ids: list[int],
    header: ArtifactHeader,
    backend: Backend,
    report: Reporter,
) -> Artifact:
    """Calibrate on the first ``header.tokens`` of ``ids``."""
    texts = texts_of(ids, header.tokens)
    with report.bar(f"calibrating {cache.method} on {texts.numel():,} tokens", model.config.num_layers) as bar:
        tensors = calibrate(model, rope, texts, cache, backend, seed=header.seed, progress=lambda done, layers: bar.advance(1))
    return Artifact(header, tensors)


def header_for(cache: CacheConfig, fingerprint: str, corpus: str, tokens: int, seed: int = 0) -> ArtifactHeader:
    """Header of an artifact for this cache and model."""
    return ArtifactHeader(
        fingerprint=fingerprint,
        method=cache.method,
        key_bits=cache.key_bits,
        value_bits=cache.value_bits,
        group_size=cache.group_size,
        corpus=corpus,
        tokens=tokens,
        seed=seed,
    )


def load_for(path: Path, model: Model, cache: CacheConfig, fingerprint: str) -> Mapping[str, Tensor]:
    """Tensors of the artifact at ``path``, refused unless it was made for this model and these options."""
    artifact = load_artifact(path)
    artifact.require(
        str(path),
        fingerprint=fingerprint,
        method=cache.method,
        key_bits=cache.key_bits,
        value_bits=cache.value_bits,
        group_size=cache.group_size,
    )
    check_tensors(artifact.tensors, cache, model.config, str(path))
    return artifact.tensors


def cached_or_made(
    model: Model,
    rope: RopeFrequencies,
    cache: CacheConfig,
    fingerprint: str,
    encode: Callable[[str], list[int]],
    tokens: int,
    backend: Backend,
    report: Reporter,
) -> Mapping[str, Tensor]:
    """Tensors for this model and cache: from the user's cache folder, else calibrated now on the built-in corpus and kept."""
    header = header_for(cache, fingerprint, BUILT_IN, tokens)
    digest = hashlib.sha256(json.dumps(asdict(header), sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "calibration" / f"{digest[:32]}.safetensors"
    if path.is_file():
        return load_for(path, model, cache, fingerprint)
    report.message(f"no calibration of this model for these options yet: making one from {BUILT_IN}, kept in {path.parent}")
    artifact = make_artifact(model, rope, cache, encode(built_in_corpus()), header, backend, report)
    try:
        save_artifact(artifact, path)
    except SkvqError as error:
        report.message(f"the calibration serves this run only: {error}")
    return artifact.tensors
