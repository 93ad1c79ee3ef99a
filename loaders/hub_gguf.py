"""GGUF files of a repository, by the end of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from skvq.engine.errors import ModelError
from skvq.loaders.fields import shorten
from skvq.loaders.hub_cache import OFFLINE, cached, fetch, how_to_get, is_complete, listed
from skvq.loaders.model_files import PART
from skvq.loaders.model_names import is_repo
from skvq.loaders.rounded import ROUNDED


def rounds(name: str, tag: str, *, download: bool) -> bool:
    """Whether ``NAME:TAG`` asks for weights to be rounded: it does not if a repository has a GGUF file that is named so."""
    if tag != ROUNDED or not is_repo(name):
        return tag == ROUNDED
    folder = cached(name)
    here = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")] if folder is not None else []
    if named_by(tag, here)[0]:
        return False
    if folder is not None and is_complete(folder):
        return True
    return download and not named_by(tag, listed(name, name))[0]


def require_no_ggufs(model: str, repo: str) -> None:
    """Raise ModelError that says how to name one, if a repository has GGUF files and no safetensors; nothing if it cannot be
    asked: what was wrong before says more."""
    try:
        files = listed(model, repo)
    except ModelError:
        return
    ggufs = [PART.sub("", file).removesuffix(".gguf") for file in files if file.lower().endswith(".gguf")]
    if ggufs and not any(file.lower().endswith(".safetensors") for file in files):
        names = list(dict.fromkeys(ggufs))
        tags = ", ".join(f"{repo}:{name.rpartition('/')[2]}" for name in names[:3])
        raise ModelError(f"{repo} holds no safetensors but {len(names)} GGUF files: give one of them, as {tags}")


def gguf_of(model: str, repo: str, tag: str, *, download: bool) -> Path:
    """The GGUF file of a repository that ``tag`` names, or its first part; of the cache, if there it is the end of one name."""
    folder = cached(repo)
    here = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.gguf"))} if folder is not None else {}
    found, sure = named_by(tag, here)
    if download and not (sure and _is_whole(found)):
        found, _ = named_by(tag, listed(model, repo))
    if not found:
        why = f"{repo} has no GGUF file with {shorten(tag)!r} in its name" if download else OFFLINE
        raise ModelError(how_to_get(model, repo, why))
    models = list(dict.fromkeys(PART.sub("", file) for file in found))
    if len(models) > 1:
        names = ", ".join(map(shorten, models[:4]))
        raise ModelError(f"model {shorten(model)!r} may be {len(models)} GGUF files ({names}): give more of one's name")
    if all(file in here for file in found):
        return here[found[0]]
    return fetch(model, repo, tuple(found)) / found[0]


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
