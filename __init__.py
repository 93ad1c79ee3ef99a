"""Reading very long contexts with an LLM on one GPU: a Llama-family engine whose KV cache is packed at 1.5 to 4 bits."""

from skvq.engine.config import CacheConfig, SamplingConfig
from skvq.engine.errors import SkvqError
from skvq.engine.generate import Engine

__version__ = "0.1.0"

__all__ = ["CacheConfig", "Engine", "SamplingConfig", "SkvqError", "__version__"]
