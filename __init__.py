"""Reading very long contexts with an LLM on one GPU: a Llama-family engine whose KV cache is packed at 1.5 to 4 bits."""

from skvq.engine.cache import SequenceCache
from skvq.engine.config import CacheConfig, SamplingConfig
from skvq.engine.errors import SkvqError
from skvq.engine.filters import AttentionSinks, FilterRule, HeavyHitters, KeyOutliers, LeavingTokens, TokenIds
from skvq.engine.generate import Engine
from skvq.engine.report import Quiet, Reporter
from skvq.engine.summary import Summary

__version__ = "0.1.0"

__all__ = [
    "AttentionSinks",
    "CacheConfig",
    "Engine",
    "FilterRule",
    "HeavyHitters",
    "KeyOutliers",
    "LeavingTokens",
    "Quiet",
    "Reporter",
    "SamplingConfig",
    "SequenceCache",
    "SkvqError",
    "Summary",
    "TokenIds",
    "__version__",
]
