"""The Hugging Face hub's cache on this machine, and what is fetched into it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from skvq.engine.errors import ModelError
from skvq.loaders.checkpoint import OTHER_NAMES, weight_files
from skvq.loaders.fields import reason, shorten
from skvq.loaders.model_names import split_name

PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "model*.safetensors", *OTHER_NAMES)
"""What is fetched of a repository: no pickles, no code, no second copy of the weights in another format."""


OFFLINE = "downloads are switched off"


def cached(repo: str) -> Path | None:
    """The newest snapshot of a repository in the local hub cache, however complete."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        return Path(str(snapshot_download(repo, local_files_only=True)))
    except Exception:
        return None


def is_complete(folder: Path) -> bool:
    """Whether a snapshot has its config and every shard of its weights."""
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder))
    except ModelError:
        return False


def listed(model: str, repo: str) -> list[str]:
    """The files of a repository. ModelError if there is no network, no such repository, or no permission."""
    return sorted(_asked(model, repo, "list_repo_files", "its files could not be listed"))


def fetch(model: str, repo: str, patterns: tuple[str, ...]) -> Path:
    """Fetch a repository into the hub cache. ModelError as of ``listed``."""
    return Path(str(_asked(model, repo, "snapshot_download", "it could not be downloaded", allow_patterns=list(patterns))))


def _asked(model: str, repo: str, function: str, failed: str, **options: Any) -> Any:
    """What a function of huggingface_hub says of a repository. ModelError if it fails, or is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(how_to_get(model, repo, "the huggingface_hub package is not installed")) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of tries that fail: what does in the end is told below
    try:
        return getattr(huggingface_hub, function)(repo, **options)
    except Exception as error:
        raise ModelError(how_to_get(model, repo, f"{failed}: {reason(error)}")) from error


def how_to_get(model: str, repo: str, why: str) -> str:
    _, tag = split_name(model)
    by_hand, fetched = "Put its config.json, tokenizer.json and *.safetensors into a folder and pass --model FOLDER", repo
    if tag:
        by_hand, fetched = "Pass --model FILE.gguf", f'{repo} --include "*{shorten(tag.removesuffix(".gguf"))}*.gguf"'
    origin = "" if repo in model else f" ({repo})"
    return (
        f"model {model!r}{origin} is not on this machine and {why}. {by_hand}, or run 'hf download {fetched}' on a machine "
        "with a network"
    )
