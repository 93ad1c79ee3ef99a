"""The matrices of a decode step on a GPU: ``kernels.triton_gpu.matvec`` beside cuBLAS, and its tilings one by one.

Steps for ``run_all.py``: it measures the tilings that the product takes, and with ``--matvec`` tries others and prints the best
of each shape; and matrices of quantized blocks (``kernels.triton_gpu.blocks``). Every one passes the gate of correctness or is
not timed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.engine.model_config import ModelConfig
from skvq.kernels.linear import DenseLinear
from skvq.kernels.ops import TorchOps
from skvq.kernels.triton_gpu import blocks, matvec
from skvq.kernels.triton_gpu.ops import TritonOps
from skvq.kernels.triton_gpu.overlap import overlaps
from skvq.loaders.dummy import DummySource

Seconds = Callable[[Callable[[], Any]], tuple[float, float]]
Step = Callable[..., Any]

EPS = 1e-5
OUTGROWN = 256e6  # bytes of weights that calls go round: four L2 caches
MISTRAL = {
    "qkv 6144x4096": ("norm_linear", 6144, 4096),
    "output 4096x4096": ("linear_add", 4096, 4096),
    "gate-up 28672x4096": ("norm_swiglu", 28672, 4096),
    "down 4096x14336": ("linear_add", 4096, 14336),
    "head 32000x4096": ("norm_linear", 32000, 4096),
}
LLAMA_2 = {
    "qkv 12288x4096": ("norm_linear", 12288, 4096),
    "gate-up 22016x4096": ("norm_swiglu", 22016, 4096),
    "down 4096x11008": ("linear_add", 4096, 11008),
}
SHAPES = MISTRAL | LLAMA_2
ROWS, WARPS, DEPTHS = (1, 2, 4, 8), (4, 8), (1, 2, 4)
BLOCK_KINDS, BLOCK_SHAPES = ("Q4_K", "Q6_K", "Q8_0"), ("gate-up 28672x4096", "down 4096x14336", "output 4096x4096")
MANY = 1024  # vectors, a chunk of prefill: the matrix is expanded
SMALL = {"family": "llama", "intermediate_size": 1, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_size": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """One of the products of a layer: what it is given, as often as its weights outgrow the L2 cache."""

    kind: str
    x: Tensor
    norm: Tensor
    residual: Tensor
    weights: tuple[Tensor, ...]

    @property
    def outs(self) -> int:
        return len(self.weights[0]) // (2 if self.kind == "norm_swiglu" else 1)

    @property
    def tiling(self) -> matvec.Tiling:
        """What the product takes."""
        return matvec.tiling_of(len(self.x), self.outs, self.x.shape[1], gated=self.kind == "norm_swiglu")

    def fused(self, weight: Tensor, tiling: matvec.Tiling) -> Tensor:
        if self.kind == "linear_add":
            return matvec.linear_add(self.residual, self.x, weight, None, tiling)
        call = matvec.norm_swiglu if self.kind == "norm_swiglu" else matvec.norm_linear
        return call(self.x, self.norm, EPS, weight, None, tiling)

    def apart(self, ops: TorchOps, weight: Tensor) -> Tensor:
        """The same by one operation after another, and by torch's product."""
        linear = DenseLinear(weight, None)
        if self.kind == "linear_add":
            return ops.add(self.residual, linear(self.x))
        y = linear(ops.rms_norm(self.x, self.norm, EPS))
        return ops.swiglu(y) if self.kind == "norm_swiglu" else y

    def exact(self) -> Tensor:
        """In float32 throughout."""
        floats = (t.float() for t in (self.x, self.norm, self.residual))
        wide = Product(self.kind, *floats, (self.weights[0].float(),))
        return wide.apart(TorchOps(), wide.weights[0])


def make_product(
    name: str, vectors: int = 1, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", copies: int = 0
) -> Product:
    """``copies`` of its matrix, if not as many as outgrow the L2 cache."""
    kind, rows, width = SHAPES[name]
    outs = rows // (2 if kind == "norm_swiglu" else 1)
    x, norm, residual = (
        torch.randn(*shape, device=device).to(dtype) for shape in ((vectors, width), (width,), (vectors, outs))
    )
    count = copies or math.ceil(OUTGROWN / (2 * rows * width)) + 1
    weights = tuple((torch.randn(rows, width, device=device) / width**0.5).to(dtype) for _ in range(count))
    return Product(kind, x, norm, residual, weights)


def check(product: Product, tiling: matvec.Tiling) -> dict[str, Any]:
    """Error against float32 and that of the operations one by one: see ``judged``."""
    return judged(product.exact(), product.fused(product.weights[0], tiling), product.apart(TorchOps(), product.weights[0]))


def judged(exact: Tensor, ours: Tensor, by_torch: Tensor) -> dict[str, Any]:
    """The worst error may be twice torch's, or twice what rounding the largest number costs (of few, all may be near)."""
    off, torch_off = (float((got.float() - exact).abs().max()) for got in (ours, by_torch))
    rounding = torch.finfo(ours.dtype).eps / 2 * float(exact.abs().max())
    return {"off": off, "torch_off": torch_off, "good": off <= 2 * max(torch_off, rounding)}


def time_product(product: Product, tiling: matvec.Tiling, seconds_of: Seconds) -> dict[str, float]:
    """Milliseconds and GB/s of one launch."""
    taken, spread = seconds_of(lambda: [product.fused(weight, tiling) for weight in product.weights])
    return numbers(product.weights, taken, spread)


def numbers(held: Sequence[Tensor], taken: float, spread: float) -> dict[str, float]:
    """Of one launch, of as many as there are copies of a matrix."""
    taken /= len(held)
    return {"ms": taken * 1e3, "gbps": held[0].nbytes / taken / 1e9, "spread": spread}


def beside_torch(product: Product, seconds_of: Seconds) -> dict[str, Any]:
    """Ours; torch's product alone; and torch's product with the launches around it that ours has in it."""
    ops = TritonOps()
    bare, bare_spread = seconds_of(lambda: [F.linear(product.x, weight) for weight in product.weights])
    apart, apart_spread = seconds_of(lambda: [product.apart(ops, weight) for weight in product.weights])
    found: dict[str, Any] = time_product(product, product.tiling, seconds_of)
    return found | {
        "linear": numbers(product.weights, bare, bare_spread),
        "apart": numbers(product.weights, apart, apart_spread),
    }


def measure(step: Step, seconds_of: Seconds, vectors: tuple[int, ...] = (1, 4)) -> None:
    """Every shape with the tiling of the product: ``step(name, work)`` does ``work`` and keeps its result."""
    for name in SHAPES:
        for count in vectors:
            label = f"matvec {name}" + (f" x{count}" if count > 1 else "")
            gate = step(f"gate {label}", lambda name=name, count=count: gate_of(name, count))
            if gate.get("good"):
                step(label, lambda name=name, count=count: beside_torch(make_product(name, count), seconds_of))


@dataclasses.dataclass(frozen=True, slots=True)
class BlockProduct:
    """``Product`` of a matrix of quantized blocks, of dummy weights."""

    kind: str
    x: Tensor
    norm: Tensor
    residual: Tensor
    matrices: tuple[blocks.BlockMatrix, ...]

    def fused(self, matrix: blocks.BlockMatrix) -> Tensor:
        if self.kind == "linear_add":
            return blocks.multiply(self.x, matrix, None, residual=self.residual)
        return blocks.multiply(self.x, matrix, None, norm=self.norm, eps=EPS, gated=self.kind == "norm_swiglu")

    def expanded(self, dtype: torch.dtype) -> Product:
        """With the same matrix as numbers."""
        matrix = self.matrices[0]
        weight = matrix.rows(torch.arange(matrix.shape[0], device=self.x.device), dtype)
        return Product(self.kind, self.x, self.norm, self.residual, (weight,))


def make_blocks(name: str, kind: str, vectors: int, device: str = "cuda") -> BlockProduct:
    _, rows, width = SHAPES[name]
    source = DummySource(ModelConfig(**{**SMALL, "hidden_size": width, "vocab_size": rows}), kind=kind)
    found = source.blocks("model.embed_tokens.weight")
    assert found is not None
    first = blocks.BlockMatrix(found.data, kind, torch.device(device))
    count = math.ceil(OUTGROWN / first.data.nbytes)
    matrices = (first, *(blocks.BlockMatrix(found.data, kind, torch.device(device)) for _ in range(count)))
    product = make_product(name, vectors, device=device, copies=1)
    return BlockProduct(product.kind, product.x, product.norm, product.residual, matrices)


def check_blocks(product: BlockProduct) -> dict[str, Any]:
    """As ``check``; torch's weights are rounded to 16 bits."""
    dense = product.expanded(product.x.dtype)
    by_torch = dense.apart(TorchOps(), dense.weights[0])
    return judged(product.expanded(torch.float32).exact(), product.fused(product.matrices[0]), by_torch)


def time_blocks(product: BlockProduct, seconds_of: Seconds) -> dict[str, float]:
    """Milliseconds and GB/s of one launch."""
    taken, spread = seconds_of(lambda: [product.fused(matrix) for matrix in product.matrices])
    return numbers([matrix.data for matrix in product.matrices], taken, spread)


def time_many(product: BlockProduct, seconds_of: Seconds) -> dict[str, float]:
    """Milliseconds of a product with a chunk of prefill, and of torch's with the matrix in 16 bits."""
    matrix, weight = product.matrices[0], product.expanded(product.x.dtype).weights[0]
    out = torch.empty(len(product.x), matrix.shape[0], dtype=product.x.dtype, device=product.x.device)
    ours, _ = seconds_of(lambda: matrix.multiply(product.x, None, out))
    linear, _ = seconds_of(lambda: F.linear(product.x, weight))
    return {"ms": ours * 1e3, "linear_ms": linear * 1e3}


def measure_blocks(
    step: Step, seconds_of: Seconds, names: tuple[str, ...] = BLOCK_SHAPES, kinds: tuple[str, ...] = BLOCK_KINDS
) -> None:
    """Matrices of quantized blocks by one vector and by four, and by as many as a chunk of prefill has."""
    for name, kind in itertools.product(names, kinds):
        for count in (1, 4):
            label = f"blocks {kind} {name}" + (f" x{count}" if count > 1 else "")
            made = functools.partial(make_blocks, name, kind, count)
            if step(f"gate {label}", lambda made=made: check_blocks(made())).get("good"):
                step(label, lambda made=made: time_blocks(made(), seconds_of))
        many = functools.partial(make_blocks, name, kind, MANY)
        step(f"blocks {kind} {name} x{MANY}", lambda many=many: time_many(many(), seconds_of))


def gate_of(name: str, vectors: int) -> dict[str, Any]:
    """The worse of bfloat16 and float16."""
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        product = make_product(name, vectors, dtype)
        found.append(check(product, product.tiling))
    return min(found, key=lambda v: bool(v["good"]))


def tilings(product: Product) -> Iterator[matvec.Tiling]:
    """What a thread can hold: the weights on their way and a sum for each of 8 columns of each row of each vector."""
    double = 2 if product.kind == "norm_swiglu" else 1
    for rows, warps, depth in itertools.product(ROWS, WARPS, DEPTHS):
        held = double * rows
        if held * (4 * depth + 8 * len(product.x)) <= 160 and held * depth >= 2:
            yield matvec.Tiling(rows=rows, warps=warps, depth=depth)


def sweep(step: Step, seconds_of: Seconds, names: tuple[str, ...] = tuple(MISTRAL), vectors: int = 1) -> None:
    """Every tiling of every shape; the best three again with launches that overlap; and what was best."""
    early = overlaps(torch.device("cuda"))
    for name in names:
        product = make_product(name, vectors)
        step(
            f"sweep matvec {name} x{vectors} linear",
            lambda product=product: numbers(
                product.weights, *seconds_of(lambda: [F.linear(product.x, w) for w in product.weights])
            ),
        )

        def tried(tiling: matvec.Tiling, name: str = name, product: Product = product) -> tuple[float, str, matvec.Tiling]:
            def work() -> dict[str, Any]:
                gate = check(product, tiling)
                return time_product(product, tiling, seconds_of) | gate if gate["good"] else gate

            label = f"rows {tiling.rows} warps {tiling.warps} depth {tiling.depth}{' early' if tiling.early else ''}"
            return step(f"sweep matvec {name} x{vectors} {label}", work).get("gbps", 0.0), label, tiling

        found = [tried(tiling) for tiling in tilings(product)]
        found.sort(key=lambda item: -item[0])
        found += [tried(dataclasses.replace(tiling, early=True)) for _, _, tiling in found[:3] if early]
        for gbps, label, _ in sorted(found, key=lambda item: -item[0])[:5]:
            print(f"  {gbps:5.0f} GB/s  {label}", flush=True)
        torch.cuda.empty_cache()
