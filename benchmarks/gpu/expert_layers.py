"""A layer's experts on a GPU, of Qwen3-30B-A3B's shape: of the tokens of decode steps and of a chunk of prefill, beside torch's
products with one expert after another. ``run_all.py`` calls it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from matvec_sweep import judged
from torch import Tensor

from skvq.engine.model import ExpertMlp, load_weights
from skvq.engine.model_config import ExpertConfig, ModelConfig
from skvq.engine.report import Quiet
from skvq.engine.storage import Storage, WeightReader
from skvq.engine.weight_forms import form_of
from skvq.kernels.experts import DenseStack, Experts, Stack, StoredStack
from skvq.kernels.linear import DenseLinear
from skvq.kernels.ops import TorchOps
from skvq.kernels.triton_gpu.ops import TritonOps
from skvq.loaders.dummy import DummySource

SHAPE = {"hidden_size": 2048, "intermediate_size": 768, "num_heads": 32}
COUNT, CHOSEN = 128, 8
KINDS = ("", "Q4_K")
"""Of the weights: bfloat16, or blocks."""
TOKENS = (1, 4, 1024)
"""Of a step, of one with three guesses, of a chunk of prefill."""
EPS = 1e-6
Step = Callable[[str, Callable[[], Any]], Any]
Seconds = Callable[[Callable[[], Any]], tuple[float, float]]


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """What follows attention, with what goes into it."""

    x: Tensor
    attended: Tensor
    output: DenseLinear
    norm: Tensor
    experts: Experts

    def by(self, ops: TorchOps) -> Tensor:
        return ops.after_attention_experts(self.x, self.attended, self.output, self.norm, EPS, self.experts)

    def as_numbers(self, dtype: torch.dtype) -> Layer:
        """The same with weights of a dtype, not in blocks."""
        of, change = self.experts, dataclasses.replace
        experts = change(of, gate_up=dense(of.gate_up, dtype), down=dense(of.down, dtype), router=wide(of.router, dtype))
        return Layer(self.x.to(dtype), self.attended.to(dtype), wide(self.output, dtype), self.norm.to(dtype), experts)


def wide(linear: Any, dtype: torch.dtype) -> DenseLinear:
    return DenseLinear(linear.weight.to(dtype), None)


def dense(stack: Stack, dtype: torch.dtype) -> DenseStack:
    if isinstance(stack, DenseStack):
        return DenseStack(stack.weight.to(dtype))
    assert isinstance(stack, StoredStack)
    rows, columns = stack.matrix.shape
    every = stack.matrix.rows(torch.arange(rows, device=stack.matrix.data.device))
    return DenseStack(every.to(dtype).view(-1, stack.outs, columns))


def make_layer(kind: str, tokens: int, device: str = "cuda") -> Layer:
    """Of dummy weights."""
    config = ModelConfig(
        family="qwen3_moe", vocab_size=32, num_layers=1, num_kv_heads=1, head_size=128, qk_norm=True,
        experts=ExpertConfig(count=COUNT, chosen=CHOSEN), **SHAPE,
    )  # fmt: skip
    source, form = DummySource(config, kind=kind), form_of("triton", torch.device(device), torch.bfloat16)
    layer = load_weights(config, Storage(form, WeightReader(source, lambda done: None), Quiet())).layers[0]
    assert isinstance(layer.mlp, ExpertMlp)
    width, heads = config.hidden_size, config.num_heads * config.head_size
    x, attended, weight = (
        torch.randn(*shape, device=device).bfloat16() for shape in ((1, tokens, width), (1, tokens, heads), (width, heads))
    )
    return Layer(x, attended, DenseLinear(weight / heads**0.5, None), layer.mlp_norm, layer.mlp.experts)


def check(layer: Layer) -> dict[str, Any]:
    """Error against float32 beside torch's: see ``judged``. Tokens for which a near tie of the router falls otherwise, whose
    numbers are then far from either, are left out: at most one of 50."""
    ours, by_torch = layer.by(TritonOps()), layer.as_numbers(torch.bfloat16).by(TorchOps())
    exact = layer.as_numbers(torch.float32).by(TorchOps())
    off = (ours.float() - exact).norm(dim=-1) + (by_torch.float() - exact).norm(dim=-1)  # [1, N]
    alike = off < 0.05 * exact.norm(dim=-1)
    if float(alike.float().mean()) < 0.98:
        return {"good": False, "alike": float(alike.float().mean())}
    return judged(exact[alike], ours[alike], by_torch[alike])


def time_layer(layer: Layer, seconds_of: Seconds) -> dict[str, float]:
    """Milliseconds of a layer, and by torch with one expert after another; GB/s of the bytes that one token's experts have."""
    ops, torch_ops = TritonOps(), TorchOps()
    taken, spread = seconds_of(lambda: layer.by(ops))
    held = sum(t.nbytes for stack in (layer.experts.gate_up, layer.experts.down) for t in stack.tensors)
    found = {"ms": taken * 1e3, "spread": spread}
    if layer.x.shape[1] == 1:
        return found | {"gbps": held * layer.experts.chosen / layer.experts.count / taken / 1e9}
    many, _ = seconds_of(lambda: torch_ops.mix_many(layer.x[0], *routed(layer), layer.experts))
    return found | {"one_by_one_ms": many * 1e3}


def routed(layer: Layer) -> tuple[Tensor, Tensor]:
    """Experts of every token, dealt evenly, and equal weights."""
    tokens, of = layer.x.shape[1], layer.experts
    ids = (torch.arange(tokens * of.chosen, device=layer.x.device) % of.count).view(tokens, of.chosen)
    return ids, torch.full(ids.shape, 1 / of.chosen, device=ids.device)


def measure(step: Step, seconds_of: Seconds) -> None:
    """``step(name, work)`` does ``work`` and keeps its result; what is wrong is not timed."""
    for kind, tokens in itertools.product(KINDS, TOKENS):
        label = f"experts {kind or 'bfloat16'} x{tokens}"
        gate = step(f"gate {label}", lambda kind=kind, tokens=tokens: check(make_layer(kind, tokens)))
        if gate.get("good"):
            step(label, lambda kind=kind, tokens=tokens: time_layer(make_layer(kind, tokens), seconds_of))
