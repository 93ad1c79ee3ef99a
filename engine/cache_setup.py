"""What all sequences of an engine share."""

from __future__ import annotations

from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING, Protocol

import torch

from skvq.engine.arena import Arena
from skvq.engine.errors import CapacityError
from skvq.engine.filters import FilterRule
from skvq.engine.identity import Identity
from skvq.engine.methods import CacheMethod
from skvq.engine.regions import Regions
from skvq.engine.rope import ModelRope
from skvq.engine.streams import Streams
from skvq.kernels.interface import Backend

if TYPE_CHECKING:
    from skvq.engine.cache import SequenceCache


class OnFull(Protocol):
    """What a sequence asks before tokens are added."""

    @property
    def advice(self) -> str:
        """What else would help where they do not fit."""

    def room(self, left: int) -> int:
        """Tokens that can still be added, one step after another, where the context has room for ``left``."""

    def make_room(self, sequence: SequenceCache, count: int) -> None:
        """Let ``count`` more tokens fit, if this can."""


@dataclass(frozen=True, slots=True)
class CacheSetup:
    """An arena and what gives its bytes their meaning."""

    arena: Arena
    method: CacheMethod
    regions: Regions
    rules: tuple[FilterRule, ...]
    rope: ModelRope
    max_context: int
    on_full: OnFull
    packed_token_bytes: float  # of a packed token over all layers, codes and metadata
    token_elements: int  # numbers of a token that are the model's own, over all layers
    identity: Identity
    backend: Backend
    streams: Streams
    spans: tuple[int, ...]  # of attention, by layer
    lock: RLock  # held while something computes: the scratch memory of a backend is shared by all caches over a model
    rope_scaling: str | None  # as the engine was given it, for who resumes a session
    bits_budget: float | None

    @property
    def device(self) -> torch.device:
        """Where the arena lies."""
        return self.arena.page_table.device

    @property
    def needs_mass(self) -> bool:
        """Whether a rule asks for attention mass."""
        return any(rule.needs_attention_mass for rule in self.rules)

    def room(self, held: int) -> int:
        """Tokens that can be added, one step after another, to a sequence that holds ``held``."""
        return self.on_full.room(self.max_context - held)

    def require_room(self, held: int, count: int, answer: int = 0) -> None:
        """Raise CapacityError unless ``count`` more tokens can be added, one after another; ``answer`` as in ``require``."""
        if count > self.room(held):
            self.require(held, count, answer)

    def require(self, held: int, count: int, answer: int = 0) -> None:
        """Raise CapacityError unless ``count`` more tokens fit the context as it is; ``answer`` tokens are to follow them,
        the last of which need not be cached."""
        if held + count > self.max_context:
            tokens = f"{held:,} cached and {count:,} more" if held else f"{count:,}"
            raise CapacityError(
                f"{tokens} tokens do not fit a context of {self.max_context:,}: shorten the text, or load with a "
                f"max_context (--ctx) of at least {held + count + max(0, answer - 1):,}{self.on_full.advice}"
            )
