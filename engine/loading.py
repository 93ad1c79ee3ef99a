"""Putting an engine together: plan, weights, calibration, arena, method. A context that does not fit is refused before any of
it is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock

import torch
from torch import Tensor

from skvq.engine.arena import Arena
from skvq.engine.cache_setup import CacheSetup, OnFull
from skvq.engine.calibration import cached_or_made, load_for, settled
from skvq.engine.codecs import head_codecs, label_codecs, layouts_of
from skvq.engine.config import CacheConfig
from skvq.engine.dual_chunk_method import ChunkedMethod
from skvq.engine.dual_chunks import Chunks, require_chunkable
from skvq.engine.identity import identity_of
from skvq.engine.load_options import LoadOptions
from skvq.engine.loaded import LoadedModel
from skvq.engine.machine import available_memory, cuda_bytes, find_backend, pinnable_memory
from skvq.engine.methods import CacheMethod, HeadMethod, LabelMethod, PlainMethod
from skvq.engine.model import Model, ModelWeights, load_weights
from skvq.engine.model_config import ModelConfig
from skvq.engine.overflow import Shift, on_full_of
from skvq.engine.planner import Plan, Planner, Room
from skvq.engine.prefill_form import PrefillForm
from skvq.engine.report import Reporter
from skvq.engine.rope import ModelRope, model_rope
from skvq.engine.rope_scaling import beyond_training, scaled
from skvq.engine.sizes import arena_shape, regions_of, token_bytes, widest_regions
from skvq.engine.storage import Form, Storage, WeightReader
from skvq.engine.streams import streams_of
from skvq.engine.weight_forms import form_of
from skvq.kernels.interface import Backend
from skvq.loaders.open import open_model, stand_in
from skvq.loaders.source import WeightSource
from skvq.loaders.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """Everything an engine is made of."""

    options: LoadOptions
    loaded: LoadedModel
    cache: CacheConfig  # as fitted to the model; that of ``options`` is another where ``with_cache`` made it
    setup: CacheSetup
    room: Room
    plan: Plan

    @property
    def model(self) -> Model:
        return self.loaded.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def rope(self) -> ModelRope:
        return self.loaded.rope


def load_parts(options: LoadOptions, report: Reporter) -> EngineParts:
    """See ``Engine.load``; to be called within ``own_settings`` of the device."""
    kernels = find_backend(options.backend, options.device)
    form = form_of(kernels.name, options.device, options.dtype)
    if kernels.name == "numba" and options.dtype != torch.float32:
        report.message(f"{str(options.dtype).removeprefix('torch.')} on a CPU is slower than float32, the default")
    _refuse_ahead(options, kernels, form)
    source, tokenizer = open_model(
        options.model,
        dummy_weights=options.dummy_weights,
        download=options.download,
        chat_template_kwargs=options.chat_template_kwargs,
    )
    shape = source.config if options.rope_scaling is None else scaled(source.config, options.rope_scaling)
    config = _as_taken(shape, kernels)
    if options.cache.is_packed and CacheConfig().group_size != options.cache.group_size > config.head_size:
        report.message(f"groups of {options.cache.group_size} channels are cut to the heads, of {config.head_size}")
    cache = settled(options.cache, options.calibration, config, source.fingerprint)
    planner = _planner(options, form, source, config, cache)
    plan = planner.plan_that_fits(options.max_context)
    context = plan.context
    if plan.form != PrefillForm(prefill=options.prefill):
        report.message(f"to fit {context:,} tokens, prompts that need it are read with this prefill: {plan.form}")
    full = on_full_of(options.on_full, widest_regions(cache, config), context)
    require_chunkable(config.cut_at(context), cache, shift=isinstance(full, Shift))
    if context > source.config.trained_context:
        report.message(beyond_training(context, source.config, config))
    if options.cuda_graph and kernels.captures(config.head_size) and cache.needs_mass:
        report.message("a filter rule needs attention mass: steps are launched one by one and prompts share no prefix, slower")
    loaded = LoadedModel(
        model=Model(config, _weights(source, config, form, report), kernels.ops),
        tokenizer=tokenizer,
        rope=model_rope(config, context, options.device),
        backend=kernels,
        fingerprint=source.fingerprint,
        context=context,
        dummy=options.dummy_weights,
        rope_scaling=options.rope_scaling,
    )
    was_open = cache.is_open
    cache, setup = build_cache(loaded, cache, options.max_sequences, options.total_tokens, options.calibration, full, report)
    if was_open:
        plan = replace(planner, cache=cache).plan(context)
    return EngineParts(options=options, loaded=loaded, cache=cache, setup=setup, room=planner.room, plan=plan)


def _refuse_ahead(options: LoadOptions, kernels: Backend, form: Form) -> None:
    """Raise CapacityError for a context that does not fit before anything is downloaded, where a model's shape is known."""
    ahead = None if options.dummy_weights else stand_in(options.model, download=options.download)
    if ahead is not None:
        shape = _as_taken(ahead.config, kernels)
        _planner(options, form, ahead, shape, options.cache.fitted(shape)).plan_that_fits(options.max_context)


def _as_taken(config: ModelConfig, kernels: Backend) -> ModelConfig:
    """The model with heads as wide as the kernels take them."""
    return config.with_heads_of(kernels.head_size_for(config.head_size))


def _planner(options: LoadOptions, form: Form, source: WeightSource, config: ModelConfig, cache: CacheConfig) -> Planner:
    return Planner(
        model=config,
        cache=cache,
        room=room_on(options.device, form.held_bytes(source), form.expanded_bytes(source)),
        sequences=options.max_sequences,
        dtype=options.dtype,
        prefill=options.prefill,
        total_tokens=options.total_tokens,
    )


def room_on(device: torch.device, weight_bytes: int, expanded_bytes: int) -> Room:
    """The room on a device where nothing of the engine is allocated yet."""
    return Room(
        memory=available_memory(device),
        weight_bytes=weight_bytes,
        expanded_bytes=expanded_bytes,
        host_memory=pinnable_memory(device),
        cuda_bytes=cuda_bytes(device),
    )


def room_beside(device: torch.device, room: Room) -> Room:
    """The room for another cache over weights already loaded, for which there was ``room``."""
    left = room_on(device, room.weight_bytes, room.expanded_bytes)
    return replace(left, memory=left.memory + left.weight_bytes + left.cuda_bytes)


def build_cache(
    loaded: LoadedModel,
    cache: CacheConfig,
    max_sequences: int,
    total_tokens: int | None,
    calibration: Path | None,
    on_full: OnFull,
    report: Reporter,
) -> tuple[CacheConfig, CacheSetup]:
    """Calibration, arena and method of one cache over a loaded model; the cache as calibration has chosen its bits."""
    model, config = loaded.model, loaded.model.config
    cache, tensors = _calibration(loaded, cache, calibration, report)
    shape = arena_shape(
        config,
        cache,
        max_context=loaded.context,
        max_sequences=max_sequences,
        dtype=model.dtype,
        total_tokens=total_tokens,
    )
    arena = Arena(shape, model.device)
    setup = cache_setup(
        arena,
        config,
        cache,
        tensors,
        rope=loaded.rope,
        backend=loaded.backend,
        max_context=loaded.context,
        on_full=on_full,
        fingerprint=loaded.fingerprint,
        lock=loaded.lock,
        rope_scaling=loaded.rope_scaling,
    )
    return cache, setup


def cache_setup(
    arena: Arena,
    config: ModelConfig,
    cache: CacheConfig,
    tensors: Mapping[str, Tensor],
    *,
    rope: ModelRope,
    backend: Backend,
    max_context: int,
    on_full: OnFull,
    fingerprint: str,
    lock: RLock,
    rope_scaling: str | None,
) -> CacheSetup:
    """What sequences share, over an arena; ``tensors`` are the calibration, ``fingerprint`` is the model's."""
    require_chunkable(config.cut_at(max_context), cache, shift=isinstance(on_full, Shift))
    return CacheSetup(
        arena=arena,
        method=bind_method(arena, config, cache, tensors, rope, backend),
        regions=regions_of(cache, config),
        rules=cache.rules,
        rope=rope,
        max_context=max_context,
        on_full=on_full,
        packed_token_bytes=token_bytes(cache, config),
        token_elements=config.kv_elements_per_token,
        identity=identity_of(cache, fingerprint, tensors, rope, arena.shape.dtype),
        backend=backend,
        streams=streams_of(arena.page_table.device),
        spans=config.attention_spans,
        lock=lock,
        rope_scaling=rope_scaling,
        bits_budget=cache.bits_budget if cache.is_packed else None,
    )


def with_cache(
    parts: EngineParts, cache: CacheConfig, max_sequences: int, calibration: Path | None, report: Reporter
) -> EngineParts:
    """The same weights with another cache. Raises as ``planner_beside``."""
    planner, full = planner_beside(parts, cache, max_sequences, calibration)
    cache, setup = build_cache(parts.loaded, planner.cache, max_sequences, None, calibration, full, report)
    plan = replace(planner, cache=cache).plan(parts.loaded.context)
    return replace(parts, cache=cache, setup=setup, plan=plan)


def planner_beside(
    parts: EngineParts, cache: CacheConfig, max_sequences: int, calibration: Path | None
) -> tuple[Planner, OnFull]:
    """The plan of another cache, fitted to the model, and what happens when it is full. Nothing is allocated.

    Raises OptionError and CalibrationError for a cache that cannot be, CapacityError if there is no room for it in addition to
    that of ``parts``.
    """
    model, config, context = parts.model, parts.model.config, parts.loaded.context
    cache = settled(cache, calibration, config, parts.loaded.fingerprint)
    room = room_beside(model.device, parts.room)
    planner = Planner(
        model=config, cache=cache, room=room, sequences=max_sequences, dtype=model.dtype, prefill=parts.options.prefill
    )
    planner.plan_that_fits(context)
    full = on_full_of(parts.options.on_full, widest_regions(cache, config), context)
    require_chunkable(config.cut_at(context), cache, shift=isinstance(full, Shift))
    return planner, full


def bind_method(
    arena: Arena,
    config: ModelConfig,
    cache: CacheConfig,
    tensors: Mapping[str, Tensor],
    rope: ModelRope,
    kernels: Backend,
) -> CacheMethod:
    """The cache method over an arena, with the codecs that calibration found."""
    device = arena.page_table.device
    method: HeadMethod | LabelMethod | PlainMethod
    if not cache.is_packed:
        method = PlainMethod(arena, kernels)
    elif cache.method == "reorder":
        method = LabelMethod(arena, layouts_of(cache, config), label_codecs(tensors, config, rope, device), kernels)
    else:
        method = HeadMethod(arena, layouts_of(cache, config), head_codecs(tensors, cache, config, rope, device), kernels)
    if not isinstance(rope.distances, Chunks):
        return method
    return ChunkedMethod(method, arena, rope.distances, regions_of(cache, config).ring, kernels.ops)


def _weights(source: WeightSource, config: ModelConfig, form: Form, report: Reporter) -> ModelWeights:
    with report.bar("loading weights", config.num_parameters) as bar:
        return load_weights(config, Storage(form, WeightReader(source, bar.advance), report))


def _calibration(
    loaded: LoadedModel, cache: CacheConfig, path: Path | None, report: Reporter
) -> tuple[CacheConfig, Mapping[str, Tensor]]:
    """The cache with its bits chosen, and the tensors of its calibration."""
    if not cache.is_packed:
        return cache, {}
    artifact = cached_or_made(loaded, cache, report) if path is None else load_for(path, loaded, cache, report)
    return replace(cache, layer_bits=artifact.header.layer_bits), artifact.tensors
