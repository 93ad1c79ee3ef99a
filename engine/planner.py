"""What memory a run needs, and what fits: every byte is counted before any is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from skvq.engine.arena_shape import ArenaShape
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CapacityError, OptionError
from skvq.engine.mass import mass_bytes
from skvq.engine.model_config import ModelConfig
from skvq.engine.options import is_whole
from skvq.engine.prefill_form import CHUNK_TOKENS, KEPT_ROPE_TOKENS, PIECE_TOKENS, PrefillForm, cheapest_form, staged_bytes
from skvq.engine.sizes import (
    arena_shape,
    bits_per_element,
    calibration_bytes,
    computed_numbers,
    fullest_choices,
    gib,
    held_rows,
    step_rows,
    with_longest_tile,
)
from skvq.kernels.layout import PAGE_TOKENS

LOGIT_BYTES = 10
"""Of each number of a step's logits: in 16 and in 32 bits where they are computed, and the caller's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes by part of one run. ``parts`` is in the order of allocation; their sum is the peak on the device.

    ``host_parts`` are bytes of pinned host memory in addition; ``form`` is how a prompt that fills the context is read.
    """

    context: int
    parts: dict[str, int]
    memory: int
    host_parts: dict[str, int]
    host_memory: int
    form: PrefillForm
    form_bytes: int  # of the parts that the form decides
    bits_per_element: float

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> int:
        """Bytes of pinned host memory."""
        return sum(self.host_parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is memory enough on the device; of host memory no form takes more than there is."""
        return self.total <= self.memory

    def check(self, advice: str) -> None:
        """Raise CapacityError, with the numbers and ``advice``, unless the plan fits its memory."""
        if not self.fits:
            largest = max(self.parts, key=lambda part: self.parts[part])
            host = f" and {gib(self.host_total)} of host memory" if self.host_parts else ""
            raise CapacityError(
                f"a context of {self.context:,} tokens needs {gib(self.total)}{host}, only {gib(self.memory)} is available "
                f"(largest part: {largest}, {gib(self.parts[largest])}; prefill: {self.form}); {advice}"
            )

    def form_of(self, model: ModelConfig, tokens: int, dtype: torch.dtype) -> PrefillForm:
        """The cheapest form for a prompt of ``tokens``, at most the context, within what was planned."""
        rooms = {"device_room": self.form_bytes, "host_room": self.host_total}
        return cheapest_form(model, self.form.prefill, tokens, dtype.itemsize, **rooms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a device has for a run, in bytes, before any of it is taken.

    ``weight_bytes`` of them are for the weights, ``expanded_bytes`` for what is expanded of these at a time (``storage.Form``).
    ``host_memory`` may be pinned for a GPU, ``cuda_bytes`` CUDA itself takes (``machine.cuda_bytes``): both 0 where the device
    is the host.
    """

    memory: int
    weight_bytes: int
    expanded_bytes: int = 0
    host_memory: int = 0
    cuda_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Runs of a model with a cache on one device: what a context needs, and which fit."""

    model: ModelConfig
    cache: CacheConfig
    room: Room
    sequences: int
    dtype: torch.dtype
    prefill: str = "exact"
    total_tokens: int | None = None  # of all sequences together, where that is more than the context

    def plan(self, context: int) -> Plan:
        """Bytes of a run that prefills up to ``context`` tokens and decodes. The arena's part is exact, to the byte.

        Of the forms of exact prefill it takes the cheapest that fits, and if none does the one that needs least. While
        calibration has yet to spend a budget of bits, it is what no choice within the budget exceeds.
        """
        model, room, size = self.model, self.room, self.dtype.itemsize
        shapes = [(cache, self._arena(cache, context)) for cache in fullest_choices(self.cache, model)]
        cache, shape = max(shapes, key=lambda pair: pair[1].nbytes)
        packed = shape.pages * shape.page_bytes
        held = {"CUDA context and libraries": room.cuda_bytes} if room.cuda_bytes else {}
        held |= {
            "weights": room.weight_bytes,
            "cache: packed pages": packed,
            "cache: window and retained": shape.nbytes - packed,
            "calibration": calibration_bytes(cache, model, on_gpu=room.cuda_bytes > 0),
        }
        workspace = self._workspace(context, shape)
        left = room.memory - sum(held.values()) - workspace
        form = cheapest_form(model, self.prefill, context, size, device_room=left, host_room=room.host_memory)
        reading = form.device_parts(model, context, size)
        if (later := self._later_text(shape, context) - sum(reading.values())) > 0:
            held["window of a later text"] = later
        return Plan(
            context=context,
            parts=held | reading | {"workspace": workspace},
            memory=room.memory,
            host_parts=form.host_parts(model, context, size),
            host_memory=room.host_memory,
            form=form,
            form_bytes=sum(reading.values()),
            bits_per_element=max(bits_per_element(choice, model) for choice, _ in shapes),
        )

    def largest_context(self) -> int:
        """The longest context, in whole pages up to 2^27 tokens, whose plan fits; 0 if none does."""
        low, high = 0, 2**27 // PAGE_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.plan(middle * PAGE_TOKENS).fits else (low, middle - 1)
        return low * PAGE_TOKENS

    def plan_that_fits(self, max_context: int | None) -> Plan:
        """The plan of that context, or of the trained length or what fits of it.

        Raises CapacityError, with what would fit, if it does not.
        """
        unset = max_context is None
        most = 2**31 - 1 if self.total_tokens is None else self.total_tokens
        for what, value in (
            ("max_context", 1 if unset else max_context),
            ("max_sequences", self.sequences),
            ("total_tokens", most),
        ):
            if not is_whole(value) or not 0 < value < 2**31:
                raise OptionError(f"{what} must be a whole number from 1 to {2**31 - 1:,}, got {value!r}")
        if max_context is None:
            max_context = min(self.model.trained_context, most, max(self.largest_context(), 1))
        self.require_total(max_context)
        plan = self.plan(max_context)
        if not plan.fits:
            plan.check(self.advice())
        return plan

    def require_total(self, context: int) -> None:
        """Raise OptionError if all sequences together are to hold less than one."""
        if self.total_tokens is not None and self.total_tokens < context:
            raise OptionError(
                f"total_tokens {self.total_tokens:,} are fewer than the {context:,} of one sequence (max_context, --ctx): give "
                "more, or a smaller context"
            )

    def advice(self) -> str:
        """What would fit, where a context does not."""
        if most := self.largest_context():
            return f"the largest context that fits is {most:,}"
        if self.sequences > 1 and (most := replace(self, sequences=1).largest_context()):
            return f"one sequence alone, of up to {most:,} tokens, would fit"
        alone = self.room.weight_bytes + self.room.cuda_bytes > self.room.memory
        window = self._arena(with_longest_tile(self.cache, self.model), 1).nbytes
        without = replace(self, cache=replace(self.cache, window=min(self.cache.window, 128)))
        if not alone and without.largest_context():
            return f"a window of {self.cache.window:,} tokens takes {gib(window)} of it: use a smaller one (--window)"
        return f"not even {'the weights fit' if alone else 'a short context fits beside the weights'}: use a smaller model"

    def _arena(self, cache: CacheConfig, context: int) -> ArenaShape:
        total = None if self.total_tokens is None else max(context, self.total_tokens)
        return arena_shape(
            self.model, cache, max_context=context, max_sequences=self.sequences, dtype=self.dtype, total_tokens=total
        )

    def _window_copy(self, shape: ArenaShape, context: int) -> int:
        """Of a layer's window before a streamed chunk, in 16 bits and in the compute dtype."""
        kv = self.model.num_kv_heads * self.model.head_size
        return 2 * kv * min(context, shape.full_slots) * (2 + self.dtype.itemsize)

    def _later_text(self, shape: ArenaShape, context: int) -> int:
        """What a text after the first takes that the form of exact prefill may not have: it is streamed."""
        if self.prefill != "exact":
            return 0
        return self._window_copy(shape, context) + staged_bytes(self.model, context) - self._kept_rope(context)

    def _kept_rope(self, context: int) -> int:
        return min(context, KEPT_ROPE_TOKENS) * self.model.head_size * 4

    def _workspace(self, context: int, shape: ArenaShape) -> int:
        """What a chunk's layer computes and expands, what packing converts, logits, and what a long window adds.

        Packing takes a piece of keys and values: on a GPU in float32, with their codes and one side's slopes; on a CPU in 16
        bits, and a stretch of it in float32. Of a sequence's window a step keeps a copy in host memory; streaming puts a
        layer's before a chunk, in the compute dtype.
        """
        model, chunk = self.model, min(CHUNK_TOKENS, context)
        kv, piece = model.num_kv_heads * model.head_size, min(context, PIECE_TOKENS)
        on_gpu, on_cpu = kv * piece * (2 * 4 + 2 + 4), 2 * kv * (2 * piece + 8 * PAGE_TOKENS)
        packing = on_gpu if self.room.cuda_bytes else on_cpu
        window = 0 if self.room.cuda_bytes else shape.slot_bytes * shape.full_slots
        if self.prefill == "exact":
            window += self._kept_rope(context)
        else:
            window += self._window_copy(shape, context) + 2 * kv * chunk * (2 + self.dtype.itemsize)
        if self.cache.needs_mass:
            window += mass_bytes(model.num_heads, model.num_kv_heads, min(context, self.cache.window), model.head_size)
        computed = chunk * computed_numbers(model) * max(self.dtype.itemsize, 4) + self.room.expanded_bytes
        logits = model.vocab_size * (LOGIT_BYTES * step_rows(self.sequences) + 4 * held_rows(self.sequences))
        return computed + packing + logits + window
