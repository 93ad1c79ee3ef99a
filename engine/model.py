"""The Llama-family transformer: weights, and one layer after another. It knows nothing of how a cache is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skvq.engine.embedding import Embedding, nbytes_of
from skvq.engine.model_config import ModelConfig
from skvq.engine.rope import StepRope, narrowed, widened
from skvq.engine.storage import Storage
from skvq.kernels.experts import Experts
from skvq.kernels.interface import Ops
from skvq.kernels.linear import Linear
from skvq.loaders.names import layer_stacks


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer layer. qkv is the three projections stacked."""

    input_norm: Tensor  # [d]
    qkv: Linear  # d -> (H + 2 KH) D
    qk_norm: tuple[Tensor, Tensor] | None  # of queries and of keys, [D] each
    output: Linear  # H D -> d
    mlp_norm: Tensor  # [d]
    mlp: Mlp


class Mlp(Protocol):
    """What a layer's hidden states go through after attention."""

    def after_attention(self, ops: Ops, x: Tensor, attended: Tensor, w: LayerWeights, eps: float) -> Tensor:
        """What the layer makes of its hidden states ``x`` [B, N, d] and what its heads have read, [B, N, H D]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OneMlp:
    """For all tokens; gate_up is its two first projections stacked."""

    gate_up: Linear  # d -> 2 f
    down: Linear  # f -> d

    def after_attention(self, ops: Ops, x: Tensor, attended: Tensor, w: LayerWeights, eps: float) -> Tensor:
        return ops.after_attention(x, attended, w.output, w.mlp_norm, eps, self.gate_up, self.down)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.gate_up.tensors, *self.down.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMlp:
    """Some of many for each token."""

    experts: Experts

    def after_attention(self, ops: Ops, x: Tensor, attended: Tensor, w: LayerWeights, eps: float) -> Tensor:
        return ops.after_attention_experts(x, attended, w.output, w.mlp_norm, eps, self.experts)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.experts.tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """All weights of a model."""

    embedding: Embedding  # V x d
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [d]
    head: Linear  # d -> V

    @property
    def nbytes(self) -> int:
        """Bytes held for all weights, a tied embedding counted once."""
        held = [*self.embedding.tensors, self.norm, *self.head.tensors]
        for w in self.layers:
            held += [w.input_norm, w.mlp_norm, *(w.qk_norm or ())]
            held += [*w.qkv.tensors, *w.output.tensors, *w.mlp.tensors]
        return nbytes_of(held)


class LayerCache(Protocol):
    """All the model knows of a cache: q [B, N, H, D], k and v [B, N, KH, D], all before RoPE; the output is [B, N, H, D]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor: ...


class Model:
    """Forward pass in pieces, so that the engine chooses the order of layers and chunks."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops) -> None:
        self.config, self.weights, self.ops = config, weights, ops

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.weights.embedding.dtype

    def ids(self, token_ids: Sequence[int]) -> Tensor:
        """int64 [N] where the model is."""
        return torch.as_tensor(list(token_ids), dtype=torch.int64, device=self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states [..., d] of token ids int64 [...]."""
        return self.weights.embedding(ids)

    def layer(self, index: int, x: Tensor, rope: StepRope, cache: LayerCache) -> Tensor:
        """Layer ``index`` over hidden states ``x`` [B, N, d]; the cache takes their keys and values."""
        rope = rope.of(index)
        return self.after_attention(index, x, cache.attend(*self.heads(index, x, rope), rope))

    def heads(self, index: int, x: Tensor, rope: StepRope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, H, D], keys and values [B, N, KH, D] of a layer, before they are turned."""
        w = self.weights.layers[index]
        qkv = self.ops.norm_linear(x, w.input_norm, self.config.norm_eps, w.qkv)
        heads, kv_heads, size = self.config.num_heads, self.config.num_kv_heads, self.config.own_head_size
        parts = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, size)  # [B, N, H + 2 KH, D]
        q, k, v = parts[:, :, :heads], parts[:, :, heads : heads + kv_heads], parts[:, :, heads + kv_heads :]
        if w.qk_norm is not None:
            q, k = self.ops.norm_heads(q, k, *w.qk_norm, self.config.norm_eps)
        if size != self.config.head_size:  # attention divides by the square root of the size that it sees
            longer = math.sqrt(self.config.head_size / size)
            q, k, v = (widened(x, self.config.head_size) for x in (q * longer, k, v))
        return rope.with_gain(q), k, v

    def after_attention(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """What a layer makes of its hidden states ``x`` [B, N, d] and what its heads have read, [B, N, H, D]."""
        w = self.weights.layers[index]
        attended = narrowed(attended, self.config.own_head_size).flatten(2)
        return w.mlp.after_attention(self.ops, x, attended, w, self.config.norm_eps)

    def output_matrix(self, index: int) -> Tensor:
        """What a layer multiplies by what its heads have read, [d, H D]."""
        matrix = self.weights.layers[index].output.dense()
        heads = matrix.view(len(matrix), self.config.num_heads, self.config.own_head_size)
        return widened(heads, self.config.head_size).flatten(1)

    def head(self, x: Tensor) -> Tensor:
        """Logits float32 [..., V] of hidden states [..., d]."""
        return self.ops.norm_linear(x, self.weights.norm, self.config.norm_eps, self.weights.head).float()


def load_weights(config: ModelConfig, storage: Storage) -> ModelWeights:
    """Weights of ``config`` in the form that ``storage`` holds them, each tensor read exactly once."""

    def linear(prefix: str, *names: str, bias: bool) -> Linear:
        biases = storage.vector([f"{prefix}.{n}.bias" for n in names]) if bias else None
        return storage.linear([f"{prefix}.{n}.weight" for n in names], biases)

    def qk_norm(prefix: str) -> tuple[Tensor, Tensor]:
        return storage.vector([f"{prefix}.q_norm.weight"]), storage.vector([f"{prefix}.k_norm.weight"])

    def mlp(prefix: str) -> Mlp:
        if config.experts is None:
            return OneMlp(
                gate_up=linear(prefix, "gate_proj", "up_proj", bias=config.mlp_bias),
                down=linear(prefix, "down_proj", bias=config.mlp_bias),
            )
        gate_up, down = layer_stacks(prefix, config.experts.count)
        experts = Experts(
            router=linear(prefix, "gate", bias=False),
            gate_up=storage.stack(gate_up),
            down=storage.stack(down),
            count=config.experts.count,
            chosen=config.experts.chosen,
            normed=config.experts.normed,
        )
        return ExpertMlp(experts=experts)

    embedding, head = storage.embedding("model.embed_tokens.weight")
    layers = []
    for index in range(config.num_layers):
        at = f"model.layers.{index}"
        layers.append(
            LayerWeights(
                input_norm=storage.vector([f"{at}.input_layernorm.weight"]),
                qkv=linear(f"{at}.self_attn", "q_proj", "k_proj", "v_proj", bias=config.qkv_bias),
                qk_norm=qk_norm(f"{at}.self_attn") if config.qk_norm else None,
                output=linear(f"{at}.self_attn", "o_proj", bias=config.output_bias),
                mlp_norm=storage.vector([f"{at}.post_attention_layernorm.weight"]),
                mlp=mlp(f"{at}.mlp"),
            )
        )
    norm = storage.vector(["model.norm.weight"])
    if not config.tie_embeddings:
        head = storage.linear(["lm_head.weight"], None)
    return ModelWeights(embedding=embedding, layers=tuple(layers), norm=norm, head=head)
