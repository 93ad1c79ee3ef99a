"""From a calibration's tensors to the layouts and codecs that kernels read: one per layer, or one for each run of its kv heads.

Neighbouring kv heads of the same bits make a run: kernels are compiled for one width of keys and one of values, so each run
has page tensors and a launch of its own. Where bits do not differ by head a layer is one run.

Tensors of an artifact, L layers, KH kv heads, D head size, G groups in a head, C = KH * D channels:

    key_unit, value_unit, key_clip, value_clip   float32 [L, KH, G]                every packed method
    key_mean, value_mean                         float32 [L, KH, D]                rotate (key_mean before RoPE)
    key_basis, query_basis, key_metric           float32 [L, KH, D, D]             rotate
    value_basis, output_basis, value_metric      float32 [L, KH, D, D]             rotate
    key_labels, value_labels                     int64 [L, C]                      reorder
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from skvq.engine.config import CacheConfig, Widths
from skvq.engine.errors import CalibrationError
from skvq.engine.model_config import ModelConfig
from skvq.engine.rope import ModelRope
from skvq.kernels.interface import HeadCodec, HeadSide, LabelCodec, RopeFrequencies, Side
from skvq.kernels.layout import LEVELS, PageLayout

SIDES = ("key", "value")
MATRICES = ("key_basis", "query_basis", "key_metric", "value_basis", "output_basis", "value_metric")


def tensor_shapes(config: CacheConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors an artifact of this method must hold."""
    layers, heads, size = model.num_layers, model.num_kv_heads, model.head_size
    groups = (layers, heads, size // config.group_size)
    shapes: dict[str, tuple[int, ...]] = {f"{side}_{what}": groups for side in SIDES for what in ("unit", "clip")}
    if config.method == "rotate":
        shapes |= {f"{side}_mean": (layers, heads, size) for side in SIDES}
        shapes |= dict.fromkeys(MATRICES, (layers, heads, size, size))
    if config.method == "reorder":
        shapes |= {f"{side}_labels": (layers, heads * size) for side in SIDES}
    return shapes


def check_tensors(tensors: Mapping[str, Tensor], config: CacheConfig, model: ModelConfig, where: str) -> None:
    """Raise CalibrationError unless the tensors are those of ``tensor_shapes``, of finite numbers, units and clips positive,
    metrics positive definite, and labels name groups that exist."""
    wanted = tensor_shapes(config, model)
    if set(tensors) != set(wanted):
        odd = sorted(set(tensors) ^ set(wanted))
        raise CalibrationError(f"calibration {where} has missing or unexpected tensors ({', '.join(odd)}): calibrate again")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise CalibrationError(f"calibration {where}: {name} has shape {tuple(tensors[name].shape)}, not {shape}")
        dtype = torch.int64 if name.endswith("labels") else torch.float32
        if tensors[name].dtype != dtype:
            raise CalibrationError(f"calibration {where}: {name} is of {tensors[name].dtype}, not {dtype}: calibrate again")
        if not tensors[name].isfinite().all():
            raise CalibrationError(f"calibration {where}: {name} is not all finite numbers: calibrate again")
        if name.endswith(("unit", "clip")) and not (tensors[name] > 0).all():
            raise CalibrationError(f"calibration {where}: {name} is not all positive numbers: calibrate again")
        if name.endswith("metric") and torch.linalg.cholesky_ex(tensors[name].double().cpu()).info.any():
            raise CalibrationError(f"calibration {where}: {name} is not positive definite: calibrate again")
    for name in (n for n in wanted if n.endswith("labels")):
        groups = model.num_kv_heads * model.head_size // config.group_size
        if any(sorted(set(row.tolist())) != list(range(groups)) for row in tensors[name]):
            raise CalibrationError(f"calibration {where}: {name} must use each of {groups} groups: calibrate again")


def runs_of(heads: Sequence[Widths]) -> list[tuple[slice, Widths]]:
    """Runs of neighbouring kv heads with the same bits.

    >>> runs_of([(2.0, 2.0), (2.0, 2.0), (3.0, 2.0)])
    [(slice(0, 2, None), (2.0, 2.0)), (slice(2, 3, None), (3.0, 2.0))]
    """
    runs = [(widths, len(list(run))) for widths, run in groupby(heads)]
    ends = accumulate(count for _, count in runs)
    return [(slice(end - count, end), widths) for end, (widths, count) in zip(ends, runs, strict=True)]


def layouts_of(config: CacheConfig, model: ModelConfig) -> tuple[tuple[PageLayout, ...], ...]:
    """Layout of a packed page for each run of each layer; all have the same tile."""
    layers = config.bits_of_heads(model)
    among_trits = any(1.5 in widths for heads in layers for widths in heads)
    return tuple(
        tuple(
            PageLayout(
                head_size=model.head_size,
                kv_heads=run.stop - run.start,
                key_bits=key_bits,
                value_bits=value_bits,
                group_size=config.group_size,
                among_trits=among_trits,
            )
            for run, (key_bits, value_bits) in runs_of(heads)
        )
        for heads in layers
    )


def head_codecs(
    tensors: Mapping[str, Tensor], config: CacheConfig, model: ModelConfig, rope: ModelRope, device: torch.device
) -> tuple[tuple[HeadCodec, ...], ...]:
    """Codecs of ``rotate``, and of ``plain``, whose bases and metrics are the identity, for each run of each layer."""
    rotates = config.method == "rotate"
    identity = torch.eye(model.head_size, dtype=torch.float32, device=device)

    def codec(layer: int, run: slice, widths: Widths) -> HeadCodec:
        own = {name: tensor[layer, run].to(device) for name, tensor in tensors.items()}
        if not rotates:  # one matrix for all, which no kernel reads
            shape = len(own["key_unit"]), *identity.shape
            own |= dict.fromkeys(MATRICES, identity.expand(shape))
            own |= dict.fromkeys(("key_mean", "value_mean"), identity.new_zeros(shape[:2]))
        return _head_codec(own, widths, rotates, rope.of(layer))

    return tuple(
        tuple(codec(layer, run, widths) for run, widths in runs_of(heads))
        for layer, heads in enumerate(config.bits_of_heads(model))
    )


def _head_codec(tensors: Mapping[str, Tensor], widths: Widths, rotates: bool, rope: RopeFrequencies) -> HeadCodec:
    """Codec of some heads that have the same bits, from their tensors."""
    names = (*(name for name in MATRICES if not name.endswith("metric")), *(f"{side}_mean" for side in SIDES))
    keys, values = (
        _head_side(tensors, side, rotates, rotates and are_chosen_together(bits))
        for side, bits in zip(SIDES, widths, strict=True)
    )
    given = {name: tensors[name].float() for name in names}
    if rotates:  # the identity of others is a view of one matrix, which no kernel reads
        given = {name: tensor.contiguous() for name, tensor in given.items()}
    has_key_mean = bool(given["key_mean"].any())
    return HeadCodec(keys=keys, values=values, **given, rope=rope, has_key_mean=has_key_mean, has_basis=rotates)


def _head_side(tensors: Mapping[str, Tensor], side: str, rotates: bool, has_metric: bool) -> HeadSide:
    metric = tensors[f"{side}_metric"].float()
    return HeadSide(
        unit=tensors[f"{side}_unit"],
        clip=tensors[f"{side}_clip"],
        metric=metric,
        factor=unit_factor(metric) if rotates else metric,  # of the identity: itself
        has_metric=has_metric,
    )


def are_chosen_together(bits: float) -> bool:
    """Whether ``rotate`` chooses the codes of a head together, in the metric; at 8 bits each is rounded on its own.

    There an error's size is that of the FP8 metadata, and what counts is that no end of a group is cut off
    (``reference.encode_scale``): KL .00004 with the lattice, .00001 without.
    """
    return LEVELS[bits] < 256


def unit_factor(metric: Tensor) -> Tensor:
    """Upper Cholesky factor of each metric [KH, D, D] with its rows divided by their diagonal, float32; made on the CPU."""
    upper: Tensor = torch.linalg.cholesky(metric.double().cpu()).transpose(1, 2)
    return torch.div(upper, upper.diagonal(dim1=1, dim2=2)[:, :, None]).float().contiguous().to(metric.device)


def label_codecs(
    tensors: Mapping[str, Tensor], model: ModelConfig, rope: ModelRope, device: torch.device
) -> tuple[tuple[LabelCodec, ...], ...]:
    """Codecs of ``reorder``: every layer is one run."""
    codecs = []
    for layer in range(model.num_layers):
        keys, values = (
            Side(unit=tensors[f"{s}_unit"][layer].flatten().to(device), clip=tensors[f"{s}_clip"][layer].flatten().to(device))
            for s in SIDES
        )
        labels = {f"{s}_labels": tensors[f"{s}_labels"][layer].to(device) for s in SIDES}
        codecs.append((LabelCodec(keys=keys, values=values, **labels, rope=rope.of(layer)),))
    return tuple(codecs)
