"""Errors that a user can fix: one line that says what is wrong, with the numbers, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SkvqError(Exception):
    """Base of every error that a user can fix. The command line prints it as one line and exits with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class OptionError(SkvqError):
    """An option is unknown, malformed, or conflicts with another."""


class ModelError(SkvqError):
    """Weights, config or tokenizer are missing, corrupt, or of a kind this engine does not support."""


class CapacityError(SkvqError):
    """Something does not fit: the card, the arena, the page table, or a sequence's context."""


class CalibrationError(SkvqError):
    """A calibration artifact is broken or belongs to another model or other options."""


class SessionError(SkvqError):
    """A session file is broken or belongs to another model, calibration or other options."""


def broken_model(found: str) -> ModelError:
    """The error of a model that computes what is no number; ``found``: where that was seen."""
    return ModelError(
        f"{found}: the model's weights are damaged, or its activations do not fit this dtype; try --dtype bfloat16 or float32"
    )


def counted(count: int, what: str) -> str:
    """A number of things, for people.

    >>> counted(1, "token"), counted(2048, "token")
    ('1 token', '2,048 tokens')
    """
    return f"{count:,} {what}{'s' * (count != 1)}"


def shortened(text: str, most: int = 80) -> str:
    """The beginning of a text that may be long.

    >>> shortened("abcdefgh", 6)
    'abc...'
    """
    return text if len(text) <= most else text[: most - 3] + "..."


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the valid name closest to ``name``, else the list of all.

    >>> nearest("windw", ["window", "sinks"])
    "; did you mean 'window'?"
    """
    choices = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(choices)}"


def require_known(name: str, valid: Iterable[str], what: str) -> None:
    """Raise ``OptionError`` naming the nearest valid name unless ``name`` is one of ``valid``."""
    choices = list(valid)
    if not isinstance(name, str) or name not in choices:
        raise OptionError(f"unknown {what} {name!r}{nearest(name, choices)}")
