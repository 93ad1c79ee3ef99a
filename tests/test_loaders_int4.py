"""4-bit checkpoints of AWQ, GPTQ and compressed-tensors: the weights that their own libraries read, held as blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from loader_fixtures import byte_level_pipeline, random_weights, refused, tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from skvq import CacheConfig, Engine
from skvq.engine.plan_report import plan_report
from skvq.engine.report import Quiet
from skvq.engine.weight_forms import form_of
from skvq.loaders.checkpoint import SafetensorsSource
from skvq.loaders.names import expected_shapes
from skvq.loaders.open import open_model

CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    "gptq rows": {"quant_method": "gptq", "bits": 4, "group_size": -1},
    "compressed": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True,
        }}},
    },
    "compressed zeros": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"all": {"weights": {
            "num_bits": 4, "type": "int", "strategy": "channel", "group_size": None, "symmetric": False,
        }}},
    },
}  # fmt: skip
CONFIG = tiny_config(hidden_size=128, intermediate_size=192, num_heads=4, num_kv_heads=2, head_size=32)


def packed(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Words int32 [rows, n] of codes [rows, 8 n]: field i holds the code of place order[i] among the eight."""
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for column in range(words.shape[1]):
        for field, place in enumerate(order):
            words[:, column] |= codes[:, 8 * column + place].long() << 4 * field
    return words.to(torch.int32)  # the sign bit too


def group_of(name: str) -> int:
    found = CONFIGS[name]
    if "config_groups" in found:
        (found,) = (group["weights"] for group in found["config_groups"].values())
    return found["group_size"] or -1


def quantized(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a matrix [out, in], as its library packs them, and what they stand for."""
    outs, ins = weight.shape
    groups = 1 if group_of(name) == -1 else ins // group_of(name)
    generator = torch.Generator().manual_seed(outs * ins)
    codes = torch.randint(16, (outs, ins), generator=generator)
    less = int(name in ("gptq", "gptq rows"))
    zeros = torch.randint(16, (outs, groups), generator=generator)
    scales = (0.02 + 0.01 * torch.rand(outs, groups, generator=generator)).half()
    if name == "compressed":
        zeros[:] = 8
    exact = ((codes.view(outs, groups, -1) - zeros[..., None]) * scales[..., None].float()).view(outs, ins)
    if name == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": packed(codes.T, order), "qzeros": packed(zeros.T, order), "scales": scales.T}
    elif name.startswith("gptq"):
        index = torch.arange(ins, dtype=torch.int32) // (ins // groups)
        tensors = {"qweight": packed(codes).T, "qzeros": packed(((zeros - less) % 16).T), "scales": scales.T, "g_idx": index}
    else:
        tensors = {"weight_packed": packed(codes), "weight_scale": scales, "weight_shape": torch.tensor([outs, ins])}
        if name == "compressed zeros":
            tensors["weight_zero_point"] = packed(zeros.T).T
    return {part: tensor.contiguous() for part, tensor in tensors.items()}, exact


def checkpoint(folder: Path, name: str, **changes: Any) -> dict[str, Tensor]:
    """A checkpoint with its head in 16 bits, and its weights in float32."""
    weights = random_weights(CONFIG)
    write_checkpoint(folder, CONFIG, {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[name] | changes}))
    tensors: dict[str, Tensor] = {}
    for weight, value in list(weights.items()):
        if value.dim() == 2 and "layers" in weight:
            parts, weights[weight] = quantized(name, value)
            tensors |= {weight.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
        else:
            tensors[weight] = value.half()
            weights[weight] = value.half().float()
    save_file(tensors, folder / "model.safetensors")
    byte_level_pipeline().save(str(folder / "tokenizer.json"))
    return weights


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_blocks_are_what_was_packed(tmp_path: Path, name: str) -> None:
    weights = checkpoint(tmp_path, name)
    source = SafetensorsSource(tmp_path)
    assert source.config == CONFIG
    for weight in expected_shapes(CONFIG):
        blocks = source.blocks(weight)
        assert torch.equal(source.read(weight).float(), weights[weight]), weight
        assert (blocks is not None) == ("layers" in weight and "norm" not in weight)
        if blocks is not None:
            assert source.stored(weight) == ("Q4_1", blocks.data.nbytes) and blocks.kind == "Q4_1"
            expanded = torch.from_numpy(gguf.quants.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType.Q4_1))
            assert float((expanded - weights[weight]).abs().max()) <= 0.03 / 128  # of a step
    other = SafetensorsSource(tmp_path)
    assert other.fingerprint == source.fingerprint


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed zeros"])
def test_an_engine_computes_with_them(tmp_path: Path, name: str) -> None:
    weights = checkpoint(tmp_path / "packed", name)
    write_checkpoint(tmp_path / "whole", CONFIG, weights)
    byte_level_pipeline().save(str(tmp_path / "whole" / "tokenizer.json"))
    options: dict[str, Any] = {"max_context": 128, "max_sequences": 1, "cache": CacheConfig(method="fp"), "device": "cpu"}
    held, expanded, whole = (
        Engine.load(tmp_path / folder, backend=backend, report=Quiet(), **options)
        for folder, backend in (("packed", "numba"), ("packed", "reference"), ("whole", "reference"))
    )
    ids = [3, 77, 150, 9, 200, 41]
    assert torch.equal(expanded.logits(ids), whole.logits(ids))
    assert held.parts.model.weights.nbytes == held.parts.plan.parts["weights"] < 0.5 * whole.parts.model.weights.nbytes
    assert float((held.logits(ids) - whole.logits(ids)).abs().max()) < 5e-3 * float(whole.logits(ids).std())


def test_what_is_planned_without_the_weights_is_what_is_held(tmp_path: Path) -> None:
    checkpoint(tmp_path, "awq")
    form = form_of("triton", torch.device("cuda", 0), torch.bfloat16)
    planned = form.held_bytes(SafetensorsSource(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    dummy, _ = open_model(str(tmp_path), dummy_weights=True)
    assert form.held_bytes(dummy) == planned < 2 * CONFIG.num_parameters
    report = plan_report(
        str(tmp_path),
        CacheConfig(method="fp"),
        context=128,
        sequences=1,
        memory=None,
        device="a100",
        dtype=None,
        prefill="exact",
    )
    assert report.plan.parts["weights"] == planned


@pytest.mark.parametrize(
    ("name", "changes", "fragments"),
    [
        ("awq", {"bits": 8}, ["awq of 8 bits", "16-bit checkpoint"]),
        ("awq", {"version": "gemv"}, ["version gemv"]),
        ("awq", {"zero_point": False}, ["without zero points"]),
        ("gptq", {"group_size": 48}, ["group_size is 48", "multiples of 32"]),
        ("gptq", {"group_size": 32}, ["scales is [2, 128], not [4, 128]"]),
        ("gptq", {"checkpoint_format": "marlin"}, ["checkpoint_format marlin"]),
        ("gptq", {"quant_method": "bitsandbytes"}, ["bitsandbytes"]),
        ("gptq", {"quant_method": 3}, ["quant_method must be a string"]),
        ("compressed", {"format": "marlin-24"}, ["marlin-24"]),
        ("compressed", {"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}}}, ["float of 8 bits"]),
        ("compressed", {"config_groups": {}}, ["0 groups of layers"]),
        ("compressed", {"config_groups": {"a": 3}}, ["a must be an object"]),
    ],
)
def test_what_is_not_read_is_one_line(tmp_path: Path, name: str, changes: dict[str, Any], fragments: list[str]) -> None:
    checkpoint(tmp_path, name, **changes)
    refused(lambda: open_model(str(tmp_path)), *fragments)


def test_zeros_of_another_form_are_other_weights(tmp_path: Path) -> None:
    checkpoint(tmp_path, "gptq_v2")
    made, config = SafetensorsSource(tmp_path), json.loads((tmp_path / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    for form, same in (("GPTQ_V2", True), ("gptq_p", True), ("gptq", False)):
        config["quantization_config"]["checkpoint_format"] = form
        (tmp_path / "config.json").write_text(json.dumps(config))
        other = SafetensorsSource(tmp_path)
        assert (other.fingerprint == made.fingerprint) == same == torch.equal(other.read(name), made.read(name))


def test_scales_of_another_cache_are_left_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path, "compressed")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"model.layers.0.self_attn.{part}": torch.ones(1) for part in ("k_scale", "v_scale", "q_proj.input_scale")}
    save_file(tensors, tmp_path / "model.safetensors")
    assert SafetensorsSource(tmp_path).config == CONFIG


def test_what_would_change_the_model_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "gptq")
    tensors, prefix = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj."

    def changed(**changes: Tensor | None) -> None:
        found = {**tensors, **{prefix + part: value for part, value in changes.items()}}
        save_file({part: value for part, value in found.items() if value is not None}, tmp_path / "model.safetensors")

    index, shape = tensors[f"{prefix}g_idx"], tensors[f"{prefix}qzeros"].shape
    for changes, fragments in (
        ({"g_idx": index.flip(0)}, [f"{prefix}g_idx", "desc_act"]),
        ({"bias": torch.ones(192).half()}, [f"{prefix}bias is not zero"]),
        ({"qzeros": None}, [f"{prefix}qzeros is []"]),
        ({"qzeros": torch.zeros(shape)}, ["qzeros is stored as F32"]),
        ({"qweight": None}, ["missing", "up_proj.weight", "unexpected"]),
        ({"scales": tensors[f"{prefix}scales"][:1]}, ["scales is [1, 192], not [2, 192]"]),
    ):
        changed(**changes)  # type: ignore[arg-type]
        refused(lambda: SafetensorsSource(tmp_path), *fragments)
    changed(bias=torch.zeros(192).half(), g_idx=None)
    assert SafetensorsSource(tmp_path).config == CONFIG
