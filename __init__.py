"""Reading very long contexts with an LLM on one GPU: a Llama-family engine whose KV cache is packed at 1.5 to 4 bits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skvq.engine.config import CacheConfig, SamplingConfig
from skvq.engine.errors import CalibrationError, CapacityError, ModelError, OptionError, SessionError, SkvqError
from skvq.engine.filters import AttentionSinks, FilterRule, HeavyHitters, KeyOutliers, LeavingTokens, TokenIds
from skvq.engine.report import Bar, Quiet, Reporter, StderrReporter
from skvq.engine.timing import Timing

if TYPE_CHECKING:
    from skvq.engine.batch import Batch
    from skvq.engine.cache import SequenceCache
    from skvq.engine.generate import Engine
    from skvq.engine.likelihoods import Likelihoods
    from skvq.engine.request import Request
    from skvq.engine.sampling import TokenLogprob
    from skvq.engine.summary import Summary

__version__ = "0.1.0"

__all__ = [
    "AttentionSinks",
    "Bar",
    "Batch",
    "CacheConfig",
    "CalibrationError",
    "CapacityError",
    "Engine",
    "FilterRule",
    "HeavyHitters",
    "KeyOutliers",
    "LeavingTokens",
    "Likelihoods",
    "ModelError",
    "OptionError",
    "Quiet",
    "Reporter",
    "Request",
    "SamplingConfig",
    "SequenceCache",
    "SessionError",
    "SkvqError",
    "StderrReporter",
    "Summary",
    "Timing",
    "TokenIds",
    "TokenLogprob",
    "__version__",
]

_NEED_TORCH = {
    "Batch": "batch",
    "Engine": "generate",
    "Likelihoods": "likelihoods",
    "Request": "request",
    "SequenceCache": "cache",
    "Summary": "summary",
    "TokenLogprob": "sampling",
}
"""Names that are imported when they are asked for, and their modules: ``skvq --help`` does not wait for torch."""


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"skvq.engine.{_NEED_TORCH[name]}"), name)


def __dir__() -> list[str]:
    return __all__
