"""The Llama-family transformer: weights, and one layer after another. What a cache is made of never shows here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.engine.config import ModelConfig
from skvq.engine.rope import StepRope
from skvq.engine.steps import LayerCache


class Linear(Protocol):
    """y = W x + b over the last dimension; how W is stored is the implementation's business."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """Weight [out, in] in the compute dtype."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer layer. qkv is the three projections stacked, gate_up the two of the MLP."""

    input_norm: Tensor  # [d]
    qkv: Linear  # d -> (H + 2 KH) D
    output: Linear  # H D -> d
    mlp_norm: Tensor  # [d]
    gate_up: Linear  # d -> 2 f
    down: Linear  # f -> d


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """All weights of a model."""

    embedding: Tensor  # [V, d]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [d]
    head: Linear  # d -> V

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, a tied embedding counted once."""
        total = self.embedding.nbytes + self.norm.nbytes
        if not (isinstance(self.head, DenseLinear) and self.head.weight.data_ptr() == self.embedding.data_ptr()):
            total += self.head.nbytes
        for w in self.layers:
            total += sum(p.nbytes for p in (w.input_norm, w.qkv, w.output, w.mlp_norm, w.gate_up, w.down))
        return total


class Model:
    """Forward pass in pieces, so that the engine chooses the order of layers and chunks."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config, self.weights = config, weights

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states [..., d] of token ids int64 [...]."""
        return self.weights.embedding[ids]

    def layer(self, index: int, x: Tensor, rope: StepRope, cache: LayerCache) -> Tensor:
        """Layer ``index`` over hidden states ``x`` [B, N, d]; the cache takes their keys and values."""
        config, w = self.config, self.weights.layers[index]
        h = rms_norm(x, w.input_norm, config.norm_eps)
        q, k, v = self._heads(w.qkv(h))
        attended = cache.attend(q, k, v, rope)  # [B, N, H, D]
        x = x + w.output(attended.flatten(2))
        h = rms_norm(x, w.mlp_norm, config.norm_eps)
        gate, up = w.gate_up(h).chunk(2, -1)
        return x + w.down(F.silu(gate) * up)

    def head(self, x: Tensor) -> Tensor:
        """Logits float32 [..., V] of hidden states [..., d]."""
        return self.weights.head(rms_norm(x, self.weights.norm, self.config.norm_eps)).float()

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads, size = self.config.num_heads, self.config.num_kv_heads, self.config.head_size
        parts = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, size)  # [B, N, H + 2 KH, D]
        return parts[:, :, :heads], parts[:, :, heads : heads + kv_heads], parts[:, :, heads + kv_heads :]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 (arXiv 1910.07467)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def load_weights(
    config: ModelConfig,
    read: Callable[[str], Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> ModelWeights:
    """Weights of ``config`` from ``read(canonical name)``, each tensor read exactly once."""

    def get(*names: str) -> Tensor:
        parts = [read(name).to(device=device, dtype=dtype) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def linear(prefix: str, *names: str, bias: bool) -> Linear:
        weight = get(*(f"{prefix}.{n}.weight" for n in names))
        return DenseLinear(weight, get(*(f"{prefix}.{n}.bias" for n in names)) if bias else None)

    embedding = get("model.embed_tokens.weight")
    layers = []
    for index in range(config.num_layers):
        at = f"model.layers.{index}"
        layers.append(
            LayerWeights(
                input_norm=get(f"{at}.input_layernorm.weight"),
                qkv=linear(f"{at}.self_attn", "q_proj", "k_proj", "v_proj", bias=config.qkv_bias),
                output=linear(f"{at}.self_attn", "o_proj", bias=config.output_bias),
                mlp_norm=get(f"{at}.post_attention_layernorm.weight"),
                gate_up=linear(f"{at}.mlp", "gate_proj", "up_proj", bias=config.mlp_bias),
                down=linear(f"{at}.mlp", "down_proj", bias=config.mlp_bias),
            )
        )
    norm = get("model.norm.weight")
    head = DenseLinear(embedding if config.tie_embeddings else get("lm_head.weight"), None)
    return ModelWeights(embedding=embedding, layers=tuple(layers), norm=norm, head=head)
