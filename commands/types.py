"""Values of options as click reads them."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import click

from skvq.commands.text import file_text
from skvq.engine.config import BITS


def bits_of(context: click.Context, parameter: click.Parameter, value: str) -> float:
    """Click callback: a bit width of ``BITS``."""
    try:
        bits = float(value)
    except ValueError:
        bits = 0.0
    if bits not in BITS:
        raise click.BadParameter(f"{value!r} is not one of {', '.join(f'{b:g}' for b in BITS)}")
    return bits


MULTIPLES = {"k": 1000, "m": 1000**2, "K": 1024, "M": 1024**2}
"""What a letter behind a number of tokens stands for, as in vLLM: small letters are decimal, capitals binary."""


def count_of(text: str) -> int:
    """A whole number of tokens: 131072, 131_072, 1e6, 128K or 1m. Raises ValueError.

    >>> count_of("131_072"), count_of("1e6"), count_of("128K"), count_of("32.2k"), count_of("0.5M")
    (131072, 1000000, 131072, 32200, 524288)
    """
    multiple = MULTIPLES.get(text[-1:], 1)
    try:
        number = Decimal(text if multiple == 1 else text[:-1]) * multiple  # exact: 32.2k is 32,200
        good = 0 <= number < 2**31 and number == int(number)
    except ArithmeticError:
        good = False
    if not good:
        raise ValueError(text)
    return int(number)


def counts_of(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """Click callback: comma-separated token counts."""
    try:
        counts = [count_of(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers of tokens such as 4096,32768 or 4K,32K") from None
    if 0 in counts:
        raise click.BadParameter(f"{value!r} holds a context of no tokens: from 1 on there is something to do")
    return counts


class TokenCount(click.ParamType):  # type: ignore[type-arg]
    """Click type: a number of tokens, ``least`` or more."""

    name = "tokens"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: str | int, parameter: click.Parameter | None, context: click.Context | None) -> int:
        """The number that the text stands for."""
        try:
            count = value if isinstance(value, int) else count_of(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of tokens below 2**31 such as 131072, 1e6, 128K (131072), 128k (128000)")
        if count < self.least:
            self.fail(f"{count} is too few tokens: give {self.least} or more")
        return count


class Seed(click.ParamType):  # type: ignore[type-arg]
    """Click type: a whole number, or ``random``, which is None."""

    name = "seed"

    def convert(self, value: str | int, parameter: click.Parameter | None, context: click.Context | None) -> int | None:
        """The number, if it is one."""
        if value == "random":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor random")


def object_of(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """Click callback: a JSON object."""
    try:
        found = None if value is None else json.loads(value)
    except (ValueError, RecursionError):
        found = value
    if found is not None and not isinstance(found, dict):
        raise click.BadParameter(f"{value!r} is not a JSON object such as '{{\"enable_thinking\": false}}'")
    return found


def schema_of(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Click callback: a JSON schema, or what a file of that name holds."""
    return value if value is None or value.lstrip()[:1] in ("{", "[") else file_text(value)


def depths_of(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """Click callback: comma-separated percentages."""
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0,50,100") from None
    if not all(0 <= n <= 100 for n in numbers):
        raise click.BadParameter(f"{value!r}: depths are percentages from 0 to 100")
    return numbers
