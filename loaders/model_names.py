"""What a user types for a model: an alias, a path, or a repository of the hub, and what follows a colon."""

from __future__ import annotations

import re
from pathlib import Path

from skvq.engine.errors import ModelError, nearest
from skvq.loaders.fields import shorten
from skvq.loaders.published import ALIASES

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def split_name(model: str) -> tuple[str, str]:
    """A model's name, and what follows a colon: the GGUF file of a repository, or a type of blocks (``Q4_K``).

    >>> split_name("org/name:Q4_K_M"), split_name("smollm2-135m:Q4_K"), split_name("C:/m.gguf")
    (('org/name', 'Q4_K_M'), ('smollm2-135m', 'Q4_K'), ('C:/m.gguf', ''))
    """
    name, colon, tag = model.rpartition(":")
    is_name = bool(name and tag) and (name in ALIASES or is_repo(name) or existing(name) is not None)
    return (name, tag) if colon and is_name and existing(model) is None else (model, "")


def is_repo(name: str) -> bool:
    """Whether ``org/name`` is of the hub: no path of this machine."""
    return REPO.fullmatch(name) is not None and existing(name) is None


def require_name(model: str) -> None:
    if not model.strip():
        raise ModelError("no model given: use an alias (`skvq models`), a folder, a .gguf file, or org/name on the hub")


def existing(text: str) -> Path | None:
    """The path, if it exists; None also for a text that cannot be one."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the home of a user who is none
        return None


def as_repo(model: str) -> str:
    """The text as ``org/name``, or the ModelError of an unknown model."""
    if REPO.fullmatch(model):
        return model
    if model.endswith(".gguf") or "/" in model:
        raise ModelError(f"no file or folder {shorten(model)!r} exists: check the path, or give org/name on the hub")
    raise ModelError(
        f"unknown model {shorten(model)!r}{nearest(shorten(model), ALIASES)} "
        "(also accepted: a folder, a .gguf file, or org/name on the Hugging Face hub)"
    )
