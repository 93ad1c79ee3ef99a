"""Canonical weight names (Hugging Face's), the shapes a config implies, and the check of a file against them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq", ".self_attn.masked_bias")
"""Buffers that older checkpoints saved along with the weights; the engine computes them itself."""
KV_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".prob_scale", ".k_zero_point", ".v_zero_point")
"""Scales for a cache of another kind than this engine's."""

STACKED_EXPERTS = re.compile(r"\.mlp\.(switch_mlp\.|experts\.(gate_up|down)_proj)")
"""How MLX and `transformers` 5 name the matrices of all experts of a layer."""

OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "vision_model.", "visual.")

ROUTER = ".mlp.gate.weight"
"""End of the name of the matrix that chooses experts: small, and never stored in blocks."""

MAX_LAYERS = 1024
"""More layers than any model has: a corrupt count must not build a table of millions of names."""


WRAPPERS = ("language_model.model.", "model.language_model.", "language_model.", "")
"""What stands before the names of a decoder's weights in checkpoints of text and images, or where it was saved alone."""


def canonical_names(found: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint -> canonical name, of a language model's weights; those of other parts are left out.

    >>> canonical_names(["language_model.model.norm.weight", "language_model.lm_head.weight", "vision_tower.norm.weight"])
    {'language_model.model.norm.weight': 'model.norm.weight', 'language_model.lm_head.weight': 'lm_head.weight'}
    """
    names = list(found)
    own = {name: _of_mixtral(name) if "block_sparse_moe." in name else name for name in names}
    before = next((prefix for prefix in ("model.", *WRAPPERS) if f"{prefix}norm.weight" in names), "model.")
    if before == "model.":
        return own
    canonical = {}
    for theirs, name in own.items():
        inner = name.removeprefix("language_model.")
        if inner.startswith("lm_head."):
            canonical[theirs] = inner
        elif name.startswith(before) and not name.startswith(OTHER_PARTS):
            canonical[theirs] = f"model.{name.removeprefix(before)}"
    return canonical


MIXTRAL_PARTS = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def _of_mixtral(name: str) -> str:
    """Canonical name of a weight of Mixtral.

    >>> _of_mixtral("model.layers.0.block_sparse_moe.experts.7.w2.weight")
    'model.layers.0.mlp.experts.7.down_proj.weight'
    """
    return ".".join(MIXTRAL_PARTS.get(part, part) for part in name.split("."))


STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that a checkpoint may hold as one, rows of the first above those of the next (Phi-3, GLM), and biases likewise."""


def stacks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], dict[str, int]]]:
    """Name of a stack -> its shape and the first row of each weight in it, for all that these weights may be stored in.

    >>> stacks({"a.mlp.gate_proj.weight": (6, 4), "a.mlp.up_proj.weight": (6, 4), "a.mlp.down_proj.weight": (4, 6)})
    {'a.mlp.gate_up_proj.weight': ((12, 4), {'a.mlp.gate_proj.weight': 0, 'a.mlp.up_proj.weight': 6})}
    """
    whole_of = {parts[0]: whole for whole, parts in STACKED.items()}
    found = {}
    for name in shapes:
        before, _, last = name.rpartition(".")
        start, _, part = before.rpartition(".")
        if part in whole_of:
            names = [f"{start}.{one}.{last}" for one in STACKED[whole_of[part]]]
            *firsts, rows = accumulate((shapes[one][0] for one in names), initial=0)
            found[f"{start}.{whole_of[part]}.{last}"] = (rows, *shapes[name][1:]), dict(zip(names, firsts, strict=True))
    return found


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's weights by their name inside the layer, e.g. ``self_attn.q_proj.weight`` -> (H*D, d)."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.own_head_size, config.num_kv_heads * config.own_head_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "post_attention_layernorm.weight": (d,),
    }
    mlps = ["mlp"]
    if config.experts:
        shapes["mlp.gate.weight"] = (config.experts.count, d)
        mlps = [f"mlp.experts.{expert}" for expert in range(config.experts.count)]
    for mlp in mlps:
        shapes |= {f"{mlp}.gate_proj.weight": (f, d), f"{mlp}.up_proj.weight": (f, d), f"{mlp}.down_proj.weight": (d, f)}
    if config.qkv_bias:
        shapes |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if config.qk_norm:
        shapes |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (config.own_head_size,))
    if config.output_bias:
        shapes |= {"self_attn.o_proj.bias": (d,)}
    if config.mlp_bias:
        shapes |= {"mlp.gate_proj.bias": (f,), "mlp.up_proj.bias": (f,), "mlp.down_proj.bias": (d,)}
    return shapes


ExpertStack = list[tuple[str, ...]]
"""Of each expert the matrices that lie one above the other."""


def layer_stacks(mlp: str, count: int) -> tuple[ExpertStack, ExpertStack]:
    """The first and the second projections of the experts of a layer.

    >>> layer_stacks("mlp", 1)
    ([('mlp.experts.0.gate_proj.weight', 'mlp.experts.0.up_proj.weight')], [('mlp.experts.0.down_proj.weight',)])
    """
    names = [f"{mlp}.experts.{expert}" for expert in range(count)]
    return [(f"{n}.gate_proj.weight", f"{n}.up_proj.weight") for n in names], [(f"{n}.down_proj.weight",) for n in names]


def expert_stacks(config: ModelConfig) -> Iterator[ExpertStack]:
    """Those of all layers; none of a model without experts."""
    if config.experts:
        for index in range(config.num_layers):
            yield from layer_stacks(f"model.layers.{index}.mlp", config.experts.count)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model with its shape, in the order of the forward pass; no ``lm_head`` where it is tied."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    layer = layer_shapes(config)
    for index in range(config.num_layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def is_harmless_extra(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may have a tensor that is not used: RoPE buffers, a cache's scales, the head where it is tied."""
    return name.endswith((*HARMLESS_SUFFIXES, *KV_SCALES)) or (config.tie_embeddings and name == HEAD)


def check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Raise one ModelError that names missing, unexpected and misshapen tensors of ``where``, unless there are none."""
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not is_harmless_extra(name, config)]
    if stacked := next((name for name in extra if STACKED_EXPERTS.search(name)), None):
        raise ModelError(
            f"{where}: {stacked} holds all experts of a layer, which is not read: use a checkpoint with a tensor for each, "
            "or a GGUF file"
        )
    wrong = [
        f"{name} is {list(found[name])}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    parts = [_listing("missing", missing), _listing("unexpected", extra), _listing("misshapen", wrong)]
    problems = "; ".join(part for part in parts if part)
    if problems:
        raise ModelError(
            f"{where}: the weights do not fit the config ({len(expected)} tensors expected): {problems}. "
            "Check that config and weights belong to the same model and that the download is complete"
        )


def _listing(what: str, items: Iterable[str]) -> str:
    """``"5 missing: a, b, c, ..."``, or nothing for no items."""
    every = list(items)
    tail = ", ..." if len(every) > 3 else ""
    return f"{len(every)} {what}: {', '.join(every[:3])}{tail}" if every else ""
