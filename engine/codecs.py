"""From a calibration's tensors to the codecs that kernels read, one per layer.

Tensors of an artifact, L layers, KH kv heads, D head size, G groups in a head, C = KH * D channels:

    key_unit, value_unit, key_clip, value_clip   float32 [L, KH, G]                every packed method
    key_mean, value_mean                         float32 [L, KH, D]                rotate (key_mean before RoPE)
    key_basis, value_basis                       float32 [L, KH, D, D]             rotate
    key_labels, value_labels                     int64 [L, C]                      reorder
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from skvq.engine.config import CacheConfig, ModelConfig
from skvq.engine.errors import CalibrationError
from skvq.kernels.interface import HeadCodec, LabelCodec, RopeFrequencies, Side
from skvq.kernels.layout import PageLayout

SIDES = ("key", "value")


def tensor_shapes(config: CacheConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors an artifact of this method must hold."""
    layers, heads, size = model.num_layers, model.num_kv_heads, model.head_size
    groups = (layers, heads, size // config.group_size)
    shapes: dict[str, tuple[int, ...]] = {f"{side}_{what}": groups for side in SIDES for what in ("unit", "clip")}
    if config.method == "rotate":
        shapes |= {f"{side}_mean": (layers, heads, size) for side in SIDES}
        shapes |= {f"{side}_basis": (layers, heads, size, size) for side in SIDES}
    if config.method == "reorder":
        shapes |= {f"{side}_labels": (layers, heads * size) for side in SIDES}
    return shapes


def check_tensors(tensors: Mapping[str, Tensor], config: CacheConfig, model: ModelConfig, where: str) -> None:
    """Raise CalibrationError unless the tensors are those of ``tensor_shapes`` and labels name groups that exist."""
    wanted = tensor_shapes(config, model)
    if set(tensors) != set(wanted):
        odd = sorted(set(tensors) ^ set(wanted))
        raise CalibrationError(f"calibration {where} lacks or has too many of {', '.join(odd)}: calibrate again")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise CalibrationError(f"calibration {where}: {name} has shape {tuple(tensors[name].shape)}, not {shape}")
    for name in (n for n in wanted if n.endswith("labels")):
        groups = model.num_kv_heads * model.head_size // config.group_size
        if any(sorted(set(row.tolist())) != list(range(groups)) for row in tensors[name]):
            raise CalibrationError(f"calibration {where}: {name} does not name each of {groups} groups")


def layout_of(config: CacheConfig, model: ModelConfig) -> PageLayout:
    """Layout of a packed page."""
    return PageLayout(
        head_size=model.head_size,
        kv_heads=model.num_kv_heads,
        key_bits=config.key_bits,
        value_bits=config.value_bits,
        group_size=config.group_size,
    )


def _sides(tensors: Mapping[str, Tensor], layer: int, device: torch.device) -> list[Side]:
    return [Side(unit=tensors[f"{s}_unit"][layer].to(device), clip=tensors[f"{s}_clip"][layer].to(device)) for s in SIDES]


def head_codecs(
    tensors: Mapping[str, Tensor], config: CacheConfig, model: ModelConfig, rope: RopeFrequencies, device: torch.device
) -> tuple[HeadCodec, ...]:
    """Codecs of ``rotate``, and of ``plain``, whose basis is the identity."""
    heads, size = model.num_kv_heads, model.head_size
    rotate = config.method == "rotate"
    codecs = []
    for layer in range(model.num_layers):
        keys, values = _sides(tensors, layer, device)
        if rotate:
            bases = [tensors[f"{s}_basis"][layer].double() for s in SIDES]
            means = [tensors[f"{s}_mean"][layer].to(device) for s in SIDES]
        else:
            bases = [torch.eye(size, dtype=torch.float64).expand(heads, -1, -1)] * 2
            means = [torch.zeros(heads, size, device=device)] * 2
        inverses = [torch.linalg.inv(b) for b in bases]
        codecs.append(
            HeadCodec(
                keys=keys,
                values=values,
                key_mean=means[0],
                key_basis=_on(bases[0], device),
                query_basis=_on(inverses[0].transpose(1, 2), device),
                value_mean=means[1],
                value_basis=_on(bases[1], device),
                output_basis=_on(inverses[1], device),
                rope=rope,
                has_key_mean=bool(means[0].any()),
                has_basis=rotate,
            )
        )
    return tuple(codecs)


def _on(matrix: Tensor, device: torch.device) -> Tensor:
    return matrix.float().contiguous().to(device)


def label_codecs(
    tensors: Mapping[str, Tensor], model: ModelConfig, rope: RopeFrequencies, device: torch.device
) -> tuple[LabelCodec, ...]:
    """Codecs of ``reorder``."""
    codecs = []
    for layer in range(model.num_layers):
        keys, values = (Side(unit=s.unit.flatten(), clip=s.clip.flatten()) for s in _sides(tensors, layer, device))
        labels = [tensors[f"{s}_labels"][layer].to(device) for s in SIDES]
        codecs.append(LabelCodec(keys=keys, values=values, key_labels=labels[0], value_labels=labels[1], rope=rope))
    return tuple(codecs)
