"""What a generation took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Timing:
    """Tokens and seconds of a generation, of one sequence or of several that are decoded together."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill: str = ""  # how they were read
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decoded_tokens: int = 0  # those that decode steps gave; the first comes with the prompt
    guessed_tokens: int = 0  # of these, guessed rightly (``engine.lookup``)
    decode_seconds: float = 0.0
    finish: str = ""  # what ended the answer (``Answer.finish``)

    def add(self, other: Timing) -> None:
        """Add what was done after this."""
        self.prompt_tokens += other.prompt_tokens
        self.reused_tokens += other.reused_tokens
        self.prefill = other.prefill
        self.prefill_seconds += other.prefill_seconds
        self.new_tokens += other.new_tokens
        self.decoded_tokens += other.decoded_tokens
        self.guessed_tokens += other.guessed_tokens
        self.decode_seconds += other.decode_seconds
        self.finish = other.finish
