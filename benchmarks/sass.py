"""What the compiler makes of the kernels, with no GPU: registers, spills, shared memory and instructions per element.

Compiles for sm_80 and sm_90 ahead of time, disassembles with the tools of the Triton wheel, prints a table and writes
``results/sass.json``. An element is one cached number; a lane-instruction is one of the 32 lanes of a warp-instruction. At
full bandwidth a card may spend at 2.125 bits an element: A100 2.59, H100 2.35, H200 1.64. ``python benchmarks/sass.py``.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from stamp import stamp, write
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skvq.kernels.layout import PageLayout
from skvq.kernels.triton_gpu import (
    blocks,
    combine,
    encode,
    experts,
    grouped,
    label_blocks,
    labels,
    lattice,
    matvec,
    merge,
    pack,
    packed,
    plain,
    prepare,
    quantize,
    slots,
    small,
    unpack,
)  # fmt: skip
from skvq.kernels.triton_gpu.forms import FULL_SPLITS, MAX_SPLITS, PAGE_BLOCK, SLOT_BLOCK, packed_form, rows_by_column

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HALVES, BYTES, WORDS, LONGS = "*fp16", "*u8", "*i32", "*i64"
POINTERS = {  # by name, where it is not float32
    **dict.fromkeys(
        ("pages_ptr", "packed_ptr", "positions_ptr", "meta_ptr", "page_ptr", "held_ptr", "places_ptr", "member_ptr"), WORDS
    ),
    **dict.fromkeys(("size_ptr", "key_label_ptr", "value_label_ptr"), WORDS),
    **dict.fromkeys(("table_ptr", "delta_ptr", "total_ptr", "x_ptr", "gate_up_ptr", "k_ptr", "v_ptr", "half_code_ptr"), HALVES),
    **dict.fromkeys(("retained_ptr", "key_code_ptr", "value_code_ptr", "code_ptr"), BYTES),
    **dict.fromkeys(("key_scale_ptr", "key_mid_ptr", "value_scale_ptr", "value_mid_ptr", "mid_ptr"), BYTES),
    "slots_ptr": LONGS,
}
FLOATS = {"rope_scale", "eps", "half"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation: a kernel, its constants, and the limits that it is held to."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    pointers: dict[str, str]
    elements: int = 0  # cached numbers that one pass of the inner loop covers; 0: no loop to count
    limit: float = 0.0  # lane-instructions per element
    registers: int = 255
    most: int = 0  # registers that the compiler may take, 0: all


@dataclass(frozen=True, slots=True)
class Measured:
    """What one compilation came to."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    loop: int
    per_element: float
    conversions: int  # integer-to-float conversions in the loop
    limit: float
    operations: dict[str, int]


def attend_variant(
    name: str, *, limit: float, registers: int = 255, size: int = 128, key_bits: int = 2, value_bits: int = 2, groups: int = 1,
    width: int = 4, span: bool = False, mean: bool = False, hopper: bool = False,
) -> Variant:  # fmt: skip
    """One form of ``attend_packed_kernel`` as the backend launches it; bits 15 stand for 1.5."""
    bits = [1.5 if b == 15 else float(b) for b in (key_bits, value_bits)]
    layout = PageLayout(head_size=size, kv_heads=8, key_bits=bits[0], value_bits=bits[1], group_size=size // groups)
    form = packed_form(layout, has_mean=mean, shared_bytes=(228 if hopper else 164) << 10)
    constants = {
        "D": size, "KEY_BITS": key_bits, "VALUE_BITS": value_bits, "G": groups, "NH": width, "TILE": layout.tile,
        "PART": form.part, "HAS_SPAN": span,
        "HAS_MEAN": mean, "BY_COLUMN": rows_by_column(layout.tile, groups, has_mean=mean, has_span=span), "BLOCK": SLOT_BLOCK,
        "ASM": True, "FP8": hopper, "PDL": hopper,
    }  # fmt: skip
    pointers = {"q_ptr": HALVES, "key_ptr": BYTES, "value_ptr": BYTES}
    pointers |= {"half_q_ptr": HALVES, "half_key_ptr": HALVES, "half_value_ptr": HALVES}
    return Variant(
        name, packed.attend_packed_kernel, constants, 1, form.stages, pointers, 2 * size * form.part, limit, registers,
        most=form.registers,
    )  # fmt: skip


def attend_variants(arch: int) -> list[Variant]:
    """Decode attention in the forms that matter, and the limits they must keep."""
    hopper = arch >= 90
    return [
        attend_variant("K2V2 g128", limit=1.6, registers=168, hopper=hopper),
        attend_variant("K2V2 g128 span", limit=1.6, registers=200, span=True, hopper=hopper),
        attend_variant("K2V2 g128 8 columns", limit=1.8, registers=208, width=8, hopper=hopper),
        attend_variant("K2V2 g128 mean", limit=1.7, mean=True, hopper=hopper),
        attend_variant("K2V2 g64", limit=2.1, registers=224, groups=2, hopper=hopper),
        attend_variant("K2V2 g64 mean", limit=2.2, groups=2, mean=True, hopper=hopper),
        attend_variant("K2V2 g32", limit=2.7 if arch < 90 else 2.3, groups=4, hopper=hopper),
        attend_variant("K2V1.5 g128", limit=1.8, registers=184, value_bits=15, hopper=hopper),
        attend_variant("K2V1.5 g128 mean", limit=2.2, value_bits=15, mean=True, hopper=hopper),
        attend_variant("K2V1.5 g64", limit=2.3, registers=184, value_bits=15, groups=2, hopper=hopper),
        attend_variant("K1.5V2 g128", limit=1.8, registers=184, key_bits=15, hopper=hopper),
        attend_variant("K3V3 g128", limit=2.2, key_bits=3, value_bits=3, hopper=hopper),
        attend_variant("K4V4 g128", limit=2.2, key_bits=4, value_bits=4, hopper=hopper),
        attend_variant("K8V8 g128", limit=2.2, key_bits=8, value_bits=8, hopper=hopper),
        attend_variant("K2V2 g64, head 64", limit=2.2, registers=168, size=64, hopper=hopper),
    ]


MATVEC: dict[str, dict[str, Any]] = {  # the four of a layer of Mistral-7B; widths of no whole tiles; several vectors
    "qkv": {"width": 4096, "norm": True},
    "output": {"width": 4096},
    "gate up": {"width": 4096, "norm": True, "gated": True},
    "down": {"width": 14336},
    "down 11008": {"width": 11008},
    "qkv, 4 vectors": {"width": 4096, "norm": True, "vectors": 4},
    "down, 2 vectors": {"width": 14336, "vectors": 2},
    "gate up, 2 vectors": {"width": 4096, "norm": True, "gated": True, "vectors": 2},
    "qkv 577": {"width": 577, "norm": True},
    "experts gate up": {"width": 2048, "norm": True, "gated": True, "each": True},
    "experts down": {"width": 768, "each": True},
}


def matvec_variant(
    name: str, arch: int, *, width: int, vectors: int = 1, norm: bool = False, gated: bool = False, each: bool = False
) -> Variant:
    """A matrix of at least 4,096 rows in bfloat16; what comes before or after it is that of the layer."""
    tiling = matvec.tiling_of(vectors, 4096, width, gated=gated)
    constants = {
        "WIDTH": width, "M": vectors, "ROWS": tiling.rows, "BLOCK": 256 * tiling.warps, "DEPTH": tiling.depth, "NORM": norm,
        "GATED": gated, "BIAS": norm and not gated, "ADD": not (norm or each), "EARLY": arch >= 90 and not each, "EACH": each,
    }  # fmt: skip
    names = ("x_ptr", "norm_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "out_ptr")
    pointers = dict.fromkeys(names, "*bf16") | {"id_ptr": LONGS if each else "*bf16"}
    return Variant(name, matvec.matvec_kernel, constants, tiling.warps, 1, pointers, registers=168)


BLOCKS: dict[str, dict[str, Any]] = {  # matrices of quantized blocks: lane-instructions a weight where there is a loop
    "Q4 qkv": {"bits": 4, "width": 4096, "norm": True},
    "Q4 gate up": {"bits": 4, "width": 4096, "norm": True, "gated": True},
    "Q4 down": {"bits": 4, "width": 14336, "limit": 4.9},
    "Q4 down, 4 vectors": {"bits": 4, "width": 14336, "vectors": 4, "limit": 13.8},
    "Q5 down": {"bits": 5, "width": 14336, "limit": 7.9},
    "Q6 qkv": {"bits": 6, "width": 4096, "norm": True},
    "Q6 down": {"bits": 6, "width": 14336, "limit": 7.5},
    "Q8 down": {"bits": 8, "width": 14336, "limit": 5.1},
    "Q4 head": {"bits": 4, "width": 576, "norm": True},
    "Q4 experts gate up": {"bits": 4, "width": 2048, "norm": True, "gated": True, "each": True},
    "Q6 experts down": {"bits": 6, "width": 768, "each": True},
}


def blocks_variant(
    name: str,
    arch: int,
    *,
    bits: int,
    width: int,
    vectors: int = 1,
    norm: bool = False,
    gated: bool = False,
    each: bool = False,
    limit: float = 0.0,
) -> Variant:
    """A matrix of at least 4,096 rows times vectors in bfloat16; what comes before or after it is that of the layer."""
    rows = blocks.rows_of(vectors, 4096, gated=gated, bits=bits)
    count = width // 32
    together = min(triton.next_power_of_2(count), 32 * blocks.WARPS)
    constants = {
        "BLOCKS": count, "M": vectors, "ROWS": rows, "NB": together, "BITS": bits, "TWO": bits == 6, "NORM": norm,
        "GATED": gated, "BIAS": norm and not gated, "ADD": not (norm or each), "EARLY": arch >= 90 and not each, "EACH": each,
        "ASM": True,
    }  # fmt: skip
    halves = dict.fromkeys(("x_ptr", "norm_ptr", "bias_ptr", "residual_ptr", "out_ptr"), "*bf16")
    pointers = halves | dict.fromkeys(("code_ptr", "high_ptr", "pair_ptr"), WORDS) | {"id_ptr": LONGS if each else "*bf16"}
    elements = 32 * together * rows if limit else 0
    return Variant(name, blocks.block_matvec_kernel, constants, together // 32, 1, pointers, elements, limit)


def grouped_variant(name: str, *, gated: bool) -> Variant:
    """Many tokens by 128 experts in bfloat16, as the backend divides them."""
    form = grouped.BLOCKING
    columns = form.outs // 2 if gated else form.outs
    constants = {"E": 128, "BM": form.pairs, "BN": columns, "BK": form.depth, "EVEN": True, "GATED": gated}
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16") | dict.fromkeys(("order_ptr", "bound_ptr"), LONGS)
    return Variant(name, grouped.grouped_kernel, constants, form.warps, form.stages, pointers)


def other_variants(arch: int) -> list[Variant]:
    """The other kernels: they must compile and not spill."""
    codes = {"D": 128, "KEY_BITS": 2, "VALUE_BITS": 15, "G": 2}
    tiled = {**codes, "TILE": 160}
    halves = {"q_ptr": HALVES, "key_ptr": HALVES, "value_ptr": HALVES, "out_ptr": HALVES}
    meta = 1.0 if arch >= 89 else 256.0
    pdl = {"PDL": arch >= 90}
    prepared = {"D": 128, "BITS": 2, "G": 1, "NH": 4, "META": meta, "HAS_BASIS": True, "HAS_MEAN": True}
    prepared |= {"BY_COLUMN": True, "ASM": True} | pdl
    combined = {"D": 128, "BLOCK": 128, "MOST": MAX_SPLITS, "FULL": FULL_SPLITS, "HAS_BASIS": True} | pdl
    sixteen = {"D": 128, "NH": 8, "WIDE": False} | pdl
    reorder = {**codes, "VALUE_BITS": 2, "NH": 8}
    labelled = {**reorder, "NH": 4, "GROUPS": 16, "SHARE": 32, "HAS_SPAN": False, "ASM": True}
    many = {**labelled, "GROUPS": 64}
    tensors = {"q_ptr": HALVES, "key_ptr": BYTES, "value_ptr": BYTES}
    halves_too = tensors | {"turn_ptr": HALVES}
    lattice_pointers = {"code_ptr": BYTES, "word_ptr": "*i32", "scale_ptr": BYTES, "mid_ptr": BYTES, "table_ptr": HALVES}
    encode_pointers = {"key_ptr": HALVES, "value_ptr": HALVES, "value_out_ptr": "*fp32"}
    merging = {"own_ptr": HALVES, "merged_ptr": HALVES, "total_ptr": "*fp32", **{f"out{i}_ptr": HALVES for i in range(1, 8)}}
    stored = {"HAS_BASIS": False, "HAS_MEAN": False, "PRECISE": True, "WIDE": False}
    decoded = {"HAS_BASIS": True, "HAS_MEAN": True, "PRECISE": False, "WIDE": False}
    outputs = ("key_out_ptr", "value_out_ptr")
    routing = {"logit_ptr": "*bf16", "id_ptr": LONGS, "weight_ptr": "*bf16"}
    expanded = {"BLOCKS": 128, "NB": 128, "BITS": 4, "TWO": False, "IDS": True, "ASM": True}
    expand_pointers = {"id_ptr": LONGS, "code_ptr": WORDS, "high_ptr": WORDS, "pair_ptr": WORDS, "out_ptr": "*bf16"}
    return [
        Variant("prepare", prepare.prepare_heads_kernel, prepared, 8, 1, halves),
        Variant("combine", combine.combine_kernel, combined, 8, 1, halves),
        Variant("slots", slots.attend_slots_kernel, {**sixteen, "BLOCK": SLOT_BLOCK}, 1, 1, halves),
        Variant("plain", plain.attend_plain_kernel, {**sixteen, "BLOCK": PAGE_BLOCK}, 4, 3, halves),
        Variant("reorder K2V2 g64", label_blocks.attend_labels_blocks_kernel, labelled, 1, 3, halves_too, 8192, 4.4),
        Variant("reorder K2V2 g64, 32 heads", label_blocks.attend_labels_blocks_kernel, many, 2, 3, halves_too, 8192, 11.2),
        Variant(
            "reorder K2V2 g64, 8 columns",
            label_blocks.attend_labels_blocks_kernel,
            {**labelled, "NH": 8},
            1,
            3,
            halves_too,
            8192,
            5.4,
        ),
        Variant(
            "reorder K4V8 g64",
            label_blocks.attend_labels_blocks_kernel,
            {**labelled, "KEY_BITS": 4, "VALUE_BITS": 8},
            1,
            3,
            halves_too,
        ),
        Variant("reorder, odd bits", labels.attend_labels_kernel, {**reorder, "VALUE_BITS": 3, "TILE": 128}, 4, 1, tensors),
        Variant("reorder K8V2", labels.attend_labels_kernel, {**reorder, "KEY_BITS": 8, "TILE": 128}, 4, 1, tensors),
        Variant("pack", pack.pack_kernel, {**tiled, "QUANTIZED": False}, 4, 1, {}),
        Variant("quantize", quantize.quantize_kernel, {"LEVELS": 4, "WIDTH": 256, "BLOCK": 16}, 8, 1, {"scale_ptr": BYTES}),
        *(
            Variant(f"lattice g{128 // g}", lattice.lattice_kernel, {"D": 128, "G": g, "T": 32}, 1, 1, lattice_pointers)
            for g in (1, 2)
        ),
        Variant("encode", encode.encode_kernel, {"D": 128, "HAS_MEAN": True, "WIDE": False}, 4, 1, encode_pointers),
        Variant("unpack", unpack.unpack_kernel, {**tiled, **stored}, 4, 1, {}),
        Variant("unpack, basis", unpack.unpack_kernel, {**tiled, **decoded}, 4, 1, dict.fromkeys(outputs, "*bf16")),
        Variant("rms norm", small.rms_norm_kernel, {"BLOCK": 4096, "ADD": True}, 8, 1, {**halves, "weight_ptr": HALVES}),
        Variant("merge", merge.merge_kernel, {"COUNT": 8, "D": 128, "BLOCK": 16}, 4, 1, merging),
        Variant("norm heads", small.norm_heads_kernel, {"D": 128, "BLOCK": 128, **pdl}, 1, 1, halves),
        Variant("turn", small.turn_kernel, {"D": 128, **pdl}, 1, 1, {**halves, "places_ptr": LONGS}),
        *(matvec_variant(f"matvec {name}", arch, **form) for name, form in MATVEC.items()),
        *(blocks_variant(f"blocks {name}", arch, **form) for name, form in BLOCKS.items()),
        grouped_variant("grouped gate up", gated=True),
        grouped_variant("grouped down", gated=False),
        Variant("route", experts.route_kernel, {"E": 128, "K": 8, "CHOSEN": 8, "NORMED": True}, 1, 1, routing),
        Variant("expand blocks", blocks.expand_kernel, expanded, 4, 1, expand_pointers),
        Variant("swiglu", small.swiglu_kernel, {"BLOCK": 1024}, 4, 1, halves),
    ]


def compile_variant(variant: Variant, arch: int) -> Any:
    """The compiled kernel; pointers and page strides are declared divisible by 16, as they are at run time."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    loose = {p.name for p in variant.kernel.params if p.do_not_specialize_on_alignment}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = variant.pointers.get(name) or POINTERS.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        strided = name.startswith("stride_") and name not in ("stride_pages_slot", "stride_held")
        strided |= name in ("outs", "width")
        if strided or (name.endswith("_ptr") and name not in loose):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    options |= {"maxnreg": variant.most} if variant.most else {}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], str]:
    """Instructions with their addresses, and the tool's line on resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([str(TOOL), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = (re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line) for line in sass.splitlines())
    return [(int(m.group(1), 16), m.group(2)) for m in found if m], usage


def inner_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """The longest loop that holds no other; code behind the last exit only stands in for warps whose lanes have parted."""
    exits = [i for i, (_, text) in enumerate(instructions) if "EXIT" in text]
    instructions = instructions[: exits[-1] + 1]
    loops = []
    for address, text in instructions:
        target = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) < address:
            loops.append((int(target.group(1), 16), address))
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    if not inner:
        return []
    low, high = max(inner, key=lambda x: x[1] - x[0])
    return [text for address, text in instructions if low <= address <= high]


def operation(text: str) -> str:
    """Name of an instruction without its predicate and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def measure(variant: Variant, arch: int) -> Measured:
    """Compile and count."""
    kernel = compile_variant(variant, arch)
    instructions, usage = disassemble(kernel.asm["cubin"])
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers, usage
    loop = inner_loop(instructions) if variant.elements else []
    counted = collections.Counter(operation(text) for text in loop)
    per_element = len(loop) * 32 * variant.warps / variant.elements if variant.elements else 0.0
    return Measured(
        variant.name, arch, int(numbers.group(1)), int(numbers.group(2)), int(kernel.metadata.shared), len(loop),
        round(per_element, 3), counted["I2F"] + counted["I2FP"], variant.limit, dict(counted.most_common(12)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sass.json")
    output = parser.parse_args().output
    print("limits at full bandwidth, 2.125 bits: A100 2.59, H100 2.35, H200 1.64 lane-instructions an element")
    print(f"{'kernel':28} {'sm':>3} {'regs':>4} {'stack':>5} {'shared':>6} {'loop':>5} {'per element':>11} {'limit':>6}  I2F")
    results = []
    for arch in (80, 90):
        for variant in attend_variants(arch) + other_variants(arch):
            m = measure(variant, arch)
            results.append(asdict(m))
            print(
                f"{m.name:28} {m.arch:3} {m.registers:4} {m.stack:5} {m.shared:6} {m.loop:5} {m.per_element:11.3f}"
                f" {m.limit:6.2f} {m.conversions:4}",
                flush=True,
            )
    record = stamp("aot", "triton")
    write(output, record | {"results": results})
    print(json.dumps(record | {"kernels": len(results), "output": str(output)}))


if __name__ == "__main__":
    main()
