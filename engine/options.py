"""Unknown keywords are refused with the nearest valid one, wherever a user passes options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

from skvq.engine.errors import OptionError, nearest

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require_type(what: str, value: object, *kinds: type | None) -> None:
    """Raise OptionError unless ``value`` is of one of the kinds, None among them."""
    if not any(value is None if kind is None else isinstance(value, kind) for kind in kinds):
        raise OptionError(f"{what} must be {' or '.join(k.__name__ if k else 'None' for k in kinds)}, got {value!r}")


def names_options(function: F) -> F:
    """Make a call with an unknown keyword raise OptionError, naming the nearest valid one, instead of TypeError."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        for name in options:
            if name not in known:
                valid = [n for n in known if n not in ("self", "cls")]
                raise OptionError(f"unknown option {name!r}{nearest(name, valid)}")
        return function(*args, **options)

    return checked  # type: ignore[return-value]


def option_class(cls: C) -> C:
    """``names_options`` for the constructor of a dataclass."""
    setattr(cls, "__init__", names_options(getattr(cls, "__init__")))  # noqa: B009, B010 (mypy: an assignment is unsound)
    return cls
