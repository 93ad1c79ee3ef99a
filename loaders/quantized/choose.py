"""Which scheme a config.json says that the matrices are stored by."""

from __future__ import annotations

import re
from pathlib import Path

from skvq.engine.errors import ModelError
from skvq.kernels.ggml.formats import BLOCK
from skvq.loaders.fields import Fields, read_json
from skvq.loaders.quantized.integers import Integers
from skvq.loaders.quantized.rows import Rows
from skvq.loaders.quantized.scheme import Scheme, group_size
from skvq.loaders.quantized.tables import Tables

GPTQ_LESS = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}
"""What zeros are stored less by in each form of GPTQ; they do not differ otherwise."""
_CT_WORDS = (
    ("pack-quantized", "int", 4, ""),
    ("pack-quantized", "int", 4, "zeros"),
    ("pack-quantized", "int", 8, ""),
)
_CT_BYTES = (
    ("float-quantized", "float", 8, ""),
    ("int-quantized", "int", 8, ""),
    ("naive-quantized", "float", 8, ""),
    ("naive-quantized", "int", 8, ""),
)
SECTIONS = ("quantization_config", "compression_config", "quantization")


def scheme_in(folder: Path) -> Scheme | None:
    """What a folder's config.json says, or of modelopt hf_quant_config.json."""
    other = folder / "hf_quant_config.json"
    return scheme_of(read_json(folder / "config.json")) or (_modelopt(read_json(other)) if other.is_file() else None)


def scheme_of(fields: Fields) -> Scheme | None:
    """What a config.json says; None if matrices are whole numbers. ModelError for what is not read."""
    section = next((name for name in SECTIONS if isinstance(fields.data.get(name), dict)), SECTIONS[0])
    found = fields.section(section)
    if not found.data:
        return None
    if not found.has("quant_method") and found.has("group_size"):
        return _mlx(found)
    bitsandbytes = found.has("load_in_8bit") or found.has("load_in_4bit")
    method = found.text("quant_method", "bitsandbytes" if bitsandbytes else None).lower()
    if method not in _METHODS:
        raise _not_read(found, method)
    return _METHODS[method](found)


def _awq(found: Fields) -> Scheme:
    version, has_zeros = found.text("version", "gemm"), found.flag("zero_point", True)
    if found.data.get("bits", 4) != 4:
        raise _not_read(found, f"awq of {found.data['bits']} bits")
    if version.lower() != "gemm" or not has_zeros:
        raise _not_read(found, f"awq, version {version}, {'with' if has_zeros else 'without'} zero points")
    return Integers(library="awq", bits=4, group=_group(found))


def _gptq(found: Fields) -> Scheme:
    bits, form = found.data.get("bits", 4), found.text("checkpoint_format", "gptq").lower()
    if bits not in (4, 8) or form not in GPTQ_LESS:
        raise _not_read(found, f"gptq of {bits} bits, checkpoint_format {form}")
    return Integers(
        library="gptq",
        bits=bits,
        group=_group(found),
        less=GPTQ_LESS[form],
        reordered=found.flag("desc_act", False),
        around_half=bits == 8 and found.flag("sym", True),
    )


def _compressed(found: Fields) -> Scheme | None:
    groups = found.section("config_groups")
    form = found.text("format", "")
    if found.data.get("transform_config"):
        raise _not_read(found, "compressed-tensors with online rotations (transform_config)")
    sparse = found.section("sparsity_config").text("format", "dense")
    if sparse != "dense":
        raise _not_read(found, f"compressed-tensors, sparse ({sparse})")
    if not groups.data:
        return None
    if len(groups.data) != 1:
        raise _not_read(found, f"compressed-tensors, {len(groups.data)} groups of layers, format {form!r}")
    weights = groups.section(next(iter(groups.data))).section("weights")
    bits, kind, strategy = (weights.data.get(name) for name in ("num_bits", "type", "strategy"))
    has_zeros, size = not weights.flag("symmetric", True), weights.data.get("group_size")
    stored = form, kind, bits, "zeros" if has_zeros else ""
    if stored in _CT_WORDS and strategy in ("group", "channel"):
        return Integers(
            library="compressed-tensors",
            bits=weights.integer("num_bits"),
            group=group_size(weights, size if strategy == "group" else -1),
            has_zeros=has_zeros,
            around_half=not has_zeros,
            reordered=weights.data.get("actorder") == "group",
        )
    if stored in _CT_BYTES and strategy in ("tensor", "channel", "group", "block"):
        block = _block(weights, "block_structure") if strategy == "block" else ()
        block = (1, group_size(weights, size)) if strategy == "group" else block
        if kind == "float" or not block or block[1] % BLOCK == 0:
            return Rows(library="compressed-tensors", is_float=kind == "float", block=block)
    zeros = " with zeros" if has_zeros else ""
    raise _not_read(found, f"compressed-tensors, format {form!r}, {kind} of {bits} bits by {strategy}{zeros}")


def _fp8(found: Fields) -> Scheme:
    if found.text("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _not_read(found, f"fp8 of {found.text('fmt')}")
    block = _block(found, "weight_block_size") if found.has("weight_block_size") else ()
    return Rows(library="fp8", is_float=True, block=block)


def _modelopt(found: Fields) -> Scheme:
    found = found.section("quantization") if found.has("quantization") else found
    algorithm = found.text("quant_algo", "")
    if algorithm != "FP8":
        raise _not_read(found, f"modelopt, quant_algo {algorithm!r}")
    return Rows(library="modelopt", is_float=True)


def _bitsandbytes(found: Fields) -> Scheme:
    if found.flag("load_in_8bit", False):
        return Rows(library="bitsandbytes", is_float=False)
    table, storage = found.text("bnb_4bit_quant_type", "fp4"), found.text("bnb_4bit_quant_storage", "uint8")
    if table not in ("nf4", "fp4") or storage != "uint8":
        raise _not_read(found, f"bitsandbytes, {table} in {storage}")
    return Tables(table=table, nested=found.flag("bnb_4bit_use_double_quant", False))


def _mlx(found: Fields) -> Scheme:
    mode, bits = found.text("mode", "affine"), found.data.get("bits", 4)
    whole = {name: found.data.get(name) for name in ("group_size", "bits")}
    others = [name for name, value in found.data.items() if isinstance(value, dict) and not whole.items() <= value.items()]
    if mode != "affine" or bits != 4 or others:
        of = f", {others[0]} in another way" if others else ""
        raise _not_read(found, f"mlx, {mode} of {bits} bits{of}")
    return Integers(library="mlx", bits=4, group=group_size(found, found.data["group_size"]))


_METHODS = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
}


def _group(found: Fields) -> int:
    return group_size(found, found.data.get("group_size", 128))


def _block(fields: Fields, key: str) -> tuple[int, int]:
    size = fields.data.get(key)
    if isinstance(size, str) and re.fullmatch(r"\d{1,5}x\d{1,5}", size):
        size = [int(number) for number in size.split("x")]
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n <= 0 for n in size):
        raise ModelError(f"{fields.where}: {key} must be two numbers of rows and columns, got {str(size)[:40]}")
    return size[0], size[1]


def _not_read(fields: Fields, what: str) -> ModelError:
    return ModelError(
        f"{fields.where}: the weights are quantized with {what[:160]}, and this engine reads awq and mlx of 4 bits, gptq and "
        "compressed-tensors of 4 and 8, fp8, and bitsandbytes: use the 16-bit checkpoint of the same model, or its GGUF"
    )
