"""What memory a run needs, from the model's shape and the options alone: every byte is counted before any is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from skvq.calibrate.allocate import as_layer_bits, fullest
from skvq.engine.arena import ArenaShape, packed_page, plain_page
from skvq.engine.codecs import layouts_of, tensor_shapes
from skvq.engine.config import BITS, CacheConfig, ModelConfig
from skvq.engine.errors import CapacityError
from skvq.engine.filters import AttentionSinks
from skvq.engine.prefill_form import CHUNK_TOKENS, PIECE_TOKENS, PrefillForm, cheapest_form
from skvq.engine.regions import Regions
from skvq.kernels.layout import PAGE_TOKENS, PlainLayout, stored_bits

SPARE_PAGES = 2
"""Pages for each sequence beyond the first: a fork copies its last page on write and grows into the next."""


def tile_of(cache: CacheConfig, model: ModelConfig) -> int:
    """Tokens that leave the window at once."""
    return (_plain_layout(model) if not cache.is_packed else layouts_of(cache, model)[0][0]).tile


def layer_token_bytes(cache: CacheConfig, model: ModelConfig) -> list[float]:
    """Bytes of a packed token in each layer, codes and metadata."""
    if not cache.is_packed:
        return [_plain_layout(model).bytes_per_token] * model.num_layers
    return [sum(run.bytes_per_token for run in runs) for runs in layouts_of(cache, model)]


def _plain_layout(model: ModelConfig) -> PlainLayout:
    return PlainLayout(head_size=model.head_size, kv_heads=model.num_kv_heads)


def token_bytes(cache: CacheConfig, model: ModelConfig) -> float:
    """Bytes of a packed token over all layers, codes and metadata."""
    return sum(layer_token_bytes(cache, model))


def bits_per_element(cache: CacheConfig, model: ModelConfig) -> float:
    """Bits per packed number over all layers, everything counted."""
    return 8 * token_bytes(cache, model) / model.kv_elements_per_token


def largest_of(cache: CacheConfig, model: ModelConfig) -> tuple[CacheConfig, ...]:
    """The cache itself; while its bits are open, the fullest choices within its budget: with a side of 1.5 bits, and without.

    No choice that calibration may make takes more bytes than the larger of them.
    """
    if not cache.is_open:
        return (cache,)
    heads = model.num_kv_heads if cache.by_head else 1
    items, trits = 2 * model.num_layers * heads, BITS[0]
    rest = (cache.code_bits * items - stored_bits(trits)) / (items - 1)
    choices = [(trits, *fullest(items - 1, BITS, rest))]
    if cache.code_bits >= stored_bits(BITS[1]) - 1e-9:
        choices.append(fullest(items, BITS[1:], cache.code_bits))
    return tuple(replace(cache, layer_bits=as_layer_bits(c, heads)) for c in choices)


def regions_of(cache: CacheConfig, model: ModelConfig) -> Regions:
    """Sizes of a sequence's three regions. A 16-bit cache has slots for the sinks too: they may outlive their page."""
    sinks = sum(rule.budget for rule in cache.filters if isinstance(rule, AttentionSinks))
    others = sum(rule.budget for rule in cache.rules if not isinstance(rule, AttentionSinks))
    return Regions(window=cache.window, tile=tile_of(cache, model), retained=sinks + others, sinks=sinks)


def cache_dtype(compute: torch.dtype) -> torch.dtype:
    """16-bit dtype of full-precision slots: the compute dtype, float16 where that is float32."""
    return torch.float16 if compute == torch.float32 else compute


def arena_shape(
    model: ModelConfig, cache: CacheConfig, *, max_context: int, max_sequences: int, dtype: torch.dtype
) -> ArenaShape:
    """The arena of an engine: pages for one sequence of ``max_context`` tokens, spare pages and slots for the others."""
    regions = regions_of(cache, model)
    half = cache_dtype(dtype)
    if not cache.is_packed:
        pages = (plain_page(_plain_layout(model), half),) * model.num_layers
    else:
        pages = tuple(map(packed_page, layouts_of(cache, model)))
    per_sequence = max(1, regions.pages(max_context))
    return ArenaShape(
        layers=model.num_layers,
        kv_heads=model.num_kv_heads,
        head_size=model.head_size,
        pages=per_sequence + SPARE_PAGES * (max_sequences - 1),
        sequences=max_sequences,
        pages_per_sequence=per_sequence,
        full_slots=regions.slots,
        dtype=half,
        layer_pages=pages,
    )


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


def gib(count: int) -> str:
    """Bytes for people.

    >>> gib(3 * 2**30)
    '3.00 GiB'
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def usual_weight_bytes(model: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> int:
    """Weights of a model of which only the shape is known: on the CPU 16-bit files are held as they are."""
    on_cpu = torch.device(device).type == "cpu" and dtype == torch.float32
    return model.num_parameters * (2 if on_cpu else dtype.itemsize)


def calibration_bytes(cache: CacheConfig, model: ModelConfig, *, on_gpu: bool) -> int:
    """Bases, means, scales, metrics and their factors of all layers in float32; on a GPU also what packing multiplies by, both
    matrices of a side as two halves a number and their diagonal blocks in float32 (``triton_gpu.metric``)."""
    if not cache.is_packed:
        return 0
    held = 4 * sum(math.prod(shape) for shape in tensor_shapes(cache, model).values())
    if cache.method != "rotate":
        return held
    heads, size = model.num_layers * model.num_kv_heads, model.head_size
    return held + 2 * heads * (4 * size * size + on_gpu * (8 * size * size + 128 * size))


def make_plan(
    model: ModelConfig,
    cache: CacheConfig,
    *,
    context: int,
    sequences: int,
    dtype: torch.dtype,
    memory: int,
    weight_bytes: int,
    prefill: str = "exact",
    host_memory: int = 0,
    cuda_bytes: int = 0,
) -> Plan:
    """Bytes of a run that prefills up to ``context`` tokens and decodes. The arena's part is exact, to the byte.

    Of the forms of exact prefill it takes the cheapest that fits, and if none does the one that needs least.
    ``host_memory`` is what may be pinned for a GPU, ``cuda_bytes`` what CUDA itself takes (``machine.cuda_bytes``): both 0
    where the device is the host.

    ``weight_bytes`` from ``storage.Form.held_bytes`` are exact too, from ``usual_weight_bytes`` what to expect. While
    calibration has yet to spend a budget of bits, it is what no choice within the budget exceeds.
    """
    arena: dict[str, Any] = {"max_context": context, "max_sequences": sequences, "dtype": dtype}
    cache = max(largest_of(cache, model), key=lambda c: arena_shape(model, c, **arena).nbytes)
    shape = arena_shape(model, cache, **arena)
    size = dtype.itemsize
    chunk = min(CHUNK_TOKENS, context)
    width = 2 * model.intermediate_size + 4 * model.hidden_size + 2 * model.num_heads * model.head_size
    packed = shape.pages * shape.page_bytes
    kv = model.num_kv_heads * model.head_size
    packing = 2 * kv * (2 * min(context, PIECE_TOKENS) + 8 * PAGE_TOKENS)  # a piece in 16 bits, of which a stretch in float32
    held = {
        "weights": weight_bytes,
        "cache: packed pages": packed,
        "cache: window and retained": shape.nbytes - packed,
        "calibration": calibration_bytes(cache, model, on_gpu=cuda_bytes > 0),
    }
    if cuda_bytes:
        held = {"CUDA context and libraries": cuda_bytes} | held
    workspace = chunk * width * max(size, 4) + packing + 6 * model.vocab_size * 4
    room = memory - sum(held.values()) - workspace
    form = cheapest_form(model, prefill, context, size, device_room=room, host_room=host_memory)
    reading = form.device_parts(model, context, size)
    return Plan(
        context=context,
        parts=held | reading | {"workspace": workspace},
        memory=memory,
        host_parts=form.host_parts(model, context, size),
        host_memory=host_memory,
        form=form,
        form_bytes=sum(reading.values()),
        bits_per_element=bits_per_element(cache, model),
    )


def largest_context(model: ModelConfig, cache: CacheConfig, *, limit: int = 2**27, **options: object) -> int:
    """The longest context, in whole pages, whose plan fits ``memory``; 0 if none does. Options as for ``make_plan``."""
    low, high = 0, limit // PAGE_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        plan = make_plan(model, cache, context=middle * PAGE_TOKENS, **options)  # type: ignore[arg-type]
        low, high = (middle, high) if plan.fits else (low, middle - 1)
    return low * PAGE_TOKENS


def what_would_fit(model: ModelConfig, cache: CacheConfig, **options: Any) -> str:
    """Advice where a context does not fit; options as for ``make_plan``."""
    if most := largest_context(model, cache, **options):
        return f"the largest context that fits is {most:,}"
    if options["sequences"] > 1 and (alone := largest_context(model, cache, **{**options, "sequences": 1})):
        return f"one sequence alone, of up to {alone:,} tokens, would fit"
    return "not even the weights fit: use a smaller model"
