"""How a prompt is held while it is read: what is on the device, what is in host memory, and how many heads at a time.

Exact prefill has hidden states of the whole prompt and a layer's keys and values of all of it. When the device has no room
for both, hidden states go to pinned host memory and pass through the device chunk by chunk; when a layer's keys and values
are still too large, only those of a group of its kv heads are there at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from skvq.engine.model_config import ModelConfig
from skvq.kernels.interface import MOST_PARTS
from skvq.kernels.layout import PAGE_TOKENS

PIECE_TOKENS = 8 * PAGE_TOKENS
"""Tokens packed in one call, a whole number of tiles: bounds what packing needs besides the arena."""

CHUNK_TOKENS = 1024
"""Tokens that go through a layer's projections and MLP at once in prefill."""

KEPT_ROPE_TOKENS = 1 << 15
"""First tokens of a prompt whose RoPE exact prefill keeps for all layers: 16 MB of it where heads have 128 channels."""

SEGMENT_TOKENS = 6 * PAGE_TOKENS
"""Packed tokens whose keys and values streaming prefill unpacks at once, for all but one kernel by way of float32; tiles of
either size are whole in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillForm:
    """One way to read a prompt. Streaming has no other: it holds neither hidden states nor keys of the whole prompt."""

    prefill: str = "exact"
    host_states: bool = False
    head_groups: int = 1

    def __str__(self) -> str:
        """
        >>> str(PrefillForm(host_states=True, head_groups=4))
        'exact, hidden states in host memory, heads in 4 groups'
        """
        words = [self.prefill]
        words += ["hidden states in host memory"] * self.host_states
        words += [f"heads in {self.head_groups} groups"] * (self.head_groups > 1)
        return ", ".join(words)

    def device_parts(self, model: ModelConfig, tokens: int, size: int) -> dict[str, int]:
        """Bytes on the device, by part, for a prompt of ``tokens``; numbers of the compute dtype have ``size`` bytes."""
        exact, groups = self.prefill == "exact", self.head_groups
        kv = 2 * model.num_kv_heads * model.head_size * size  # keys and values of a token in a layer
        chunk = min(tokens, CHUNK_TOKENS) * model.hidden_size * size
        staged = staged_bytes(model, tokens)  # any later text is streamed
        partial = min(tokens, CHUNK_TOKENS) * model.num_heads * model.head_size * (MOST_PARTS * size + 4)
        if not exact:
            return {"hidden states of a chunk": chunk, "one layer's keys and values": staged, "partial attention": partial}
        states = {"hidden states of a chunk": chunk} if self.host_states else self._states(model, tokens, size)
        if groups == 1:
            return states | {"one layer's keys and values": kv * tokens}
        held = kv // groups * tokens + kv * min(tokens, PIECE_TOKENS)  # of the group, and of all heads while they are packed
        return states | {f"keys and values of {model.num_kv_heads // groups} of {model.num_kv_heads} heads": max(held, staged)}

    def host_parts(self, model: ModelConfig, tokens: int, size: int) -> dict[str, int]:
        """Bytes in pinned host memory, by part. Torch rounds each up to a power of two."""
        if not self.host_states:
            return {}
        return {part: 1 << (bytes_ - 1).bit_length() for part, bytes_ in self._states(model, tokens, size).items()}

    def _states(self, model: ModelConfig, tokens: int, size: int) -> dict[str, int]:
        states = {"hidden states of the prompt": tokens * model.hidden_size * size}
        if self.head_groups > 1:
            states["what heads have read"] = tokens * model.num_heads * model.head_size * size
        return states


def staged_bytes(model: ModelConfig, tokens: int) -> int:
    """Of what streaming unpacks of a layer's keys and values at once."""
    return 2 * model.num_kv_heads * model.head_size * 4 * min(tokens, SEGMENT_TOKENS)


def prefill_forms(model: ModelConfig, prefill: str) -> list[PrefillForm]:
    """The forms there are, cheapest first: every further group computes a layer's queries, keys and values once more."""
    if prefill != "exact":
        return [PrefillForm(prefill=prefill)]
    groups = [n for n in range(1, model.num_kv_heads + 1) if model.num_kv_heads % n == 0]
    return [PrefillForm(head_groups=n, host_states=host) for n in groups for host in (False, True)]


def cheapest_form(model: ModelConfig, prefill: str, tokens: int, size: int, *, device_room: int, host_room: int) -> PrefillForm:
    """The cheapest form for a prompt of ``tokens`` that fits both; where none does, the one that needs least of the device."""
    forms = [f for f in prefill_forms(model, prefill) if sum(f.host_parts(model, tokens, size).values()) <= host_room]
    needs = [sum(form.device_parts(model, tokens, size).values()) for form in forms]
    fitting = [form for form, need in zip(forms, needs, strict=True) if need <= device_room]
    return fitting[0] if fitting else forms[needs.index(min(needs))]
