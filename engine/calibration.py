"""Which calibration an engine uses: the one it is given, the one cached for this user, or one made now."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from skvq.calibrate.corpus import BUILT_IN, built_in_corpus
from skvq.calibrate.sensitivity import PROBE_TOKENS
from skvq.engine.calibrating import make_artifact
from skvq.engine.codecs import check_tensors
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CalibrationError, OptionError, SkvqError, counted
from skvq.engine.identity import rope_digest
from skvq.engine.loaded import LoadedModel
from skvq.engine.model_config import ModelConfig
from skvq.engine.options import is_whole
from skvq.engine.report import Reporter
from skvq.loaders.artifact import (
    Artifact,
    ArtifactHeader,
    load_artifact,
    load_header,
    require,
    require_replaceable,
    save_artifact,
)
from skvq.loaders.files import cache_folder, require_writable
from skvq.loaders.text import first_tokens

RECIPE = 2
"""Goes up when the same text would give another calibration: those kept from before are then made anew."""
DEFAULT_TOKENS = 8192
DUMMY_TOKENS = 256
LEAST_TOKENS = 256
"""Of a corpus, unless fewer are asked for."""


MOST_SEED = 2**32 - 1
"""Of scikit-learn's clustering."""


def calibrate_to(
    path: Path,
    loaded: LoadedModel,
    cache: CacheConfig,
    corpus: str,
    *,
    corpus_name: str,
    tokens: int,
    seed: int,
    report: Reporter,
) -> ArtifactHeader:
    """Calibrate on the first ``tokens`` of a text and write the file; what cannot be done is refused before the work."""
    cache = cache.fitted(loaded.model.config)
    if not cache.is_packed:
        raise OptionError("method 'fp' keeps 16 bits and needs no calibration")
    for what, number, least, most in (("tokens", tokens, 1, 2**31 - 1), ("seed", seed, 0, MOST_SEED)):
        if not is_whole(number) or not least <= number <= most:
            raise OptionError(f"{what} must be a whole number from {least} to {most:,}, got {number!r}")
    require_replaceable(path)
    ids = first_tokens(loaded.tokenizer, corpus, tokens, bos=False)
    if len(ids) < (least := min(tokens, LEAST_TOKENS)):
        raise OptionError(f"the corpus, {corpus_name}, has {counted(len(ids), 'token')}: give a text of at least {least}")
    if len(ids) < tokens:
        report.message(
            f"the corpus has {len(ids):,} of the {counted(tokens, 'token')} asked for: the cache will be less accurate"
        )
    header = header_for(cache, loaded, corpus_name, len(ids), seed)
    artifact = make_artifact(loaded, cache, ids, header, report)
    save_artifact(artifact, path)
    return artifact.header


def header_for(cache: CacheConfig, loaded: LoadedModel, corpus: str, tokens: int, seed: int = 0) -> ArtifactHeader:
    """Header of an artifact for this cache and model."""
    return ArtifactHeader(
        fingerprint=loaded.fingerprint,
        method=cache.method,
        key_bits=cache.key_bits,
        value_bits=cache.value_bits,
        group_size=cache.group_size,
        bits_budget=cache.bits_budget,
        layer_bits=cache.layer_bits,
        corpus=corpus,
        tokens=tokens,
        seed=seed,
        rope=rope_digest(loaded.rope),
    )


def with_chosen_bits(cache: CacheConfig, path: Path, model: ModelConfig, **wanted: object) -> CacheConfig:
    """The cache with the bits of each layer that the artifact at ``path`` chose, if they are open.

    Raises CalibrationError unless the artifact's header has this method and budget and what is ``wanted``, and its bits are
    those of as many layers and heads as the model has.
    """
    if not cache.is_open:
        return cache
    header = load_header(path)
    require(header, str(path), **wanted, method=cache.method, bits_budget=cache.bits_budget)
    chosen = replace(cache.fitted(model), layer_bits=header.layer_bits)
    _require_bits_of(chosen, model, path)
    return chosen


def _require_bits_of(chosen: CacheConfig, model: ModelConfig, path: Path) -> None:
    """Raise CalibrationError unless the chosen bits are those of as many layers and heads as the model has."""
    try:
        chosen.fitted(model)
    except OptionError as error:
        raise CalibrationError(f"calibration {path} is not for this model: {error}") from error


def as_calibrated(cache: CacheConfig, path: Path, model: ModelConfig, fingerprint: str) -> CacheConfig:
    """The cache fitted to a model, with the bits of each layer that the artifact at ``path`` chose, if they are open.

    Raises CalibrationError unless the artifact is for this model and these options; its tensors are not read.
    """
    cache = with_chosen_bits(cache, path, model, fingerprint=fingerprint).fitted(model)
    require_made_for(path, load_header(path), cache, fingerprint)
    return cache


def settled(cache: CacheConfig, path: Path | None, model: ModelConfig, fingerprint: str) -> CacheConfig:
    """The cache fitted to a model, and as the calibration at ``path`` chose its bits, if one is given (``as_calibrated``).

    Raises OptionError for a calibration of 16 bits.
    """
    if path is None:
        return cache.fitted(model)
    if not cache.is_packed:
        raise needs_none(path)
    return as_calibrated(cache, path, model, fingerprint)


def needs_none(path: Path) -> OptionError:
    """The error of a calibration given to caches of 16 bits alone."""
    return OptionError(f"method 'fp' keeps 16 bits and needs no calibration: leave {path} out")


def require_made_for(path: Path, header: ArtifactHeader, cache: CacheConfig, fingerprint: str) -> None:
    """Raise CalibrationError unless the artifact at ``path`` was made for this model and these options."""
    require(header, str(path), fingerprint=fingerprint, method=cache.method, bits_budget=cache.bits_budget)
    require(header, str(path), key_bits=cache.key_bits, value_bits=cache.value_bits, group_size=cache.group_size)
    if not cache.is_open:
        require(header, str(path), layer_bits=cache.layer_bits)


def load_for(path: Path, loaded: LoadedModel, cache: CacheConfig, report: Reporter) -> Artifact:
    """The artifact at ``path``, refused unless it was made for this model and these options. It serves another RoPE less well:
    keys are calibrated as they are turned."""
    artifact, config = load_artifact(path), loaded.model.config
    header = artifact.header
    require_made_for(path, header, cache, loaded.fingerprint)
    check_tensors(artifact.tensors, cache, config, str(path))
    _require_bits_of(replace(cache, layer_bits=header.layer_bits), config, path)
    if header.rope not in ("", rope_digest(loaded.rope)):
        report.message(
            f"calibration {path} was made with another RoPE (--rope-scaling, or --ctx where that changes it): the cache is "
            "less accurate than with one of its own"
        )
    return artifact


def cached_or_made(loaded: LoadedModel, cache: CacheConfig, report: Reporter) -> Artifact:
    """The artifact for this model, its RoPE and this cache: from the user's cache folder, else made now on the built-in corpus
    and kept."""
    header = header_for(cache, loaded, BUILT_IN, DUMMY_TOKENS if loaded.dummy else DEFAULT_TOKENS)
    key = {**asdict(header), "recipe": RECIPE}
    if cache.is_open:
        key["window"] = min(cache.window, PROBE_TOKENS // 4)  # what is not packed counts for nothing when bits are chosen
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    why = "no calibration for this model and these options yet"
    try:
        path = cache_folder() / "calibration" / f"{digest[:32]}.safetensors"
        if path.is_file():
            return load_for(path, loaded, cache, report)
        path.parent.mkdir(parents=True, exist_ok=True)
        require_writable(path)
        where = f", to keep in {path.parent}"
    except CalibrationError as error:
        why, where = f"a calibration that was kept cannot be used ({error})", ", in its place"
    except (SkvqError, OSError) as error:
        told = f"{error.filename or 'the folder for calibrations'}: {error.strerror}" if isinstance(error, OSError) else error
        path, where = None, f", for this run only ({told})"
    report.message(f"{why}: making one from {BUILT_IN}{where}")
    ids = loaded.tokenizer.encode(built_in_corpus(), bos=False)
    artifact = make_artifact(loaded, cache, ids, header, report)
    try:
        if path is not None:
            save_artifact(artifact, path)
    except (SkvqError, OSError) as error:
        report.message(f"the calibration could not be kept and is used for this run only: {error}")
    return artifact
