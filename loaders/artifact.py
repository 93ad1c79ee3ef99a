"""Calibration artifact: one safetensors file with a JSON header that says what it was made from and for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from skvq.engine.config import LayerWidths
from skvq.engine.errors import CalibrationError
from skvq.loaders.files import require_writable, write_atomically

SCHEMA = 4
HEADER_KEY = "skvq.calibration"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactHeader:
    """What an artifact belongs to (model, method, bits, group) and what it was made from (corpus, tokens, seed, RoPE)."""

    fingerprint: str
    method: str
    key_bits: float
    value_bits: float
    group_size: int
    bits_budget: float | None
    layer_bits: tuple[LayerWidths, ...]  # as CacheConfig's
    corpus: str
    tokens: int
    seed: int
    outlier_tokens: tuple[int, ...] = ()  # ids whose keys stand out wherever they occur in the corpus
    rope: str = ""  # its digest; of files of before, empty
    schema: int = SCHEMA


KINDS: Mapping[str, type | UnionType] = {
    **dict.fromkeys(("fingerprint", "method", "corpus", "rope"), str),
    **dict.fromkeys(("key_bits", "value_bits"), int | float),
    **dict.fromkeys(("group_size", "tokens", "seed"), int),
    **dict.fromkeys(("layer_bits", "outlier_tokens"), list),
    "bits_budget": int | float | None,
}
"""Of the values in a file's header."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """Header and tensors, stacked over layers: names and shapes are those of ``engine.codecs``."""

    header: ArtifactHeader
    tensors: Mapping[str, Tensor]


def require(header: ArtifactHeader, where: str, **wanted: object) -> None:
    """Raise CalibrationError naming both values unless every header field in ``wanted`` matches."""
    for name, value in wanted.items():
        found = getattr(header, name)
        if found != value and name == "fingerprint":
            raise CalibrationError(
                f"calibration {where} was made for another model (its fingerprint begins with {found[:8]}, this one's with "
                f"{str(value)[:8]}): calibrate again (skvq calibrate), or give this model's own"
            )
        if found != value:
            raise CalibrationError(
                f"calibration {where} was made for {name} {_shown(found)}, this run has {_shown(value)}: calibrate again "
                "(skvq calibrate) or change the options"
            )


def _shown(value: object) -> str:
    return "none" if value is None else repr(value)


def save_artifact(artifact: Artifact, path: Path) -> None:
    """Write the file under a temporary name, then rename. Same artifact, same bytes."""
    tensors = {name: artifact.tensors[name].contiguous().cpu() for name in sorted(artifact.tensors)}
    header = json.dumps({**asdict(artifact.header), "digest": _checksum(artifact.header, tensors)}, sort_keys=True)
    write_atomically(path, save(tensors, metadata={HEADER_KEY: header}))


def _checksum(header: ArtifactHeader, tensors: Mapping[str, Tensor]) -> str:
    told = json.dumps(asdict(header), sort_keys=True)
    return hashlib.sha256(f"{told}\n{digest_of(tensors)}".encode()).hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_artifact(path: Path) -> Artifact:
    """Read an artifact. Raises CalibrationError for a missing, broken, foreign or newer file."""
    with _opened(path) as file:
        header, digest = _header(file.metadata(), path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if _checksum(header, tensors) != digest:
        raise CalibrationError(f"calibration {path} is damaged, its checksum does not match: calibrate again")
    return Artifact(header, tensors)


def load_header(path: Path) -> ArtifactHeader:
    """The header alone. Raises CalibrationError for a missing, broken, foreign or newer file."""
    with _opened(path) as file:
        return _header(file.metadata(), path)[0]


def require_replaceable(path: Path) -> None:
    """Raise SkvqError unless a calibration can be written at ``path``, where nothing else may be: a model, a text."""
    require_writable(path)
    try:
        if path.exists() and path.stat().st_size:
            load_header(path)
    except CalibrationError:
        raise CalibrationError(
            f"{path} is there already and is no whole calibration of this skvq: remove it, or give another name"
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        if path.is_dir():
            raise CalibrationError(f"calibration {path} is a folder: give the file in it")
        if not path.is_file():
            raise CalibrationError(f"no calibration file at {path}: make one with `skvq calibrate --model MODEL -o {path}`")
        with path.open("rb") as opened, safe_open(_name_of(path, opened.fileno()), "pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError, TypeError, RecursionError) as error:
        raise CalibrationError(f"{path} is not an skvq calibration, or is damaged ({error}): give another file") from None


def _name_of(path: Path, opened: int) -> str:
    """A name that safetensors takes: of a file whose own is not UTF-8, that of its open descriptor."""
    try:
        str(path).encode()
        return str(path)
    except UnicodeEncodeError:
        return f"/proc/self/fd/{opened}"


def _header(metadata: Mapping[str, str] | None, path: Path) -> tuple[ArtifactHeader, str]:
    """The header, and the checksum of both."""
    text = (metadata or {}).get(HEADER_KEY)
    if text is None:
        raise CalibrationError(f"{path} is a safetensors file, but no skvq calibration, or is damaged: give another file")
    found = json.loads(text)
    known = {"digest", *(f.name for f in fields(ArtifactHeader))}
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise CalibrationError(f"calibration {path} has schema {schema}, this skvq reads {SCHEMA}: calibrate again")
    if set(found) | {"rope"} != known:
        raise CalibrationError(f"calibration {path} has a header that does not match schema {SCHEMA}: calibrate again")
    for name, kind in KINDS.items():
        if not isinstance(found.get(name, ""), kind) or isinstance(found.get(name), bool):
            raise CalibrationError(f"calibration {path} is damaged, its {name} is {str(found[name])[:40]!r}: calibrate again")
    digest = str(found.pop("digest"))
    return ArtifactHeader(**found | {name: _as_tuples(found[name]) for name in ("layer_bits", "outlier_tokens")}), digest


def _as_tuples(value: Any) -> Any:
    """Lists in lists, as tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
