"""A model in memory and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import RLock

from skvq.engine.model import Model
from skvq.engine.rope import ModelRope
from skvq.kernels.interface import Backend
from skvq.loaders.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """Weights in place and what belongs to them; any number of caches can be built over one."""

    model: Model
    tokenizer: Tokenizer
    rope: ModelRope
    backend: Backend
    fingerprint: str
    context: int  # tokens of the longest sequence
    dummy: bool
    rope_scaling: str | None  # as the engine was given it
    lock: RLock = field(default_factory=RLock)  # of all caches over it
