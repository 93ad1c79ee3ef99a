"""The kernels as compiled for sm_80 and sm_90, run by a machine for PTX (``ptx.py``) and compared with the specification.

The interpreter knows no assembly, no register layout and no tensor core; here they are what the compiler made of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if not hasattr(triton, "JITFunction"):
    pytest.skip("Triton without a compiler", allow_module_level=True)

from card import card, plain  # noqa: E402
from cases import check_unpacked, compare, formats, make_case, torch_error  # noqa: E402
from emulated import emulated  # noqa: E402
from ggml_fixtures import blocks_of  # noqa: E402

from skvq.kernels import reference  # noqa: E402
from skvq.kernels.experts import DenseStack, Experts, Stack, StoredStack  # noqa: E402
from skvq.kernels.interface import FullSlots  # noqa: E402
from skvq.kernels.linear import DenseLinear  # noqa: E402
from skvq.kernels.ops import TorchOps  # noqa: E402
from skvq.kernels.triton_gpu import TritonGpu, blocks, grouped, matvec  # noqa: E402
from skvq.kernels.triton_gpu.card import Card, Tuning  # noqa: E402
from skvq.kernels.triton_gpu.forms import PackedForm  # noqa: E402
from skvq.kernels.triton_gpu.ops import TritonOps  # noqa: E402
from skvq.kernels.triton_gpu.packed import attend_packed_kernel  # noqa: E402

if not isinstance(attend_packed_kernel, triton.JITFunction):
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.bfloat16


@pytest.fixture(params=[80, 90])
def arch(request: pytest.FixtureRequest) -> Iterator[int]:
    with card(divmod(request.param, 10)), emulated(request.param):
        yield request.param


def tuned(form: PackedForm) -> Tuning:
    """Packed attention in that form, whatever the layout."""
    return Tuning(form_of=lambda layout, **rest: form)


def check_attend(method: str, part: int = 0, **options: Any) -> None:
    host, case = (make_case(**({"packed": (3,), "device": device} | options)) for device in ("cpu", "cuda"))
    device = torch.device("cuda")
    tuning = tuned(PackedForm(part=part, stages=2, registers=0, programs=12)) if part else Tuning()
    made = TritonGpu(device, card=dataclasses.replace(Card.of(device), processors=1), tuning=tuning)
    out, lse, exact, exact_lse = compare(made, case, method, host)
    error, allowed = float((plain(out).float() - exact).abs().max()), 2 * torch_error(exact, host, method)
    assert error <= allowed, (method, options, error, allowed)
    seen = exact_lse > -torch.inf
    assert float((plain(lse) - exact_lse)[seen].abs().max()) < 1e-3 * max(1.0, float(exact_lse[seen].abs().max()))


QUICK: list[tuple[str, dict[str, Any]]] = [
    ("heads", {"has_key_mean": True, "dtype": BF16}),
    ("heads", {"part": 64, "has_key_mean": True, "packed": (2,)}),
    ("heads", {"packed": (2,)}),
    ("heads", {"size": 64, "key_bits": 3.0, "value_bits": 3.0}),
    ("labels", {"group_size": 64}),
    ("labels", {"group_size": 64, "key_bits": 8.0, "packed": (1,)}),
    ("plain", {"dtype": BF16}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("heads", {"value_bits": 1.5, "group_size": 64}),
    ("heads", {"value_bits": 1.5, "has_key_mean": True}),
    ("heads", {"group_size": 64, "has_key_mean": True}),
    ("heads", {"span": 300, "packed": (5,)}),
    ("heads", {"repeat": 8, "queries": 2, "group_size": 32}),
    ("heads", {"repeat": 1, "packed": (0, 2, 11)}),
    ("labels", {"group_size": 64, "key_bits": 4.0, "value_bits": 8.0, "dtype": BF16}),
    ("labels", {"group_size": 64, "key_bits": 8.0, "value_bits": 1.5}),
    ("labels", {"group_size": 32, "size": 64, "span": 100}),
    ("labels", {"group_size": 64, "kv_heads": 9, "repeat": 1, "packed": (1,)}),
    ("labels", {"group_size": 64, "repeat": 4, "queries": 2, "packed": (1,)}),
]


@pytest.mark.parametrize(("method", "options"), QUICK)
def test_attention(arch: int, method: str, options: dict[str, Any]) -> None:
    check_attend(method, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), OTHERS)
def test_attention_in_other_forms(arch: int, method: str, options: dict[str, Any]) -> None:
    check_attend(method, **options)


@pytest.mark.slow
@pytest.mark.timeout(2400)  # ten minutes alone, twenty beside others
def test_attention_in_every_format(arch: int) -> None:
    for key_bits, value_bits, group_size, size in formats():
        check_attend("heads", key_bits=key_bits, value_bits=value_bits, group_size=group_size, size=size, packed=(2,))


@pytest.mark.parametrize(
    ("method", "key_bits", "value_bits", "lattice"),
    [
        ("heads", 2.0, 1.5, False),
        pytest.param("heads", 3.0, 4.0, False, marks=pytest.mark.slow),
        ("labels", 2.0, 8.0, False),
        pytest.param("heads", 2.0, 2.0, True, marks=pytest.mark.slow),
    ],
)
def test_packing_and_unpacking(arch: int, method: str, key_bits: float, value_bits: float, lattice: bool) -> None:
    case = make_case(
        key_bits=key_bits, value_bits=value_bits, group_size=32, size=64, packed=(11,), has_metric=lattice, has_key_mean=True,
        device="cuda",
    )  # fmt: skip
    codec, tile, row = case.heads if method == "heads" else case.labels, case.layout.tile, case.step.page_table[1]
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(tile, 2, 64, generator=generator).half().to("cuda") for _ in range(2))
    retained = (torch.rand(tile, generator=generator) < 0.1).to("cuda")
    names = ("key_codes", "value_codes", "meta")
    made, found = TritonGpu(torch.device("cuda")), []
    for backend in (reference.Reference(), made):
        pages = dataclasses.replace(case.pages, **{name: torch.zeros_like(getattr(case.pages, name)) for name in names})
        getattr(backend, method).pack(pages, codec, row, 7 * tile, keys, values, retained)
        found.append(pages)
    for name in names:
        wanted, got = (plain(getattr(pages, name)) for pages in found)
        assert float((wanted == got)[(wanted != 0) | (got != 0)].float().mean()) >= 0.999, name
    check_unpacked(made, method, found[0], codec, (row, 7 * tile, tile), (BF16,))


@pytest.mark.parametrize(("dtype", "vectors", "early"), [(torch.float16, 1, False), (BF16, 3, False), (BF16, 1, True)])
def test_matrices(arch: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vectors: int, early: bool) -> None:
    """Whole tiles and a part of one, programs that end over an edge, biases."""
    tiling = matvec.Tiling(rows=8, warps=2, depth=2, early=early and arch >= 90)
    monkeypatch.setattr(matvec, "tiling_of", lambda vectors, outs, width, gated: tiling)
    monkeypatch.setattr(matvec, "FASTER_VECTORS", matvec.MOST_VECTORS)
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int, by: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=gen) * by).to(dtype).to("cuda")

    x, attended, norm = normal(vectors, 1, 1160), normal(vectors, 1, 520), normal(1160)
    output, down = DenseLinear(normal(1160, 520, by=0.05), normal(1160)), DenseLinear(normal(1160, 37, by=0.2), None)
    qkv, gate_up = (DenseLinear(normal(count, 1160, by=0.03), normal(count)) for count in (61, 74))
    for wanted, got in zip(
        *(
            (ops.norm_linear(x, norm, 1e-5, qkv), ops.after_attention(x, attended, output, norm, 1e-5, gate_up, down))
            for ops in (TorchOps(), TritonOps())
        ),
        strict=True,
    ):
        wanted, got = plain(wanted).float(), plain(got).float()
        assert float((got - wanted).abs().max()) <= 2 * torch.finfo(dtype).eps * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("kind", "columns", "vectors", "dtype", "early"),
    [
        ("Q4_1", 1056, 1, torch.float16, False),  # more blocks than one warp has at once, and some over
        ("Q4_K", 512, 3, BF16, True),
        ("Q5_0", 512, 1, BF16, True),
        ("Q6_K", 1280, 1, torch.float16, True),
        ("Q8_0", 96, 2, torch.float16, False),
    ],
)
def test_quantized_blocks(
    arch: int, monkeypatch: pytest.MonkeyPatch, kind: str, columns: int, vectors: int, dtype: torch.dtype, early: bool
) -> None:
    """Rows and products of what the words say: plain, of a norm and gated, added to something, with a bias."""
    monkeypatch.setattr(blocks, "rows_of", lambda *sizes, **how: 4 if vectors == 1 else 2)
    monkeypatch.setattr(blocks, "WARPS", 1)
    monkeypatch.setattr(blocks, "overlaps", lambda device: early and arch >= 90)
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen).to(dtype).to("cuda")

    matrix = blocks.BlockMatrix(blocks_of(kind, 22, columns)[0], kind, torch.device("cuda"))
    weight, x, norm, bias, residual = (
        matrix.words.dense(),
        normal(vectors, columns),
        normal(columns),
        normal(22),
        normal(vectors, 22),
    )
    narrow = blocks.BlockMatrix(blocks_of("Q4_0", 3, 32)[0], "Q4_0", torch.device("cuda"))  # one block
    assert torch.equal(plain(narrow.rows(torch.tensor([2, 0]).to("cuda"))), plain(narrow.words.dense())[[2, 0]])
    ids = torch.tensor([21, 0, 5]).to("cuda")
    assert torch.equal(plain(matrix.rows(ids)), plain(weight)[plain(ids)])
    dense = DenseLinear(weight.to(dtype), None)  # it rounds the weights, ours does not

    def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
        got, wanted = plain(got).float(), plain(wanted).float()
        assert float((got - wanted).abs().max()) <= 2 * torch.finfo(dtype).eps * float(wanted.abs().max())

    exact = plain(x).float() @ plain(weight).T
    check(blocks.multiply(x, matrix, bias), exact + plain(bias))
    check(blocks.multiply(x, matrix, None, residual=residual), exact + plain(residual))
    gate, up = TorchOps().norm_linear(x, norm, 1e-5, dense).float().chunk(2, -1)
    gated = torch.nn.functional.silu(gate) * up
    check(blocks.multiply(x, matrix, None, norm=norm, eps=1e-5, gated=True), gated)


@pytest.mark.parametrize(("kind", "tokens"), [("dense", 1), ("Q4_0", 2), ("dense", 25), ("Q4_0", 17)])
def test_experts(arch: int, monkeypatch: pytest.MonkeyPatch, kind: str, tokens: int) -> None:
    """A step of two tokens, and a text, whose experts lie in 16 bits or in blocks."""
    monkeypatch.setattr(grouped, "EXPANDED_BYTES", 2 * 2 * 64 * 96)  # two or more at a time
    monkeypatch.setattr(matvec, "tiling_of", lambda vectors, outs, width, gated: matvec.Tiling(rows=8, warps=2, depth=2))
    monkeypatch.setattr(blocks, "rows_of", lambda *sizes, **how: 4)
    monkeypatch.setattr(blocks, "WARPS", 1)
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int, by: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=gen) * by).to(BF16).to("cuda")

    def stack(outs: int, ins: int) -> tuple[Stack, DenseStack]:
        if kind == "dense":
            found = DenseStack(normal(5, outs, ins, by=ins**-0.5))
            return found, found
        matrix = blocks.BlockMatrix(blocks_of(kind, 5 * outs, ins)[0], kind, torch.device("cuda"))
        return StoredStack(matrix, outs), DenseStack(matrix.words.dense().view(5, outs, ins).to(BF16))

    x, attended, norm = normal(1, tokens, 96), normal(1, tokens, 40), normal(96)
    output, router = DenseLinear(normal(96, 40, by=0.1), None), DenseLinear(normal(5, 96, by=0.1), None)
    gate_up, down = stack(64, 96), stack(96, 32)
    ours, theirs = (
        Experts(router=router, gate_up=a, down=b, count=5, chosen=3, normed=True) for a, b in zip(gate_up, down, strict=True)
    )
    got = plain(TritonOps().after_attention_experts(x, attended, output, norm, 1e-5, ours)).float()
    wanted = plain(TorchOps().after_attention_experts(x, attended, output, norm, 1e-5, theirs)).float()
    assert float((got - wanted).abs().max()) <= 3 * torch.finfo(BF16).eps * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_fused_operations(arch: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen).to(dtype).to("cuda")

    weight, x, delta, gate_up, joint = normal(96), normal(3, 1, 96), normal(3, 1, 96), normal(3, 1, 2200), normal(2, 1, 12, 64)
    q, k, v = joint.split([8, 2, 2], 2)
    angle = (torch.rand(2, 1, 1, 32, generator=gen) * 6).to("cuda")
    places = torch.tensor([2, 1], device="cuda"), torch.tensor([3, 0], device="cuda")
    results = []
    for ops in (TorchOps(), TritonOps()):
        rows = [torch.full((3, 2, 9, 64), 7.0, dtype=dtype, device="cuda") for _ in range(2)]
        full = FullSlots(keys=rows[0], values=rows[1], positions=torch.full((3, 9), -1, dtype=torch.int32, device="cuda"))
        turned = ops.rope_to_slots(q, k, v, angle.cos(), angle.sin(), full, *places)
        normed = ops.rms_norm(x, weight, 1e-5), *ops.add_rms_norm(x, delta, weight, 1e-5)
        heads = ops.norm_heads(q, k, weight[:64], weight[32:], 1e-6)
        alone = ops.turn(q, angle.cos(), angle.sin())
        parts = ops.merge([turned.clone(), alone.clone()], [angle[..., 0, :8].clone(), 2 * angle[..., 0, :8]])
        results.append([turned, alone, *parts, full.keys, full.values, *normed, *heads, ops.swiglu(gate_up)])
    for wanted, got in zip(*results, strict=True):
        assert float((got.float() - wanted.float()).abs().max()) <= 2 * torch.finfo(dtype).eps * float(
            wanted.float().abs().max()
        )


def test_keys_further_apart_than_32_bits_count(arch: int) -> None:
    """A prompt's buffer of many heads: 2^31 numbers lie between the first and the last. Most of them are never touched."""
    gen = torch.Generator().manual_seed(0)
    apart, size = 2**30, 64
    memory = torch.empty(2 * apart + 8 * size, dtype=BF16, device="cuda")
    keys, values = (memory.as_strided((3, 4, size), (apart, 2 * size, 1), offset) for offset in (0, size))
    joint = torch.randn(1, 2, 9, size, generator=gen).to(BF16).to("cuda")
    q, k, v = joint.split([3, 3, 3], 2)
    angle = (torch.rand(1, 2, 1, size // 2, generator=gen) * 6).to("cuda")
    TritonOps().rope_to_buffer(q, k, v, angle.cos(), angle.sin(), keys, values, 1)
    wanted = [torch.zeros(3, 4, size, dtype=BF16, device="cuda") for _ in range(2)]
    TorchOps().rope_to_buffer(q, k, v, angle.cos(), angle.sin(), *wanted, 1)
    for got, expected in zip((keys, values), wanted, strict=True):
        off = (plain(got)[:, 1:3].float() - plain(expected)[:, 1:3].float()).abs().max()
        assert float(off) <= 2 * torch.finfo(BF16).eps * float(plain(expected).float().abs().max())
