"""Filter rules: which tokens stay in full precision when they leave the window (SKVQ, arXiv 2405.06219, section 3.3).

A rule has a budget of retained slots per sequence and layer and is asked once, a tile at a time, when tokens leave the window.
Rules are asked in the order of ``CacheConfig.filters``, attention sinks first; a token goes to the first rule that keeps it and
has a slot free, else it is packed. A user's rule is any object with the members of ``FilterRule``; by name it is found through
its import path ``package.module:Class`` or the entry point ``skvq.filters``.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from skvq.engine.errors import OptionError, SkvqError, nearest, shortened
from skvq.engine.options import is_number, is_whole, option_class

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ENTRY_POINT = "skvq.filters"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeavingTokens:
    """Tokens of one layer of one sequence that leave the window: T of them, whole tiles, in order of position.

    Statistics must stay within a tile, so that the answer does not depend on how many tiles leave at once.
    """

    layer: int
    tile: int
    positions: Tensor  # int64 [T]
    token_ids: Tensor  # int64 [T]
    keys: Tensor  # [T, KH, D], after RoPE
    values: Tensor  # [T, KH, D]
    attention_mass: Tensor  # float32 [T]: summed over heads and the `window` queries after the token; 0 if no rule needs it


@runtime_checkable
class FilterRule(Protocol):
    """What a rule must have.

    On a GPU rules are asked about different layers on different streams: keep tensors that outlive a call separately per layer.
    """

    @property
    def budget(self) -> int:
        """The most tokens it keeps in one sequence."""

    @property
    def needs_attention_mass(self) -> bool:
        """Whether ``attention_mass`` must be measured (costs a pass over the window in every step)."""

    def keep(self, tokens: LeavingTokens) -> Tensor:
        """bool [T]: the tokens that should stay in full precision."""


@option_class
@dataclass(frozen=True, slots=True)
class AttentionSinks:
    """The first ``n`` tokens of the sequence (StreamingLLM, arXiv 2309.17453)."""

    n: int = 5

    def __post_init__(self) -> None:
        _check_budget(self.n, "AttentionSinks.n", least=0)

    @property
    def budget(self) -> int:
        return self.n

    @property
    def needs_attention_mass(self) -> bool:
        return False

    def keep(self, tokens: LeavingTokens) -> Tensor:
        return tokens.positions < self.n


@option_class
@dataclass(frozen=True, slots=True)
class TokenIds:
    """Tokens with one of these ids: separators, role markers, whatever the user knows to matter."""

    ids: Collection[int]
    budget: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Collection):
            raise OptionError(f"TokenIds.ids must be a set of token ids, got {self.ids!r}")
        odd = [i for i in self.ids if not is_whole(i) or not 0 <= i < 2**31]
        if odd:
            raise OptionError(f"TokenIds.ids must be token ids, got {odd[0]!r}")
        object.__setattr__(self, "ids", frozenset(map(int, self.ids)))
        _check_budget(self.budget, "TokenIds.budget")

    def __repr__(self) -> str:
        """Identical for the same ids in any order: sessions are matched by it."""
        return f"TokenIds(ids=frozenset({{{', '.join(map(str, sorted(self.ids)))}}}), budget={self.budget})"

    @property
    def needs_attention_mass(self) -> bool:
        return False

    def keep(self, tokens: LeavingTokens) -> Tensor:
        from torch import searchsorted

        wanted = _rising(frozenset(self.ids), tokens.token_ids.device)
        at = searchsorted(wanted, tokens.token_ids).clamp_max(len(wanted) - 1)
        return wanted[at] == tokens.token_ids


@functools.lru_cache(maxsize=16)
def _rising(ids: frozenset[int], device: torch.device) -> Tensor:
    """-1, which is no token's id, and ``ids`` in order. Copied to a GPU once: later calls do not wait for it."""
    from torch import tensor

    return tensor([-1, *sorted(ids)], device=device)


@option_class
@dataclass(frozen=True, slots=True)
class KeyOutliers:
    """Tokens whose key norm lies ``threshold`` robust deviations from their tile's median: sinks that do not sit at the
    start have unusual, mostly small, keys (KVSink, arXiv 2508.04257). Deviation is 1.4826 * the median absolute one.
    """

    threshold: float = 6.0
    budget: int = 32

    def __post_init__(self) -> None:
        _check_budget(self.budget, "KeyOutliers.budget")
        _check_threshold(self.threshold, "KeyOutliers.threshold")

    @property
    def needs_attention_mass(self) -> bool:
        return False

    def keep(self, tokens: LeavingTokens) -> Tensor:
        norm = tokens.keys.float().norm(dim=-1).mean(-1).view(-1, tokens.tile)  # [tiles, tile]
        return stands_out(norm, self.threshold).flatten()


def stands_out(x: Tensor, threshold: float) -> Tensor:
    """Which of ``x`` [R, N] lie ``threshold`` robust deviations from the median of their row; bool [R, N]."""
    away = (x - x.median(1, keepdim=True).values).abs()
    deviation = 1.4826 * away.median(1, keepdim=True).values
    return away.gt(threshold * deviation.clamp_min(1e-6))


@option_class
@dataclass(frozen=True, slots=True)
class HeavyHitters:
    """Tokens that drew ``threshold`` times their tile's mean attention while in the window (H2O, arXiv 2306.14048)."""

    threshold: float = 8.0
    budget: int = 32

    def __post_init__(self) -> None:
        _check_budget(self.budget, "HeavyHitters.budget")
        _check_threshold(self.threshold, "HeavyHitters.threshold")

    @property
    def needs_attention_mass(self) -> bool:
        return True

    def keep(self, tokens: LeavingTokens) -> Tensor:
        mass = tokens.attention_mass.view(-1, tokens.tile)
        return (mass > self.threshold * mass.mean(1, keepdim=True)).flatten()


BUILT_IN: dict[str, Callable[..., FilterRule]] = {
    "sinks": AttentionSinks,
    "token-ids": TokenIds,
    "key-outliers": KeyOutliers,
    "heavy-hitters": HeavyHitters,
}


def rule_from_text(text: str) -> FilterRule:
    """A rule from ``name``, ``name(key=value, ...)`` or ``package.module:Class(...)``; values are Python literals.

    >>> rule_from_text("heavy-hitters(budget=16)")
    HeavyHitters(threshold=8.0, budget=16)
    """
    shown = shortened(text)
    name, bracket, rest = text.strip().partition("(")
    try:
        if bracket and not rest.endswith(")"):
            raise ValueError("missing ')'")
        call = ast.parse(f"f({rest[:-1] if bracket else ''})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("more than one pair of brackets")
        args = [ast.literal_eval(a) for a in call.args]
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = "values must be numbers, 'texts' or lists of such" if "malformed node" in str(error) else error
        raise OptionError(f"filter rule {shown!r} is not of the form name(key=value, ...): {why}") from None
    try:
        rule: Any = _find_rule(name)(*args, **options)
    except SkvqError:
        raise
    except Exception as error:  # of another package's code
        why = re.sub(r"^[\w.]+\(\) ", "", str(error))
        raise OptionError(f"filter rule {shown!r} cannot be made ({type(error).__name__}: {why})") from None
    return check_rule(rule, f"filter rule {shown!r}")


def rule_texts(told: str) -> list[str] | None:
    """What ``rule_from_text`` reads, of built-in rules that are ``told`` by their repr, one after another; None if others are.

    >>> rule_texts("AttentionSinks(n=3), TokenIds(ids=frozenset({5, 6}), budget=2)")
    ['sinks(n=3)', 'token-ids(ids={5, 6}, budget=2)']
    """
    names, texts = {getattr(rule, "__name__", ""): name for name, rule in BUILT_IN.items()}, list[str]()
    try:
        calls = ast.parse(f"f({told})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of a file that anybody may have written
        return None
    for call in calls.args if isinstance(calls, ast.Call) else ():
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names):
            return None
        values = {k.arg: k.value.args[0] if isinstance(k.value, ast.Call) and k.value.args else k.value for k in call.keywords}
        texts.append(f"{names[call.func.id]}({', '.join(f'{name}={ast.unparse(value)}' for name, value in values.items())})")
    return texts


def check_rule(rule: object, what: str) -> FilterRule:
    """The rule, whoever wrote it, if it has what a rule must have; else OptionError."""
    if isinstance(rule, type):
        raise OptionError(f"{what} is a class: give a rule, as {rule.__name__}(...)")
    try:
        is_rule, budget = isinstance(rule, FilterRule), getattr(rule, "budget", 0)
    except Exception as error:  # of another package's code
        raise OptionError(f"{what} cannot be asked for its budget ({type(error).__name__}: {error})") from None
    if not is_rule:
        raise OptionError(f"{what} must have budget, needs_attention_mass and keep(tokens)")
    _check_budget(budget, f"budget of {what}", least=0)
    return cast(FilterRule, rule)


def _find_rule(name: str) -> Callable[..., Any]:
    plugins = {e.name: e for e in entry_points(group=ENTRY_POINT)}
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name in plugins:
        try:
            loaded: Callable[..., Any] = plugins[name].load()
        except Exception as error:  # another package's code
            raise OptionError(
                f"filter rule {name!r} of another package ({plugins[name].value}) cannot be imported: {error}"
            ) from None
        return loaded
    module, colon, attribute = name.partition(":")
    if not colon:
        raise OptionError(f"unknown filter rule {name!r}{nearest(name, [*BUILT_IN, *plugins])}")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of another package's code
        here = Path(f"{module.partition('.')[0]}.py").is_file()
        advice = ": for a file in this folder put PYTHONPATH=. before the command" if here else ""
        raise OptionError(f"filter rule {name!r} cannot be imported: {_told(error)}{advice}") from None
    return found


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"


def _check_threshold(value: float, what: str) -> None:
    if not is_number(value) or not value > 0:
        raise OptionError(f"{what} must be a positive number, got {value!r}")


def _check_budget(value: int, what: str, least: int = 1) -> None:
    if not is_whole(value) or not least <= value <= 65536:
        raise OptionError(f"{what} must be a whole number of tokens from {least} to 65536, got {value!r}")
