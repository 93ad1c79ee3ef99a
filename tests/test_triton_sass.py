"""Gates of the Triton kernels that need no GPU: what the compiler makes of them for sm_80 and sm_90, and the assembly."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
if not hasattr(triton, "JITFunction"):
    pytest.skip("Triton without a compiler", allow_module_level=True)

from scripts import loaded  # noqa: E402

from skvq.kernels.layout import PageLayout  # noqa: E402
from skvq.kernels.triton_gpu import loaders, metadata, overlap, raised  # noqa: E402
from skvq.kernels.triton_gpu.forms import SHARED_MARGIN, label_bytes, label_form, packed_bytes, packed_form  # noqa: E402

sass = loaded("sass")

if not isinstance(sass.packed.attend_packed_kernel, triton.JITFunction):
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

QUICK = {"K2V2 g128", "K2V1.5 g128", "K2V2 g64 mean", "matvec qkv", "matvec gate up", "matvec down", "blocks Q4 down"}
SMALL = {"combine", "slots", "plain", "unpack", "unpack, basis", "prepare"}
SPILLS = {  # bytes of stack, each with its reason; nothing of the default decode step is here
    "lattice g128 on 80": 24,  # Triton 3.6 only; as that of g64
    "lattice g64": 56,  # addresses, outside of the loops over blocks of channels
    "quantize": 16,  # Triton 3.6 only; packing under labels
    "reorder K2V2 g64, 32 heads": 224,  # metadata of 64 groups; that of 16 fits
    "reorder K2V2 g64, 8 columns": 24,  # speculative queries, or eight heads that share keys
    "reorder K8V2": 176,  # keys in float32: right, and slow
}
REGISTERS: dict[str, int] = {}  # more than a variant's limit
SPILLS_OF_3_9 = {
    "K2V1.5 g128 mean": 40,
    "K2V2 g128": 16,
    "K2V2 g64 mean": 32,
    "reorder K2V2 g64": 16,
    "reorder K4V8 g64": 8,
}  # on sm_90, from Triton 3.9 on; 3.6 and 3.7 keep them in registers
LIMITS: dict[str, float] = {}  # more instructions than a variant's limit
LIMITS_OF_3_7 = {
    "blocks Q4 down on 80": 5.0,
    "blocks Q5 down on 80": 8.1,
    "blocks Q6 down": 7.7,
    "blocks Q8 down": 5.3,
}  # of torch 2.13; 3.6 and 3.9 keep to the limits
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
if (3, 7) <= VERSION < (3, 9):
    LIMITS |= LIMITS_OF_3_7
if VERSION >= (3, 9):
    SPILLS |= {f"{name} on 90": nbytes for name, nbytes in SPILLS_OF_3_9.items()}
    REGISTERS |= {"matvec down 11008 on 90": 172}  # 136 from Triton 3.6


def cases(quick: bool) -> list[tuple[int, str]]:
    found = [(arch, v.name) for arch in (80, 90) for v in sass.attend_variants(arch) + sass.other_variants(arch)]
    return [(arch, name) for arch, name in found if ((name in QUICK or (name in SMALL and arch == 80)) == quick)]


def check(arch: int, name: str) -> None:
    variant = next(v for v in sass.attend_variants(arch) + sass.other_variants(arch) if v.name == name)
    m = sass.measure(variant, arch)
    assert m.stack <= SPILLS.get(f"{name} on {arch}", SPILLS.get(name, 0)), m
    assert m.registers <= REGISTERS.get(f"{name} on {arch}", variant.registers), m
    if variant.limit:
        assert 0 < m.per_element <= LIMITS.get(f"{name} on {arch}", LIMITS.get(name, variant.limit)), m
        assert m.conversions == 0, m


@pytest.mark.parametrize(("arch", "name"), cases(True))
def test_registers_spills_and_instructions(arch: int, name: str) -> None:
    check(arch, name)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), cases(False))
def test_registers_spills_and_instructions_of_all(arch: int, name: str) -> None:
    check(arch, name)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["qkv", "output", "gate up", "down"])
def test_weights_are_on_their_way_before_anything_waits(arch: int, name: str) -> None:
    """All tiles that may be, or eight loads of 16 bytes a thread, before the first multiply-add and a norm's barrier."""
    [variant] = [v for v in sass.other_variants(arch) if v.name == f"matvec {name}"]
    instructions, _ = sass.disassemble(sass.compile_variant(variant, arch).asm["cubin"])
    texts = [text for _, text in instructions]
    loads = [i for i, text in enumerate(texts) if "LDG" in text and ".EF" in text]  # marked as read once
    first_wait = next(i for i, text in enumerate(texts) if "FFMA" in text or "BAR" in text)
    assert all(".128" in texts[i] for i in loads)
    held = variant.constants["ROWS"] * (2 if variant.constants["GATED"] else 1)
    assert sum(i < first_wait for i in loads) >= min(held * variant.constants["DEPTH"], 8) >= 4, texts[:first_wait]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["Q4 qkv", "Q4 gate up", "Q4 down", "Q6 down"])
def test_blocks_are_on_their_way_before_anything_waits(arch: int, name: str) -> None:
    """A block of each of a program's rows, 16 bytes at once, and nothing of it goes through shared memory on its way."""
    [variant] = [v for v in sass.other_variants(arch) if v.name == f"blocks {name}"]
    kernel = sass.compile_variant(variant, arch)
    texts = [text for _, text in sass.disassemble(kernel.asm["cubin"])[0]]
    first_use = next(i for i, text in enumerate(texts) if "FFMA" in text or "BAR" in text)
    held = variant.constants["ROWS"] * (2 if variant.constants["GATED"] else 1)
    assert sum("LDG" in text and ".EF" in text and ".128" in text for text in texts[:first_use]) >= held, texts[:first_use]
    assert kernel.metadata.shared <= 4 * variant.warps * held * 2, kernel.metadata.shared  # sums of warps alone


@pytest.mark.parametrize("arch", [80, 90])
def test_loaders_see_four_neighbouring_bytes(arch: int) -> None:
    """The assembly exchanges bytes 1 and 2 of a word: it is right only where a word is four neighbours of a row."""
    variant = next(v for v in sass.attend_variants(arch) if v.name == "K2V2 g128")
    text = sass.compile_variant(variant, arch).asm["ttgir"]
    packed = [line for line in text.splitlines() if "elementwise_inline_asm" in line and "packed_element = 4" in line]
    assert len(packed) == 2, packed
    for line in packed:
        operand = re.search(r"tensor<\d+x\d+xi8, (#ttg\.dot_op<\{.*?\}>)> ->", line)
        assert operand and "opIdx = 0" in operand.group(1) and "kWidth = 4" in operand.group(1), line


def run_assembly(text: str, *words: int) -> dict[int, int]:
    """Outputs of a loader's PTX on its words: a seven-instruction machine."""
    registers: dict[str, int] = {}
    body = text[text.index(";") + 1 : text.rindex("}")]
    outputs = max(int(n) for n in re.findall(r"\$(\d+)", text)) - len(words) + 1

    def value(name: str) -> int:
        if name.startswith("$") and int(name[1:]) >= outputs:
            return words[int(name[1:]) - outputs]
        return registers[name] if name in registers else int(name, 0)

    for line in (part.strip() for part in body.split(";") if part.strip()):
        op, rest = line.split(" ", 1)
        target, *names = [part.strip() for part in rest.split(",")]
        x = [value(name) for name in names]
        if op == "and.b32":
            registers[target] = x[0] & x[1]
        elif op == "lop3.b32":
            assert x[3] == 0xEA, line
            registers[target] = (x[0] & x[1]) | x[2]
        elif op == "shr.u32":
            registers[target] = x[0] >> x[1]
        elif op == "shl.b32":
            registers[target] = (x[0] << x[1]) & 0xFFFFFFFF
        elif op == "mov.b32":
            registers[target] = x[0]
        elif op == "mul.lo.u32":
            registers[target] = (x[0] * x[1]) & 0xFFFFFFFF
        else:
            assert op == "prmt.b32", line
            both = x[0] | (x[1] << 32)
            picked = [(x[2] >> (4 * i)) & 15 for i in range(4)]
            data = [(both >> (8 * (pick & 7))) & 0xFF for pick in picked]
            data = [(0xFF if byte & 0x80 else 0) if pick & 8 else byte for byte, pick in zip(data, picked, strict=True)]
            registers[target] = sum(byte << (8 * i) for i, byte in enumerate(data))
    return {i: registers[f"${i}"] for i in range(outputs)}


FORMS = [*((width, "") for width in (1, 2, 4, 8, 15)), (2, "_CUMULATIVE"), (4, "_NORMAL"), (8, "_NORMAL")]


@pytest.mark.parametrize("width, form", FORMS)
def test_assembly_equals_the_portable_form(width: int, form: str) -> None:
    text = getattr(loaders, f"ASM_{'TRIT' if width == 15 else width}{form}").value
    exponent = 0x6400 if form == "_NORMAL" else 0
    rng = np.random.default_rng(0)
    for word in [0, 0xFFFFFFFF, *rng.integers(0, 2**32, 50).tolist()]:
        got = run_assembly(text, word)
        data = [(word >> (8 * i)) & 0xFF for i in range(4)]
        for place, byte in enumerate((data[0], data[2], data[1], data[3])):  # perm4
            for plane in range(5 if width == 15 else 8 // width):
                if width == 15:
                    wanted = byte * 3 ** (plane + 1) >> 8
                else:
                    low = 0 if form == "_CUMULATIVE" else width * plane
                    wanted = byte & ((1 << width * (plane + 1)) - (1 << low))
                half = (got[2 * plane + place // 2] >> (16 * (place % 2))) & 0xFFFF
                assert half == wanted | exponent, (hex(word), place, plane)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_assembly_of_raised_planes(width: int) -> None:
    """Fields of the four bytes of a word, in order, each as the half that is ``raised`` times as much."""
    text = getattr(raised, f"RAISED_{width}").value
    rng = np.random.default_rng(0)
    for word in [0, 0xFFFFFFFF, *rng.integers(0, 2**32, 50).tolist()]:
        got = run_assembly(text, word)
        for plane in range(8 // width):
            halves = np.array([got[2 * plane], got[2 * plane + 1]], np.uint32).view(np.float16)
            fields = [(word >> 8 * i + width * plane) & ((1 << width) - 1) for i in range(4)]
            assert halves.tolist() == [field * raised.raised(width, plane) for field in fields], (hex(word), plane)


@pytest.mark.parametrize("values", [False, True])
def test_assembly_of_metadata_halves(values: bool) -> None:
    """Two words of E4M3 bytes: pairs of scales, those of keys without their flag, and of mids, as halves times 2^-8."""
    text = (metadata.ASM_HALVES_HIGH if values else metadata.ASM_HALVES_LOW).value
    rng = np.random.default_rng(0)
    for pair in (rng.integers(0, 2**32, (50, 2)) & (0xFF7FFFFF if values else 0xFFFFFFFF)).tolist():
        scales, mids = (run_assembly(text, *pair)[i] for i in range(2))
        for lane, word in enumerate(pair):
            scale, mid = (word >> (16 if values else 0)) & 0xFF, (word >> (24 if values else 8)) & 0xFF
            assert (scales >> (16 * lane)) & 0xFFFF == (scale & 0x7F) << 7, hex(word)
            assert (mids >> (16 * lane)) & 0xFFFF == (mid & 0x7F) << 7 | (mid & 0x80) << 8, hex(word)


def many_groups(kv_heads: int, key_bits: float = 2.0, value_bits: float = 2.0) -> PageLayout:
    return PageLayout(head_size=128, kv_heads=kv_heads, key_bits=key_bits, value_bits=value_bits, group_size=64)


@pytest.mark.parametrize(("name", "layout"), [
    ("reorder K2V2 g64", many_groups(8)), ("reorder K2V2 g64, 32 heads", many_groups(32)),
    ("reorder K4V8 g64", many_groups(8, 4.0, 8.0)),
])  # fmt: skip
def test_shared_memory_of_labels_is_foreseen(name: str, layout: PageLayout) -> None:
    [variant] = [v for v in sass.other_variants(80) if v.name == name]
    shared = sass.compile_variant(variant, 80).metadata.shared
    assert shared <= label_bytes(layout) <= shared + SHARED_MARGIN


@pytest.mark.parametrize("name", [
    "K2V2 g128", "K2V2 g128 mean", "K2V2 g64 mean", "K2V2 g32", "K2V1.5 g128", "K2V1.5 g128 mean", "K2V1.5 g64", "K3V3 g128",
    "K4V4 g128",
])  # fmt: skip
@pytest.mark.parametrize("arch", [80, 90])
def test_shared_memory_of_packed_attention_is_foreseen(name: str, arch: int) -> None:
    """So a multiprocessor holds as many programs as ``packed_form`` says."""
    [variant] = [v for v in sass.attend_variants(arch) if v.name == name]
    bits, groups = variant.constants, variant.constants["G"]
    layout = many_groups(8, *(1.5 if bits[side] == 15 else float(bits[side]) for side in ("KEY_BITS", "VALUE_BITS")))
    layout = dataclasses.replace(layout, group_size=128 // groups)
    shared = sass.compile_variant(variant, arch).metadata.shared
    foreseen = packed_bytes(layout, bits["PART"], variant.stages, has_mean=bits["HAS_MEAN"])
    assert shared <= foreseen <= shared + (3 << 10)


@pytest.mark.parametrize(("options", "ampere", "hopper"), [
    ({"group_size": 64}, 6, 8), ({"group_size": 128}, 8, 8), ({"group_size": 128, "key_bits": 4.0, "value_bits": 4.0}, 5, 7),
])  # fmt: skip
def test_a_multiprocessor_holds_the_programs_of_the_form(options: dict[str, Any], ampere: int, hopper: int) -> None:
    layout = dataclasses.replace(many_groups(8), **options)
    programs = [packed_form(layout, has_mean=True, shared_bytes=size << 10).programs for size in (164, 228)]
    assert programs == [ampere, hopper]


ADA, AMPERE, HOPPER = 101_376, 166_912, 232_448  # bytes that a block may have


@pytest.mark.parametrize(("layout", "room", "blocks"), [
    (many_groups(8), ADA, True), (many_groups(32), ADA, True), (many_groups(64), ADA, False),
    (many_groups(64), AMPERE, True), (many_groups(64, 4.0, 8.0), AMPERE, True), (many_groups(128), AMPERE, False),
    (many_groups(128), HOPPER, False), (many_groups(8, 3.0, 2.0), HOPPER, False),
])  # fmt: skip
def test_groups_that_do_not_fit_take_the_other_kernel(layout: PageLayout, room: int, blocks: bool) -> None:
    form = label_form(layout, shared_bytes=228 << 10, block_bytes=room)
    assert (form.blocks, form.crowded) == (blocks, not blocks and layout.key_bits != 3)


@pytest.mark.parametrize(("capability", "driver", "wanted"), [
    ((8, 0), 13000, False), ((8, 9), 13000, False), ((9, 0), 12020, False), ((9, 0), 12030, True), ((10, 3), 13000, True),
    ((12, 0), 13000, False), ((12, 1), 13000, False),
])  # fmt: skip
def test_where_launches_overlap(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], driver: int, wanted: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(overlap, "driver_version", lambda: driver)
    assert overlap.overlaps(torch.device("cuda")) is wanted and not overlap.overlaps(torch.device("cpu"))
