"""Tiny models on disk for the tests of loaders/: checkpoints, GGUF files and tokenizers made from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from config_json import write_config
from ggml_fixtures import SPANNING, random_blocks
from safetensors.torch import save_file
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers, trainers

from skvq.engine.errors import SkvqError
from skvq.engine.model_config import FULL_SPAN, ModelConfig, RopeConfig
from skvq.loaders.gguf_config import ARCHITECTURES
from skvq.loaders.gguf_file import PERMUTED, gguf_names, layer_name, stack_name
from skvq.loaders.names import expected_shapes, expert_stacks, stacks
from skvq.loaders.rows import stored_rows

STACKING = ("phi3", "glm")
"""Families whose GGUF files hold queries, keys and values in one matrix, and gates and ups."""
WORDS = "the quick brown fox jumps over 12345 lazy dogs; it's naïve — déjà vu! def f(x):\n\treturn x ** 2\n 日本 😀 "


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers of a GQA model with a head size that is not hidden/heads."""
    base: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 32,
        "rope": RopeConfig(original_context=512),
        "trained_context": 512,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return ModelConfig(**(base | changes))


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every weight of the config, float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config).items()}


def spoiled(data: bytes, seed: int, cut: int, flips: int, within: int) -> bytes:
    """``data`` with that many random bits flipped in its first ``within`` bytes; of every other seed ``cut`` bytes short."""
    rng, found = random.Random(seed), bytearray(data[: len(data) - cut] if seed % 2 else data)
    for _ in range(flips if found else 0):
        found[rng.randrange(min(len(found), within))] ^= 1 << rng.randrange(8)
    return bytes(found)


def write_checkpoint(folder: Path, config: ModelConfig, weights: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """config.json and the weights in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors")
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[index::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    quantize: Callable[[np.ndarray, gguf.GGMLQuantizationType], np.ndarray] = gguf.quants.quantize,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    part_tensors: int = 0,
    stacked: bool = True,
) -> Path:
    """A GGUF file of a config: matrices stored as ``kind``, vectors as float32, Q and K permuted where llama.cpp wants it, and
    stacked where it has them so.

    stacked: the experts of a layer in one tensor, not each in its own, as the first files of Mixtral have them.
    part_tensors: parts of so many tensors each, next to ``path``, which is none of them.
    """
    arch = next((name for name, family in ARCHITECTURES.items() if family == config.family), "llama")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=part_tensors)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.trained_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_context)
        writer.add_rope_scaling_yarn_log_mul(config.rope.mscale_all_dim)
        writer.add_attn_temperature_scale(config.rope.query_beta)
    if config.family in STACKING:
        writer.add_rope_dimension_count(config.turned_size)
    if config.family == "phi3":
        writer.add_sliding_window(0 if config.attention_spans[0] == FULL_SPAN else config.attention_spans[0])
    if config.rope.kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_context)
        writer.add_rope_scaling_attn_factors(config.rope.attention_factor or 1.0)
        for name, factors in (("short", config.rope.short_factor), ("long", config.rope.long_factor)):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(factors, dtype=np.float32))
    if config.experts:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.chosen)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    extra(writer)
    interleaved = ARCHITECTURES[arch] in PERMUTED
    names, values = gguf_names(config), {name: weight.numpy() for name, weight in weights.items()}
    for name, value in values.items():
        if (rows := stored_rows(name, config, interleaved=interleaved)) is not None:
            values[name] = value[np.argsort(rows)]
    for whole, (_, parts) in stacks(expected_shapes(config)).items() if config.family in STACKING else ():
        values[whole] = np.concatenate([values[part] for part in parts])
        names = {name: theirs for name, theirs in names.items() if name not in parts} | {whole: layer_name(whole)}
    for stack in expert_stacks(config) if stacked else ():
        for parts in zip(*stack, strict=True):
            values[parts[0]] = np.stack([values[part] for part in parts])
            names = {name: theirs for name, theirs in names.items() if name not in parts} | {parts[0]: stack_name(parts[0])}
    for name, theirs in names.items():
        value = values[name]
        if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(theirs, value)
        else:
            writer.add_tensor(theirs, quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_model(path: Path, config: ModelConfig, kind: str) -> Path:
    """A whole model in a GGUF file: random weights as blocks of that kind, and words ``a``, ``b``, ``ab``, ``t3`` ..."""

    def quantize(value: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        if kind.name not in SPANNING:
            return np.asarray(gguf.quants.quantize(value, kind))
        *experts, rows, columns = value.shape
        drawn = random_blocks(kind.name, prod(experts) * rows, columns, seed=value.shape[0], scale=1e-4)
        return drawn.view(*experts, rows, -1).numpy()

    kinds = gguf.GGMLQuantizationType
    return write_gguf(path, config, random_weights(config), kind=kinds[kind], quantize=quantize, extra=few_words(config))


def few_words(config: ModelConfig) -> Callable[[gguf.GGUFWriter], None]:
    """A vocabulary of ``a``, ``b``, ``ab``, ``t3`` ..."""

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "ab", *(f"t{n}" for n in range(3, config.vocab_size))])
        writer.add_token_types([1] * config.vocab_size)
        writer.add_token_merges(["a b"])
        writer.add_add_bos_token(False)

    return write


def llama_cpp(model: Path) -> xllamacpp.Server:
    """llama.cpp in this process, for texts of up to 256 tokens."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity, params.port = 256, 1, False, -1, 0
    params.cpuparams.n_threads = torch.get_num_threads()
    return xllamacpp.Server(params)


def byte_level_pipeline(specials: tuple[str, ...] = ("<s>", "</s>"), size: int = 320) -> Pipeline:
    """A byte-level BPE trained on a few words."""
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator([WORDS] * 4, trainer)
    return pipeline


def refused(call: Callable[[], Any], *fragments: str) -> str:
    """Assert that ``call`` raises a SkvqError of one line with all fragments, and return the line."""
    with pytest.raises(SkvqError) as caught:
        call()
    line = one_line(caught.value)
    for fragment in fragments:
        assert fragment in line, f"{fragment!r} is not in: {line}"
    return line


def one_line(error: SkvqError) -> str:
    """Assert that an error is one line of a bearable length, and return it."""
    line = str(error)
    assert "\n" not in line and 10 < len(line) < 700, line
    return line
