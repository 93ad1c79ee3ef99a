"""GGUF files: weights and config against the checkpoint they come from, and everything a corrupt file can do."""

from __future__ import annotations

import builtins
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_fixtures import (
    few_words,
    gguf_model,
    llama_cpp,
    one_line,
    random_weights,
    refused,
    spoiled,
    tiny_config,
    write_gguf,
)
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from skvq import CacheConfig, Engine
from skvq.engine.errors import SkvqError
from skvq.engine.model_config import ExpertConfig, RopeConfig
from skvq.engine.report import Quiet
from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
from skvq.loaders.fields import Fields
from skvq.loaders.gguf_config import ROPE_TABLES, llama3_factors, parse_gguf_config
from skvq.loaders.gguf_file import GgufSource, gguf_config
from skvq.loaders.gguf_header import GgufHeader, TensorEntry, map_file, read_header
from skvq.loaders.gguf_tokenizer import build_tokenizer
from skvq.loaders.hub import resolve
from skvq.loaders.model_files import ModelFiles, local_files
from skvq.loaders.names import expected_shapes
from skvq.loaders.published import ALIASES

Types = gguf.GGMLQuantizationType
GROWING = RopeConfig(kind="yarn", theta=1e4, factor=16.0, original_context=8, mscale=1.0, mscale_all_dim=1.0, query_beta=0.5)
"""Of Ministral 3: queries of the ninth token on are longer than they were."""
LONGROPE = RopeConfig(
    kind="longrope",
    original_context=32,
    attention_factor=1.25,
    short_factor=tuple(1 + 0.25 * i for i in range(16)),
    long_factor=tuple(1 + 2.5 * i for i in range(16)),
)
IN_PART = replace(LONGROPE, short_factor=LONGROPE.short_factor[:12], long_factor=LONGROPE.long_factor[:12])
"""Of a head of 32 channels that turns in three quarters (Phi-4-mini)."""
Q0, K1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"family": "qwen2", "qkv_bias": True},
        {"family": "qwen3", "qk_norm": True},
        {"family": "ministral3", "rope": GROWING, "trained_context": 128},
        {"family": "smollm3", "num_layers": 5, "unturned_layers": (3,)},
        {"family": "phi3", "rope": LONGROPE},
        {"family": "phi3", "rotary_size": 24, "rope": IN_PART},
        {"family": "phi3", "attention_spans": (17, 17)},
        {"family": "glm", "rotary_size": 16, "qkv_bias": True},
        {"family": "glm", "rotary_size": 24},
    ],
)
def test_float32_files_give_back_the_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes, bos_token_id=None, eos_token_ids=())
    weights = random_weights(config)
    source = GgufSource(write_gguf(tmp_path / "m.gguf", config, weights))
    assert source.config == config == gguf_config(tmp_path / "m.gguf")
    for name, value in weights.items():
        assert torch.equal(source.read(name), value), name
        assert source.blocks(name) is None


FAMILIES = ["llama", "ministral3", "smollm3", "phi3", "phi3 in part", "glm", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_llama_cpp(tmp_path: Path, family: str) -> None:
    """To what its 16-bit cache does: the most likely tokens, in their order, after more tokens than are alike without what sets
    the family apart."""
    own = {
        "llama": {},
        "ministral3": {"rope": GROWING, "trained_context": 128},
        "smollm3": {"num_layers": 4, "unturned_layers": (3,), "tie_embeddings": True},
        "phi3": {"rope": LONGROPE, "hidden_size": 128},
        "phi3 in part": {"rope": IN_PART, "rotary_size": 24, "tie_embeddings": True, "hidden_size": 128},
        "glm": {"rotary_size": 16, "qkv_bias": True, "hidden_size": 128},
        "mixtral": {"experts": ExpertConfig(count=5, chosen=2)},
        "qwen3_moe": {"experts": ExpertConfig(count=6, chosen=3), "qk_norm": True},
    }
    config = tiny_config(family=family.split()[0], **own[family], bos_token_id=None, eos_token_ids=())
    weights = {name: 1 + 0.3 * t if t.ndim == 1 else 1.5 * t / t.shape[1] ** 0.5 for name, t in random_weights(config).items()}
    file = write_gguf(tmp_path / "m.gguf", config, weights, extra=few_words(config))
    ids = torch.randint(3, 320, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    options = {
        "cache": CacheConfig(method="fp"),
        "max_context": 64,
        "backend": "reference",
        "device": "cpu",
        "dtype": "float32",
    }
    found = Engine.load(file, **options, report=Quiet()).logits(ids)[-1].log_softmax(-1)
    asked = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": 8, "cache_prompt": False}
    answer = llama_cpp(file).handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    theirs = {token["id"]: token["logprob"] for token in answer}
    assert list(theirs)[:4] == found.topk(4).indices.tolist()
    assert max(abs(float(found[token]) - logprob) for token, logprob in theirs.items()) < 0.02


def test_experts_each_in_a_tensor_of_its_own(tmp_path: Path) -> None:
    """The first files of Mixtral, which llama.cpp no longer reads."""
    config = tiny_config(family="mixtral", experts=ExpertConfig(count=4, chosen=2), bos_token_id=None, eos_token_ids=())
    weights = random_weights(config)
    stacked, apart = (GgufSource(write_gguf(tmp_path / f"{s}.gguf", config, weights, stacked=s)) for s in (True, False))
    assert stacked.config == apart.config == config
    assert all(torch.equal(stacked.read(name), apart.read(name)) for name in weights)


FREQS, SHORT, LONG = ROPE_TABLES
ONES = np.ones(16, dtype=np.float32)


@pytest.mark.parametrize(
    ("tables", "kind", "fragments"),
    [
        ({LONG: ONES}, None, ["no rope_factors_short.weight"]),
        ({SHORT: ONES}, "longrope", ["no rope_factors_long.weight"]),
        ({}, "longrope", ["no rope_factors_short.weight and no rope_factors_long.weight"]),
        ({SHORT: ONES, LONG: ONES[:5]}, None, ["rope_factors_long.weight", "5 factors for 16"]),
        ({SHORT: ONES, LONG: -ONES}, None, ["rope_factors_long.weight", "not positive"]),
        ({FREQS: ONES[:3]}, None, ["rope_freqs.weight", "3 factors for 16"]),
        ({SHORT: 2 * ONES, LONG: ONES}, "linear", ["rope_factors_short.weight", "linear"]),
    ],
)
def test_rope_tables_that_cannot_be_right_are_one_line(
    tables: dict[str, np.ndarray], kind: str | None, fragments: list[str]
) -> None:
    refused(lambda: parse_gguf_config(phi3_header(kind), "m.gguf", tables), "m.gguf", *fragments)


def test_tables_of_ones_leave_a_linear_stretch() -> None:
    rope = parse_gguf_config(phi3_header("linear"), "m.gguf", {SHORT: ONES, LONG: ONES}).rope
    assert (rope.kind, rope.factor) == ("linear", 4.0)


def phi3_header(kind: str | None) -> GgufHeader:
    data: dict[str, Any] = {
        "general.architecture": "phi3", "phi3.block_count": 1, "phi3.embedding_length": 64, "phi3.context_length": 64,
        "phi3.attention.head_count": 2, "phi3.feed_forward_length": 8, "phi3.attention.layer_norm_rms_epsilon": 1e-5,
        "phi3.rope.scaling.factor": 4.0,
    } | ({} if kind is None else {"phi3.rope.scaling.type": kind})  # fmt: skip
    tensors = {"token_embd.weight": TensorEntry(shape=(8, 64), kind=0, offset=0)}
    return GgufHeader(metadata=data, tensors=tensors, data_start=0, alignment=32)


def test_a_file_in_parts_is_read_whole_whichever_part_is_given(tmp_path: Path) -> None:
    config = tiny_config(bos_token_id=None, eos_token_ids=())
    weights = random_weights(config)
    (tmp_path / "whole").mkdir()
    whole = GgufSource(write_gguf(tmp_path / "whole" / "m.gguf", config, weights))
    write_gguf(tmp_path / "m.gguf", config, weights, part_tensors=6)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 4 and local_files(tmp_path).path == parts[0]
    for part in parts:
        source = GgufSource(part)
        assert source.config == config == gguf_config(part) and source.fingerprint == whole.fingerprint
        assert source.metadata.has("general.architecture")
        assert all(torch.equal(source.read(name), value) for name, value in weights.items())
    other = parts[1].rename(tmp_path / "aside")
    refused(lambda: GgufSource(parts[0]), "1 of 4 parts are missing", parts[1].name)
    parts[1].write_bytes(parts[2].read_bytes())
    refused(lambda: GgufSource(parts[0]), "is not part 2 of 4")
    parts[0].rename(tmp_path / "first.gguf")
    refused(lambda: GgufSource(tmp_path / "first.gguf"), "one of 4 parts", "-00001-of-00004.gguf")
    other.rename(parts[1])


def test_a_folder_with_a_config_and_only_a_gguf_file_is_that(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_config(), random_weights(tiny_config()))
    (tmp_path / "config.json").write_text("{}")
    assert local_files(tmp_path) == ModelFiles(path, "gguf")
    (tmp_path / "model.safetensors").touch()
    assert local_files(tmp_path) == ModelFiles(tmp_path, "safetensors")


@pytest.mark.parametrize("kind", [Types.Q4_0, Types.Q4_1, Types.Q8_0, Types.F16, Types.BF16])
def test_quantized_files_and_their_blocks(tmp_path: Path, kind: Types) -> None:
    config = tiny_config()
    weights = random_weights(config)
    source = GgufSource(write_gguf(tmp_path / "m.gguf", config, weights, kind=kind))
    for name in (Q0, K1, "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        plain = gguf.quants.dequantize(gguf.quants.quantize(weights[name].numpy(), kind), kind)
        read, blocks = source.read(name), source.blocks(name)
        assert np.array_equal(read.float().numpy(), plain), name
        if kind in (Types.F16, Types.BF16):
            assert blocks is None and read.dtype == (torch.float16 if kind is Types.F16 else torch.bfloat16)
            assert source.stored(name) == (str(read.dtype), 2 * read.numel())
            continue
        assert read.dtype == torch.float32
        assert blocks is not None and (blocks.kind, blocks.shape) == (kind.name, tuple(weights[name].shape))
        assert np.array_equal(gguf.quants.dequantize(blocks.data.numpy(), kind), plain), name
    assert source.blocks("model.norm.weight") is None


@pytest.mark.parametrize("kind", [Types.Q4_K, Types.Q5_K, Types.Q6_K])
def test_blocks_that_share_a_scale(tmp_path: Path, kind: Types) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=512, num_heads=8)
    path = gguf_model(tmp_path / "m.gguf", config, kind.name)
    source = GgufSource(path)
    for name in (Q0, K1, "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        read, blocks = source.read(name), source.blocks(name)
        assert blocks is not None and (blocks.kind, blocks.shape) == (kind.name, tuple(read.shape))
        assert torch.equal(BlockMatrix(blocks.data, blocks.kind).rows(torch.arange(len(read))), read), name
    options: dict[str, Any] = {"max_context": 128, "max_sequences": 1, "cache": CacheConfig(method="fp"), "device": "cpu"}
    kept, dense = (Engine.load(path, backend=name, report=Quiet(), **options) for name in ("numba", "reference"))
    assert kept.parts.model.weights.nbytes < dense.parts.model.weights.nbytes / 4
    ids = [3, 77, 150, 9, 200, 41]
    got, want = kept.logits(ids), dense.logits(ids)
    assert float((got - want).abs().max()) < 1e-3 * float(want.std())


def made_up(value: np.ndarray, kind: Types) -> np.ndarray:
    """Random blocks of a type that the gguf package only reads, with scales that keep their weights small."""
    columns, nbytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (value.shape[0], value.shape[1] // columns, nbytes)
    data = np.random.default_rng(value.size).integers(0, 256, shape, dtype=np.uint8)
    at = {Types.Q3_K: 108, Types.Q2_K: 80}.get(kind, 0)
    data[..., at : at + 2] = np.full((*shape[:2], 1), 3e-5, dtype=np.float16).view(np.uint8)
    if kind is Types.Q2_K:
        data[..., 82:84] = data[..., 80:82]
    return data.reshape(shape[0], -1)


@pytest.mark.parametrize(
    ("kind", "given", "error"), [(Types.Q3_K, "Q6_K", 0.0), (Types.IQ4_NL, "Q8_0", 0.0), (Types.IQ4_XS, "Q8_0", 5e-4)]
)
def test_types_that_no_kernel_multiplies_are_given_as_others_that_hold_the_same(
    tmp_path: Path, kind: Types, given: str, error: float
) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=512, num_heads=8)
    source = GgufSource(write_gguf(tmp_path / "m.gguf", config, random_weights(config), kind=kind, quantize=made_up))
    for name in (Q0, K1, "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        blocks, read = source.blocks(name), source.read(name)
        assert blocks is not None and source.stored(name) == (given, blocks.data.nbytes) and not source.expanded(name)
        same = torch.from_numpy(gguf.quants.dequantize(blocks.data.numpy(), Types[given]))
        assert blocks.kind == given and float((same - read).abs().max()) <= error * float(read.abs().max())


def test_types_that_no_blocks_hold_are_expanded_to_16_bits_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=512, num_heads=8)

    def words(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "ab", *(f"t{n}" for n in range(3, config.vocab_size))])
        writer.add_token_merges(["a b"])

    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), kind=Types.Q2_K, quantize=made_up, extra=words)
    source = GgufSource(path)
    want = gguf.quants.dequantize(made_up(np.zeros((320, 256)), Types.Q2_K), Types.Q2_K)
    read = source.read("model.embed_tokens.weight")
    assert read.dtype == torch.float16 and np.array_equal(read.numpy(), want.astype(np.float16))
    assert source.stored("model.embed_tokens.weight") == ("torch.float16", 2 * want.size)
    engine = Engine.load(path, max_context=64, cache=CacheConfig(method="fp"), device="cpu")
    assert engine.parts.model.weights.nbytes == engine.parts.plan.parts["weights"] < 2.1 * config.num_parameters
    assert "weights stored as Q2_K are held as float16" in capsys.readouterr().err


def test_linear_yarn_and_sliding_window_keys(tmp_path: Path) -> None:
    config, weights = tiny_config(), random_weights(tiny_config())

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_sliding_window(77)

    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    source = GgufSource(write_gguf(tmp_path / "y.gguf", config, weights, extra=yarn))
    assert source.config.rope == RopeConfig(kind="yarn", factor=4.0, original_context=128)
    assert source.config.attention_spans == (77, 77)
    source = GgufSource(write_gguf(tmp_path / "l.gguf", config, weights, extra=linear))
    assert source.config.rope == RopeConfig(kind="linear", factor=2.0, original_context=512)


def test_llama3_factors_are_those_of_transformers_and_are_recognized(tmp_path: Path) -> None:
    rope = RopeConfig(kind="llama3", theta=5e5, factor=8.0, original_context=8192)
    parameters = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    theirs = LlamaConfig(hidden_size=128, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    factors = llama3_factors(32, rope).astype(np.float32)
    plain = 5e5 ** -(np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)
    config = tiny_config(rope=RopeConfig(theta=5e5))
    weights = random_weights(config)
    path = write_gguf(tmp_path / "m.gguf", config, weights, extra=lambda w: w.add_tensor("rope_freqs.weight", factors))
    assert GgufSource(path).config.rope == rope
    odd = factors * np.linspace(1, 2, 16, dtype=np.float32)
    path = write_gguf(tmp_path / "o.gguf", config, weights, extra=lambda w: w.add_tensor("rope_freqs.weight", odd))
    other = GgufSource(path).config.rope
    assert other.kind == "longrope" and other.long_factor == other.short_factor == tuple(odd.tolist())
    assert other.attention_factor == 1.0


def test_smollm2_is_its_published_config_and_its_header_is_the_reader_s() -> None:
    path = resolve("smollm2-135m").path
    source = GgufSource(path)
    assert source.config == ALIASES["smollm2-135m"].config
    assert source.config.num_parameters == 134_515_008
    header, theirs = read_header(map_file(path), "x"), gguf.GGUFReader(path)
    assert {t.name: tuple(int(d) for d in reversed(t.shape)) for t in theirs.tensors} == {
        name: entry.shape for name, entry in header.tensors.items()
    }
    assert {t.name: t.data_offset for t in theirs.tensors} == {
        name: header.data_start + entry.offset for name, entry in header.tensors.items()
    }
    for name in ("general.name", "llama.block_count", "tokenizer.chat_template"):
        assert header.metadata[name] == theirs.fields[name].contents()
    assert header.metadata["tokenizer.ggml.merges"] == theirs.fields["tokenizer.ggml.merges"].contents()
    tensor = next(t for t in theirs.tensors if t.name == "blk.3.ffn_up.weight")
    want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(source.read("model.layers.3.mlp.up_proj.weight").numpy(), want)


def test_without_the_gguf_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_config(), random_weights(tiny_config()))
    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    refused(lambda: GgufSource(path), 'pip install "skvq[gguf]"')


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header_bytes(body: bytes = b"", tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


KEY = string("general.architecture")
NESTED = struct.pack("<IQ", 9, 1) * 50


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        (b"", ["is empty"]),
        (b"GG", ["truncated", "2 are left"]),
        (b"PK\x03\x04" + bytes(40), ["not a GGUF file"]),
        (header_bytes(version=1), ["version 1"]),
        (header_bytes(version=0x03000000), ["big-endian"]),
        (header_bytes(tensors=2**60), [str(2**60), "tensors"]),
        (header_bytes(keys=2**60), [str(2**60), "metadata keys"]),
        (header_bytes(struct.pack("<Q", 2**62) + bytes(20), keys=1), [str(2**62)]),
        (header_bytes(KEY + struct.pack("<IIQ", 9, 4, 2**61), keys=1), [str(2**61), "general.architecture"]),
        (header_bytes(KEY + struct.pack("<IIQ", 9, 8, 2**61), keys=1), [str(2**61), "general.architecture"]),
        (header_bytes(KEY + struct.pack("<I", 9) + NESTED, keys=1), ["depth"]),
        (header_bytes(KEY + struct.pack("<I", 77), keys=1), ["type 77"]),
        (header_bytes((KEY + struct.pack("<I", 8) + string("llama")) * 2, keys=2), ["twice"]),
        (
            header_bytes(KEY + struct.pack("<I", 8) + string("mamba"), keys=1),
            ["mamba", "chatglm, llama, mistral3, phi3, qwen2"],
        ),
        (header_bytes(), ["general.architecture is missing"]),
        (header_bytes(string("t") + struct.pack("<I", 9) + bytes(40), tensors=1), ["9 dimensions"]),
        (header_bytes(string("t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0), tensors=1), ["shape"]),
    ],
)
def test_a_corrupt_header_is_one_line(tmp_path: Path, data: bytes, fragments: list[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    refused(lambda: GgufSource(path), "m.gguf", *fragments)


def test_a_truncated_file_names_a_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_config(), random_weights(tiny_config()))
    path.write_bytes(path.read_bytes()[:-5000])
    refused(lambda: GgufSource(path), "truncated", "output.weight", "download")


@pytest.mark.parametrize(("name", "offset"), [("blk.1.ffn_down.weight", 0), ("output.weight", None)])
def test_tensors_that_overlap_or_lie_apart_are_refused(tmp_path: Path, name: str, offset: int | None) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_config(), random_weights(tiny_config()))
    data = path.read_bytes()
    entry = string(name)
    at = data.index(entry) + len(entry) + 4 + 2 * 8 + 4  # dimensions, their number, type
    (found,) = struct.unpack_from("<Q", data, at)
    path.write_bytes(data[:at] + struct.pack("<Q", found - 4 if offset is None else offset) + data[at + 8 :])
    refused(lambda: GgufSource(path), "corrupt", " is at byte", "download")


def test_experts_and_types_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    config, weights = tiny_config(), random_weights(tiny_config())
    qwen = replace(config, family="qwen2", qkv_bias=True)
    path = write_gguf(tmp_path / "e.gguf", qwen, random_weights(qwen), extra=lambda w: w.add_expert_count(8))
    refused(lambda: GgufSource(path), "expert_count is 8")
    path = write_gguf(tmp_path / "f.gguf", config, weights, extra=lambda w: w.add_expert_count(8))
    refused(lambda: GgufSource(path), "expert_used_count")
    extra = np.zeros((2, 32), dtype=np.int32)
    path = write_gguf(tmp_path / "i.gguf", config, weights, extra=lambda w: w.add_tensor("odd", extra))
    refused(lambda: GgufSource(path), "odd", "I32")


METADATA = [
    "general.architecture", "llama.block_count", "llama.embedding_length", "llama.attention.head_count",
    "llama.attention.head_count_kv", "llama.attention.key_length", "llama.feed_forward_length", "llama.expert_count",
    "llama.attention.scale", "llama.rope.freq_base", "llama.rope.scaling.type", "llama.rope.scaling.factor",
    "llama.attention.sliding_window", "llama.context_length", "llama.rope.dimension_count",
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
    "tokenizer.ggml.scores", "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.chat_template",
]  # fmt: skip
SCALAR = st.integers(-1, 2**64 - 1) | st.floats() | st.booleans()
STRINGS = st.text(max_size=4) | st.sampled_from(["llama", "gpt2", "yarn", "a", "b", "ab", "a b", "qwen2", "\u2581"])
VALUE = (
    SCALAR | STRINGS | st.lists(STRINGS, max_size=6) | st.integers(1, 600).map(lambda n: ["x" * n, "x"])
    | st.lists(st.integers(0, 6), max_size=6).map(lambda v: np.array(v, dtype=np.int32))
    | st.lists(st.floats(width=32), max_size=6).map(lambda v: np.array(v, dtype=np.float32))
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(METADATA), VALUE, max_size=5), spm=st.booleans())
def test_no_metadata_raise_anything_but_our_error(changes: dict[str, Any], spm: bool) -> None:
    data: dict[str, Any] = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 8,
        "llama.context_length": 64,
        "llama.attention.head_count": 2, "llama.feed_forward_length": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "llama" if spm else "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.scores": np.zeros(3, dtype=np.float32), "tokenizer.ggml.token_type": np.ones(3, dtype=np.int32),
    }  # fmt: skip
    tensors = {"token_embd.weight": TensorEntry(shape=(8, 8), kind=0, offset=0)}
    header = GgufHeader(metadata=data | changes, tensors=tensors, data_start=0, alignment=32)
    try:
        config = parse_gguf_config(header, "m.gguf", {})
        tokenizer = build_tokenizer(Fields(header.metadata, "m.gguf"), config)
        tokenizer.decode(tokenizer.encode("ab a"))
    except SkvqError as error:
        one_line(error)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    config = tiny_config(vocab_size=4, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1,
                         head_size=4)  # fmt: skip
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", config, random_weights(config))
    return path, path.read_bytes()


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 3000), flips=st.integers(0, 6))
def test_flipped_bits_and_truncation_raise_only_our_error(
    small_file: tuple[Path, bytes], seed: int, cut: int, flips: int
) -> None:
    path, data = small_file
    target = path.with_name(f"{seed % 7}.gguf")
    target.unlink(missing_ok=True)
    target.write_bytes(spoiled(data, seed, cut, flips, within=len(data)))
    try:
        source = GgufSource(target)
    except SkvqError as error:
        one_line(error)
    else:
        for name, shape in expected_shapes(source.config).items():
            assert tuple(source.read(name).shape) == shape


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=300), tensors=st.integers(0, 2**64 - 1) | st.integers(0, 3), keys=st.integers(0, 4))
def test_arbitrary_headers_raise_only_our_error(small_file: tuple[Path, bytes], body: bytes, tensors: int, keys: int) -> None:
    target = small_file[0].with_name("arbitrary.gguf")
    target.unlink(missing_ok=True)
    target.write_bytes(header_bytes(body, tensors, keys))
    refused(lambda: GgufSource(target), "arbitrary.gguf")
