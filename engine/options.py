"""What users pass as options: unknown keywords are refused with the nearest valid one, numbers of numpy are numbers."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from skvq.engine.errors import OptionError, nearest

F = TypeVar("F", bound=Callable[..., Any])
SYNONYMS = {"ctx": "max_context", "n": "max_new_tokens", "sinks": "filters", "bits": "bits_budget"}
"""What others, or the command line, call options."""
C = TypeVar("C", bound=type)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain(value: object) -> object:
    """A number of another library, such as numpy, as Python's own; anything else as it is."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    try:
        return float(value) if isinstance(value, Real) else value
    except OverflowError:
        return value


def require_type(what: str, value: object, *kinds: type | None) -> None:
    """Raise OptionError unless ``value`` is of one of the kinds, None among them."""
    if not any(value is None if kind is None else isinstance(value, kind) for kind in kinds):
        raise OptionError(f"{what} must be {' or '.join(k.__name__ if k else 'None' for k in kinds)}, got {value!r}")


def path_of(what: str, value: object) -> Path:
    """The path a user gave. Raises OptionError if it is none."""
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise OptionError(f"{what} must be the path of a file, got {value!r}")
    return Path(value)


def path_or_none(what: str, value: object) -> Path | None:
    """``path_of``, where a user may leave it out."""
    return None if value is None else path_of(what, value)


def names_options(**classes: type) -> Callable[[F], F]:
    """Make a call with an unknown keyword raise OptionError, naming the nearest valid one, instead of TypeError.

    Keywords are given ``plain`` numbers. ``classes``: keywords that take an object with options of its own, which a user may
    have given to the call.
    """

    def decorated(function: F) -> F:
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]

        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> Any:
            for name in options:
                if name not in known:
                    raise OptionError(f"unknown option {name!r}{_advice(name, known, classes)}")
            return function(*args, **{name: plain(value) for name, value in options.items()})

        return checked  # type: ignore[return-value]

    return decorated


def _advice(name: str, known: Sequence[str], classes: Mapping[str, type]) -> str:
    if SYNONYMS.get(name) in known:
        return f": give it as {SYNONYMS[name]}"
    for option, kind in classes.items():
        if name in inspect.signature(kind).parameters:
            return f": give it as {option}={kind.__name__}({name}=...)"
    return nearest(name, [n for n in known if n not in ("self", "cls")])


def option_class(cls: C) -> C:
    """``names_options`` for the constructor of a dataclass."""
    setattr(cls, "__init__", names_options()(getattr(cls, "__init__")))  # noqa: B009, B010 (mypy: an assignment is unsound)
    return cls
