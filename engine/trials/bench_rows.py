"""What a benchmark of one context has found."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow(ABC):
    """Figures of one context. Times are medians; nan is what was not measured."""

    ctx: int
    ms_per_token: float
    attention_ms: float  # all layers
    tokens_per_s: float
    gbps: float  # bytes of the cache over the time it takes
    share_of_copy: float
    peak_bytes: int

    @abstractmethod
    def line(self) -> str:
        """For people."""

    def as_dict(self) -> dict[str, Any]:
        """For programs: nan becomes null."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRow(BenchRow):
    """A step: ``gbps`` is what attention reads of the cache over its time; without a model there is no step, only attention."""

    sdpa_ms: float  # torch's attention over unpacked keys and values of this length, where they fit
    sdpa_dtype: str  # of these (``sdpa_dtype``)

    def line(self) -> str:
        """For people."""
        step = "" if math.isnan(self.ms_per_token) else f"{self.ms_per_token:9.2f} ms a token ({self.tokens_per_s:,.1f}/s), "
        times = self.sdpa_ms / self.attention_ms
        beside = "" if math.isnan(times) else f"; torch SDPA in {self.sdpa_dtype} {self.sdpa_ms:,.2f} ms, {times:.1f}x"
        return (
            f"{self.ctx:>9,} tokens: {step}attention {self.attention_ms:8.2f} ms, {self.gbps:.1f} GB/s, "
            f"{self.share_of_copy:.0%} of copy{beside}; peak {self.peak_bytes / 1e9:.2f} GB"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRow(BenchRow):
    """A prompt: ``attention_ms`` is dense attention's share of ``ms_per_token``, of exact prefill only; ``gbps`` the cache
    written over the time."""

    def line(self) -> str:
        """For people."""
        attended = "" if math.isnan(self.attention_ms) else f", of which attention {self.attention_ms:.3f}"
        return (
            f"{self.ctx:>9,} tokens: {self.ms_per_token:8.3f} ms a token ({self.tokens_per_s:,.1f}/s){attended}; "
            f"peak {self.peak_bytes / 1e9:.2f} GB"
        )
