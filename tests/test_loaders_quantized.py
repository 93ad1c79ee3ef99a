"""Quantized checkpoints: the weights that their own libraries read, held as blocks where there are such."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from skvq.loaders.names import expected_shapes, stacks
from skvq.loaders.open import open_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIG = tiny_config(hidden_size=128, intermediate_size=192, num_heads=4, num_kv_heads=2, head_size=32)

Packed = tuple[dict[str, Tensor], Tensor]
"""The tensors of a matrix by what follows its prefix, and what they stand for, float32 [out, in]."""


def words(codes: Tensor, bits: int = 4, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Words int32 [rows, n] of codes [rows, n * 32 / bits]: field i holds the code of place order[i] in the word."""
    count = 32 // bits
    packed = torch.zeros(len(codes), codes.shape[1] // count, dtype=torch.int64)
    for column in range(packed.shape[1]):
        for field, place in zip(range(count), order, strict=False):
            packed[:, column] |= codes[:, count * column + place].long() << bits * field
    return packed.to(torch.int32)  # the sign bit too


def drawn(weight: Tensor, bits: int, group: int, *, zero: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [out, in], scales and zeros [out, groups] of a made-up matrix, and its weights float32."""
    outs, ins = weight.shape
    groups = ins // (group or ins)
    generator = torch.Generator().manual_seed(outs * ins)
    codes = torch.randint(1 << bits, (outs, ins), generator=generator)
    zeros = torch.randint(1 << bits, (outs, groups), generator=generator)
    zeros = zeros if zero is None else torch.full_like(zeros, zero)
    scales = ((0.02 + 0.01 * torch.rand(outs, groups, generator=generator)) * 16 / 2**bits).half()
    exact = (codes.view(outs, groups, -1) - zeros[..., None]) * scales[..., None].float()
    return codes, scales, zeros, exact.view(outs, ins)


def awq(weight: Tensor) -> Packed:
    codes, scales, zeros, exact = drawn(weight, 4, 64, zero=None)
    return {"qweight": words(codes.T, 4, AWQ_ORDER), "qzeros": words(zeros.T, 4, AWQ_ORDER), "scales": scales.T}, exact


def gptq(
    bits: int, group: int, *, less: int = 1, zero: int | None = None, shuffled: bool = False
) -> Callable[[Tensor], Packed]:
    def pack(weight: Tensor) -> Packed:
        codes, scales, zeros, exact = drawn(weight, bits, group, zero=zero)
        ins = codes.shape[1]
        index = torch.arange(ins, dtype=torch.int32) // (group or ins)
        if shuffled:
            index = index[torch.randperm(ins, generator=torch.Generator().manual_seed(ins))]
            exact = (codes - zeros[:, index.long()]) * scales[:, index.long()].float()
        if shuffled or (bits == 8 and zero is None):  # expanded to 16 bits
            exact = exact.half().float()
        stored = words(((zeros - less) % 2**bits).T, bits)
        return {"qweight": words(codes, bits).T, "qzeros": stored, "scales": scales.T, "g_idx": index}, exact

    return pack


def compressed(bits: int, group: int, *, symmetric: bool) -> Callable[[Tensor], Packed]:
    def pack(weight: Tensor) -> Packed:
        codes, scales, zeros, exact = drawn(weight, bits, group, zero=1 << bits - 1 if symmetric else None)
        tensors = {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
        return tensors if symmetric else tensors | {"weight_zero_point": words(zeros.T, bits).T}, exact

    return pack


def mlx(weight: Tensor) -> Packed:
    codes, scales, _, _ = drawn(weight, 4, 64, zero=0)
    biases = torch.randn(scales.shape, generator=torch.Generator().manual_seed(3)).half() * 0.1
    exact = (codes.view(*scales.shape, -1) * scales[..., None].float() + biases[..., None].float()).view(codes.shape)
    return {"weight": words(codes).view(torch.uint32), "scales": scales, "biases": biases}, exact


def int8(group: int) -> Callable[[Tensor], Packed]:
    def pack(weight: Tensor) -> Packed:
        codes, scales, _, exact = drawn(weight, 8, group, zero=128)
        return {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}, exact

    return pack


def bnb_int8(weight: Tensor) -> Packed:
    codes, scales, _, _ = drawn(weight, 8, 0, zero=128)
    largest = scales.float()[:, 0] * 127
    return {
        "weight": (codes - 128).to(torch.int8), "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8),
    }, (codes - 128) * (largest / 127)[:, None]  # fmt: skip


def fp8(shape: Callable[[int, int], tuple[int, ...]], name: str, block: int = 0) -> Callable[[Tensor], Packed]:
    def pack(weight: Tensor) -> Packed:
        outs, ins = weight.shape
        generator = torch.Generator().manual_seed(outs)
        codes = (100 * torch.randn(outs, ins, generator=generator)).to(torch.float8_e4m3fn)
        scales = 0.001 * (1 + torch.rand(shape(outs, ins), generator=generator))
        wide = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[:outs, :ins] if block else scales
        exact = codes.float() * (wide[:, None] if wide.dim() == 1 and len(wide) > 1 else wide)
        return {"weight": codes, name: scales, "input_scale": torch.ones(1)}, exact.half().float()

    return pack


def bnb(table: str, *, nested: bool) -> Callable[[Tensor], Packed]:
    def pack(weight: Tensor) -> Packed:
        outs, ins = weight.shape
        generator = torch.Generator().manual_seed(outs + ins)
        codes = torch.randint(16, (outs * ins,), generator=generator)
        numbers, blocks = torch.linspace(-1, 1, 16) ** 3, outs * ins // 64
        state: dict[str, Any] = {"quant_type": table, "blocksize": 64, "dtype": "bfloat16", "shape": [outs, ins]}
        tensors = {"weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None], "weight.quant_map": numbers}
        largest = 0.1 + torch.rand(blocks, generator=generator)
        tensors["weight.absmax"] = largest
        if nested:
            again, numbers_8 = torch.randint(256, (blocks,), generator=generator), torch.linspace(-1, 1, 256)
            scales, offset = torch.rand(-(-blocks // 256), generator=generator), 0.7
            largest = numbers_8[again] * scales.repeat_interleave(256)[:blocks] + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors |= {
                "weight.absmax": again.to(torch.uint8), "weight.nested_quant_map": numbers_8, "weight.nested_absmax": scales,
            }  # fmt: skip
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{table}"] = text
        return tensors, (numbers[codes].view(-1, 64) * largest[:, None]).view(outs, ins).half().float()

    return pack


def ct(form: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
SCHEMES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed], str]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}, awq, "Q4_1"),
    "gptq": (GPTQ, gptq(4, 64), "Q4_1"),
    "gptq_v2": (GPTQ | {"group_size": 32, "checkpoint_format": "gptq_v2"}, gptq(4, 32, less=0), "Q4_1"),
    "gptq rows": (GPTQ | {"group_size": -1}, gptq(4, 0), "Q4_1"),
    "gptq 8": (GPTQ | {"bits": 8}, gptq(8, 64, zero=128), "Q8_0"),
    "gptq desc_act": (GPTQ | {"desc_act": True}, gptq(4, 64, shuffled=True), ""),
    "compressed": (
        ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=64, symmetric=True),
        compressed(4, 64, symmetric=True), "Q4_1",
    ),
    "compressed zeros": (
        ct("pack-quantized", num_bits=4, type="int", strategy="channel", group_size=None, symmetric=False),
        compressed(4, 0, symmetric=False), "Q4_1",
    ),
    "compressed 8": (
        ct("pack-quantized", num_bits=8, type="int", strategy="group", group_size=32, symmetric=True),
        compressed(8, 32, symmetric=True), "Q8_0",
    ),
    "gptq 8 zeros": (GPTQ | {"bits": 8, "sym": False}, gptq(8, 64), ""),
    "int8": (ct("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True), int8(0), "Q8_0"),
    "int8 groups": (ct("int-quantized", num_bits=8, type="int", strategy="group", group_size=64), int8(64), "Q8_0"),
    "fp8 rows": (
        ct("float-quantized", num_bits=8, type="float", strategy="channel"), fp8(lambda n, m: (n, 1), "weight_scale"), "",
    ),
    "fp8 naive": (
        ct("naive-quantized", num_bits=8, type="float", strategy="tensor"), fp8(lambda n, m: (1,), "weight_scale"), "",
    ),
    "fp8 tensor": (FP8 | {"activation_scheme": "static"}, fp8(lambda n, m: (), "weight_scale"), ""),
    "fp8 vectors": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8(lambda n, m: (n,), "weight_scale"), ""),
    "fp8 blocks": (
        FP8 | {"weight_block_size": [48, 48]}, fp8(lambda n, m: (-(-n // 48), -(-m // 48)), "weight_scale_inv", 48), "",
    ),
    "nf4": (
        BNB | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, bnb("nf4", nested=True), "",
    ),
    "fp4": (BNB | {"bnb_4bit_quant_type": "fp4"}, bnb("fp4", nested=False), ""),
    "bnb int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8, "Q8_0"),
    "mlx": ({"group_size": 64, "bits": 4}, mlx, "Q4_1"),
}  # fmt: skip


def checkpoint(folder: Path, name: str, *, stacked: bool = False, **changes: Any) -> dict[str, Tensor]:
    """A checkpoint with its head in 16 bits (but for mlx), and the weights that it stands for.

    stacked: as Phi-3 has q, k and v, and gate and up.
    """
    scheme, pack, _ = SCHEMES[name]
    weights = random_weights(CONFIG)
    all_stacks = stacks(expected_shapes(CONFIG)) if stacked else {}
    for whole, (_, parts) in all_stacks.items():
        weights[whole] = torch.cat([weights.pop(part) for part in parts])
    write_checkpoint(folder, CONFIG, {})
    config = json.loads((folder / "config.json").read_text())
    section = "quantization" if name == "mlx" else "quantization_config"
    (folder / "config.json").write_text(json.dumps(config | {section: scheme | changes}))
    tensors: dict[str, Tensor] = {}
    for weight, value in list(weights.items()):
        if value.dim() == 2 and ("layers" in weight or name == "mlx"):
            parts, weights[weight] = pack(value)
            tensors |= {weight.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}
        else:
            tensors[weight] = value.half()
            weights[weight] = value.half().float()
    save_file(tensors, folder / "model.safetensors")
    byte_level_pipeline().save(str(folder / "tokenizer.json"))
    for whole, (_, parts) in all_stacks.items():
        rows = [expected_shapes(CONFIG)[part][0] for part in parts]
        weights |= dict(zip(parts, weights.pop(whole).split(rows), strict=True))
    return weights


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_and_blocks_are_what_was_packed(tmp_path: Path, name: str) -> None:
    weights, kind = checkpoint(tmp_path, name), SCHEMES[name][2]
    source = SafetensorsSource(tmp_path)
    assert source.config == CONFIG
    for weight, shape in expected_shapes(CONFIG).items():
        blocks, whole = source.blocks(weight), source.read(weight)
        packed = len(shape) == 2 and ("layers" in weight or name == "mlx")
        assert torch.equal(whole.float(), weights[weight]), weight
        assert (blocks is not None) == bool(packed and kind) and bool(source.expanded(weight)) == (packed and not kind)
        if blocks is None:
            assert source.stored(weight) == (str(whole.dtype), whole.nbytes)
            continue
        assert source.stored(weight) == (kind, blocks.data.nbytes) and blocks.kind == kind
        expanded = torch.from_numpy(gguf.quants.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType[kind]))
        assert float((expanded - weights[weight]).abs().max()) <= 0.03 / 128  # of a step
    other = SafetensorsSource(tmp_path)
    assert other.fingerprint == source.fingerprint


@pytest.mark.parametrize("name", SCHEMES)
def test_matrices_stacked_as_phi3_has_them(tmp_path: Path, name: str) -> None:
    weights, kind = checkpoint(tmp_path, name, stacked=True), SCHEMES[name][2]
    source = SafetensorsSource(tmp_path)
    for weight in expected_shapes(CONFIG):
        blocks, whole = source.blocks(weight), source.read(weight)
        assert torch.equal(whole.float(), weights[weight]), weight
        assert source.stored(weight)[1] == (whole.nbytes if blocks is None else blocks.data.nbytes)
        if blocks is not None:
            expanded = torch.from_numpy(gguf.quants.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType[kind]))
            assert float((expanded - weights[weight]).abs().max()) <= 0.03 / 128


@pytest.mark.parametrize("name", ["awq", "int8", "mlx", "nf4"])
def test_rows_of_heads_turned_in_part_change_places(tmp_path: Path, name: str) -> None:
    """Of what makes queries and keys, in blocks or expanded, and of nothing else."""
    weights = checkpoint(tmp_path, name, stacked=True)
    path, rotary = tmp_path / "config.json", CONFIG.head_size // 2
    data = json.loads(path.read_text()) | {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5}
    path.write_text(json.dumps(data | {"rope_parameters": data["rope_parameters"] | {"partial_rotary_factor": 0.5}}))
    source = SafetensorsSource(tmp_path)
    assert source.config.rotary_size == rotary
    first, second = torch.arange(rotary).chunk(2), torch.arange(rotary, CONFIG.head_size).chunk(2)
    order = torch.cat([first[0], second[0], first[1], second[1]])
    for weight in expected_shapes(CONFIG):
        whole, blocks = weights[weight], source.blocks(weight)
        if ".q_proj" in weight or ".k_proj" in weight:
            whole = whole.unflatten(0, (-1, CONFIG.head_size))[:, order].flatten(0, 1)
        assert torch.equal(source.read(weight).float(), whole), weight
        if blocks is not None:
            kind = gguf.GGMLQuantizationType[blocks.kind]
            expanded = torch.from_numpy(gguf.quants.dequantize(blocks.data.numpy(), kind))
            assert float((expanded - whole).abs().max()) <= 0.03 / 128


class Told(Quiet):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("name", ["awq", "gptq desc_act", "compressed zeros", "int8", "fp8 blocks", "nf4", "mlx"])
def test_an_engine_computes_with_them(tmp_path: Path, name: str) -> None:
    weights, kind = checkpoint(tmp_path / "packed", name), SCHEMES[name][2]
    write_checkpoint(tmp_path / "whole", CONFIG, weights)
    byte_level_pipeline().save(str(tmp_path / "whole" / "tokenizer.json"))
    options: dict[str, Any] = {"max_context": 128, "max_sequences": 1, "cache": CacheConfig(method="fp"), "device": "cpu"}
    told = Told(), Told(), Told()
    held, expanded, whole = (
        Engine.load(tmp_path / folder, backend=backend, report=report, **options)
        for folder, backend, report in zip(
            ("packed", "packed", "whole"), ("numba", "reference", "reference"), told, strict=True
        )
    )
    ids = [3, 77, 150, 9, 200, 41]
    assert torch.equal(expanded.logits(ids), whole.logits(ids))
    assert held.parts.model.weights.nbytes == held.parts.plan.parts["weights"] <= 0.52 * whole.parts.model.weights.nbytes
    assert float((held.logits(ids) - whole.logits(ids)).abs().max()) < 5e-3 * float(whole.logits(ids).std())
    assert [" ".join(report.said).count("more memory") for report in told] == [not kind, 1, 0]
    if not kind:
        label = {"gptq desc_act": "gptq with reordered channels", "fp8 blocks": "FP8", "nf4": "bitsandbytes nf4"}[name]
        assert any(f"weights stored as {label} are held as float16" in said for said in told[0].said)


@pytest.mark.parametrize(("name", "factor"), [("awq", 2), ("int8", 2), ("fp8 rows", 2.1), ("mlx", 0.7)])
def test_what_is_planned_without_the_weights_is_what_is_held(tmp_path: Path, name: str, factor: float) -> None:
    checkpoint(tmp_path, name)
    form = form_of("triton", torch.device("cuda", 0), torch.bfloat16)
    planned = form.held_bytes(SafetensorsSource(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    dummy, _ = open_model(str(tmp_path), dummy_weights=True)
    assert form.held_bytes(dummy) == planned < factor * CONFIG.num_parameters
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
        ("gptq", {"bits": 3}, ["gptq of 3 bits"]),
        ("gptq", {"quant_method": "hqq"}, ["quantized with hqq"]),
        ("gptq", {"quant_method": 3}, ["quant_method must be a string"]),
        ("compressed", {"format": "marlin-24"}, ["marlin-24"]),
        ("compressed", {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}}, ["float of 4 bits"]),
        ("compressed", {"config_groups": {}}, ["weight_packed is stored as I32", "does not say how"]),
        ("compressed", {"config_groups": {"a": {}, "b": {}}}, ["2 groups of layers"]),
        ("compressed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparse (sparse-24-bitmask)"]),
        (
            "int8 groups",
            {
                "config_groups": {
                    "a": {
                        "weights": {
                            "num_bits": 8,
                            "type": "int",
                            "strategy": "block",
                            "block_structure": "16x16",
                        }
                    }
                }
            },
            ["int of 8 bits by block"],
        ),
        ("nf4", {"bnb_4bit_quant_storage": "bfloat16"}, ["nf4 in bfloat16"]),
        ("compressed", {"config_groups": {"a": 3}}, ["a must be an object"]),
        ("compressed", {"transform_config": {"config_groups": {"R4": {}}}}, ["online rotations"]),
        ("fp8 blocks", {"weight_block_size": [48]}, ["weight_block_size must be two numbers"]),
        ("fp8 blocks", {"weight_block_size": [64, 64]}, ["weight_scale_inv is [3, 3], not [2, 2]"]),
        ("fp8 vectors", {"quant_algo": "NVFP4"}, ["NVFP4"]),
        ("nf4", {"bnb_4bit_quant_type": "int4"}, ["bitsandbytes, int4"]),
        ("nf4", {"bnb_4bit_use_double_quant": False}, ["absmax is stored as U8, not F32"]),
        ("mlx", {"bits": 6}, ["mlx, affine of 6 bits"]),
        ("mlx", {"model.layers.0.mlp.up_proj": {"bits": 8}}, ["up_proj in another way"]),
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
    tensors |= {f"model.layers.0.self_attn.{part}": torch.ones(1) for part in ("k_scale", "kv_scale", "q_proj.input_scale")}
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
        ({"g_idx": index + 1}, ["groups that there are not"]),
        ({"bias": torch.ones(192).half()}, [f"{prefix}bias is not zero"]),
        ({"qzeros": None}, [f"{prefix}qzeros is missing"]),
        ({"qzeros": torch.zeros(shape)}, ["qzeros is stored as F32"]),
        ({"qweight": None}, ["missing", "up_proj.weight", "unexpected"]),
        ({"scales": tensors[f"{prefix}scales"][:1]}, ["scales is [1, 192], not [2, 192]"]),
    ):
        changed(**changes)  # type: ignore[arg-type]
        refused(lambda: SafetensorsSource(tmp_path), *fragments)
    changed(bias=torch.zeros(192).half(), g_idx=None)
    assert SafetensorsSource(tmp_path).config == CONFIG


def test_channels_in_another_order_are_followed_whatever_the_config_says(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, "gptq desc_act", desc_act=False)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(SafetensorsSource(tmp_path).read(name).float(), weights[name])
    checkpoint(tmp_path, "gptq", desc_act=True)
    assert SafetensorsSource(tmp_path).blocks(name) is not None  # in order after all


@pytest.mark.parametrize(
    ("name", "part", "value", "fragment"),
    [
        ("gptq 8", "qzeros", torch.zeros(2, 48, dtype=torch.int32), "zeros are not 128"),
        ("bnb int8", "weight_format", torch.tensor(2, dtype=torch.uint8), "a GPU's order"),
    ],
)
def test_what_is_not_as_the_config_says_is_refused(tmp_path: Path, name: str, part: str, value: Tensor, fragment: str) -> None:
    checkpoint(tmp_path, name)
    tensors, prefix = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj."
    save_file(tensors | {prefix + part: value}, tmp_path / "model.safetensors")
    refused(lambda: SafetensorsSource(tmp_path), "up_proj", fragment)


def test_what_says_how_weights_are_quantized(tmp_path: Path) -> None:
    """modelopt has a file of its own; bitsandbytes may leave its name out; a key of another meaning is none."""
    weights = checkpoint(tmp_path, "fp8 vectors")
    config = json.loads((tmp_path / "config.json").read_text())
    found = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization": "none"}))
    refused(lambda: SafetensorsSource(tmp_path), "is stored as F8_E4M3", "does not say how it is quantized")
    other = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": found["quant_algo"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(other))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(SafetensorsSource(tmp_path).read(name).float(), weights[name])
    checkpoint(tmp_path / "bnb", "bnb int8", quant_method=None)
    assert SafetensorsSource(tmp_path / "bnb").blocks(name) is not None


def test_a_quantized_head_is_its_own(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, "mlx")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(SafetensorsSource(tmp_path).read("lm_head.weight"), weights["lm_head.weight"])


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    checkpoint(tmp_path, "nf4")
    tensors, weight = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    name = f"{weight}.quant_state.bitsandbytes__nf4"
    for text, fragment in ((b"\xff", "not what bitsandbytes writes"), (b'{"blocksize": 128}', "(128, 256)")):
        save_file(tensors | {name: torch.tensor(list(text), dtype=torch.uint8)}, tmp_path / "model.safetensors")
        refused(lambda: SafetensorsSource(tmp_path), weight, fragment)
