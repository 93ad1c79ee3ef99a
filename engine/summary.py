"""The closing line of a run: what it read and wrote, how fast, and how large its cache is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from skvq.engine.cache import SequenceCache
from skvq.engine.errors import counted
from skvq.engine.loading import EngineParts


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of one generation and its sequence."""

    prompt_tokens: int
    reused_tokens: int
    prefill: str  # exact (and in which form), streaming, or as decode steps
    prefill_seconds: float
    new_tokens: int
    decoded_tokens: int  # without the first, which reading gives
    guessed_tokens: int  # of these, guessed rightly by prompt lookup
    decode_seconds: float
    finish: str  # end, stop, length or context; empty if nothing was written
    cached_tokens: int
    packed_tokens: int  # of these, in pages
    dropped_tokens: int  # older ones, whose pages made room
    cache_bytes: int
    bits_per_element: float
    times_smaller: float
    method: str
    backend: str
    device: str

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens read per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens that decode steps wrote per second."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def line(self) -> str:
        """For people."""
        dropped = f" after {self.dropped_tokens:,} that were dropped" if self.dropped_tokens else ""
        reused = f"reused {self.reused_tokens:,} tokens, " if self.reused_tokens else ""
        cut = " (as many as were asked for)" if self.finish == "length" and self.new_tokens else ""
        speed = f" at {self.decode_tokens_per_s:,.1f} tokens/s" if self.decoded_tokens else ""
        guessed = f", {self.guessed_tokens:,} of them guessed" if self.guessed_tokens else ""
        bits = f"{self.bits_per_element:.2f} bits per element with its 16-bit window ({self.method})"
        smaller = f"{self.times_smaller:.1f} times smaller than 16-bit"
        packed = f"{bits}, {smaller}" if self.packed_tokens else f"all in the 16-bit window ({self.method})"
        packed = f"all in 16 bits ({self.method})" if self.method == "fp" else packed
        count = counted(self.prompt_tokens, "token")
        read = f"read {count} at {self.prefill_tokens_per_s:,.0f} tokens/s ({self.prefill}), " if self.prompt_tokens else ""
        return (
            f"{reused}{read}wrote {self.new_tokens:,}{cut}{speed}{guessed} ({self.backend}, {self.device}); "
            f"cache of {counted(self.cached_tokens, 'token')}{dropped}: {self.cache_bytes / 1e6:,.2f} MB, {packed}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            **asdict(self),
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


def summary_of(parts: EngineParts, sequence: SequenceCache) -> Summary:
    """What a generation and its sequence came to."""
    bits = sequence.bits_per_element
    return Summary(
        **asdict(sequence.timing),
        cached_tokens=sequence.length,
        packed_tokens=sequence.packed,
        dropped_tokens=sequence.dropped,
        cache_bytes=sequence.nbytes,
        bits_per_element=bits,
        times_smaller=16 / bits if sequence.length else 0.0,
        method=parts.cache.method,
        backend=parts.loaded.backend.name,
        device=str(parts.setup.device),
    )
