"""Typed look-ups in JSON objects and GGUF metadata: a wrong type gives one line that names file, key and value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ExpertConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class Fields:
    """A mapping from a file. ``null`` counts as absent; an absent key without a default is a ModelError."""

    data: Mapping[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer below 2**31."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self._wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number that a float holds."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e300 or value != value:
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise self._wrong(key, value, "a positive number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of ``length`` finite positive numbers."""
        value = self._get(key, None)
        if not isinstance(value, list) or len(value) != length:
            size = f"{len(value)} values" if isinstance(value, list) else value
            raise self._wrong(key, size, f"a list of {length} numbers")
        return tuple(Fields({key: item}, self.where).positive(key) for item in value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; absent is the empty tuple."""
        value = self.data.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self._wrong(key, value, "a token id or a list of them")
        return tuple(items)

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.data.get(key) is not None

    def section(self, key: str) -> Fields:
        """A nested object; absent is empty."""
        value = self.data.get(key)
        if value is None:
            return Fields({}, f"{self.where}: {key}")
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Fields(value, f"{self.where}: {key}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"{self.where}: {key} is missing")
        return default

    def _wrong(self, key: str, value: Any, wanted: str) -> ModelError:
        return ModelError(f"{self.where}: {key} must be {wanted}, got {shorten(repr(value))}")


Config = TypeVar("Config", ModelConfig, ExpertConfig)


def config_of(kind: type[Config], where: str, **values: Any) -> Config:
    """A config whose errors name the file that the values come from."""
    try:
        return kind(**values)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


def shorten(text: str, limit: int = 80) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """Type and first line of an exception, short enough for a one-line message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shorten(lines[0], 160)}" if lines else type(error).__name__


def is_failure(error: BaseException) -> bool:
    """Whether it says that something failed: a panic of a library in Rust does, though it is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def read_by_library(what: str) -> Iterator[None]:
    """Around a library's work on a file: whatever fails is a ModelError that begins with ``what``."""
    try:
        yield
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ModelError(f"{what} ({reason(error)}): download it again") from error


def read_json(path: Path) -> Fields:
    """Parse a JSON object. ModelError if the file is missing, unreadable, not JSON, or not an object."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: copy it from the model's repository") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({reason(error)}): download it again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object, got {shorten(repr(data))}")
    return Fields(data, str(path))
