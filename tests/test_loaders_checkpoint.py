"""Safetensors checkpoints: what is read, and every way a download can be broken."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_fixtures import one_line, random_weights, refused, spoiled, tiny_config, write_checkpoint
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from skvq.engine.errors import SkvqError
from skvq.loaders.checkpoint import SafetensorsSource, weight_files
from skvq.loaders.names import check_shapes, expected_shapes
from skvq.loaders.source import NEWER, check_finite, fingerprint_of

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_was_written_in_its_own_type(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    config = tiny_config()
    weights = {name: value.to(dtype) for name, value in random_weights(config).items()}
    source = SafetensorsSource(write_checkpoint(tmp_path, config, weights, shards))
    assert source.config == config
    for name, value in weights.items():
        read = source.read(name)
        assert read.dtype == dtype and torch.equal(read, value)
        assert source.blocks(name) is None


def test_sharding_does_not_change_the_fingerprint_but_a_weight_does(tmp_path: Path) -> None:
    config, weights = tiny_config(), random_weights(tiny_config())
    prints = [SafetensorsSource(write_checkpoint(tmp_path / str(n), config, weights, n)).fingerprint for n in (1, 2, 5)]
    assert len(set(prints)) == 1
    weights[Q0][0, 0] += 1
    assert SafetensorsSource(write_checkpoint(tmp_path / "other", config, weights)).fingerprint != prints[0]


def test_reading_twice_returns_the_same_memory(tmp_path: Path) -> None:
    source = SafetensorsSource(write_checkpoint(tmp_path, tiny_config(), random_weights(tiny_config())))
    assert source.read(Q0).data_ptr() == source.read(Q0).data_ptr()


@pytest.mark.parametrize(
    ("model", "config", "options"),
    [
        (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "head_dim": 32}),
        (Qwen2ForCausalLM, Qwen2Config, {}),
    ],
)
def test_a_model_saved_by_transformers_opens(tmp_path: Path, model: Any, config: Any, options: dict[str, Any]) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    theirs = model(config(**sizes, num_attention_heads=4, num_key_value_heads=2, **options))
    theirs.save_pretrained(tmp_path)
    source = SafetensorsSource(tmp_path)
    state = theirs.state_dict()
    for name in expected_shapes(source.config):
        assert torch.equal(source.read(name), state[name]), name
    assert source.config.num_parameters == theirs.num_parameters()


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    config = tiny_config(tie_embeddings=True)
    weights = random_weights(config)
    head = weights["model.embed_tokens.weight"].clone()
    extra = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}
    source = SafetensorsSource(write_checkpoint(tmp_path, config, weights | extra))
    refused(lambda: source.read("lm_head.weight"), "lm_head.weight")


def test_a_head_of_its_own_is_read_whatever_the_config_says(tmp_path: Path) -> None:
    config = tiny_config(tie_embeddings=True)
    weights = random_weights(config)
    head = torch.randn(320, 64)
    source = SafetensorsSource(write_checkpoint(tmp_path / "own", config, weights | {"lm_head.weight": head}))
    assert not source.config.tie_embeddings and torch.equal(source.read("lm_head.weight"), head)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    source = SafetensorsSource(write_checkpoint(tmp_path / "under the other name", config, weights))
    assert source.config == config
    assert torch.equal(source.read("model.embed_tokens.weight"), weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("before", "head"),
    [
        ("", "lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
    ],
)
def test_names_of_a_decoder_inside_another_model(tmp_path: Path, before: str, head: str) -> None:
    config = tiny_config()
    weights = random_weights(config)
    names = {name: head if name == "lm_head.weight" else before + name.removeprefix("model.") for name in weights}
    stored = {names[name]: value for name, value in weights.items()} | {"vision_tower.norm.weight": torch.ones(3)}
    source = SafetensorsSource(write_checkpoint(tmp_path, config, stored))
    for name, value in weights.items():
        assert torch.equal(source.read(name), value)


def test_a_field_that_says_nothing_is_no_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations and sessions of before it was there stay good."""
    config, sample = tiny_config(family="phi3"), [("a", (1,), "F32", b"1234")]
    known, fields = fingerprint_of(config, sample), asdict(config)
    for name in NEWER:
        del fields[name]
    digest = hashlib.sha256(repr(sorted(fields.items())).encode() + b"\na (1,) F32 1234").hexdigest()
    assert known == digest != fingerprint_of(replace(config, rotary_size=2), sample)


def test_a_single_file_beside_shards_of_an_earlier_save_counts(tmp_path: Path) -> None:
    """As in `transformers`, whose save in one file leaves an old index, and may leave its shards."""
    config, old, new = tiny_config(), random_weights(tiny_config(), 1), random_weights(tiny_config(), 2)
    write_checkpoint(tmp_path, config, old, shards=2)
    write_checkpoint(tmp_path, config, new)
    assert torch.equal(SafetensorsSource(tmp_path).read(Q0), new[Q0])
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    assert torch.equal(SafetensorsSource(tmp_path).read(Q0), new[Q0])


def test_missing_unexpected_and_misshapen_are_all_named() -> None:
    config = tiny_config()
    found = expected_shapes(config)
    del found["model.norm.weight"]
    found["model.layers.7.bogus"] = (3,)
    found[Q0] = (5, 6)
    line = refused(lambda: check_shapes(found, config, "here"), "1 missing: model.norm.weight", "1 unexpected", "bogus")
    assert "[5, 6]" in line and "[128, 64]" in line


def truncate(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def lose_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def bad_header(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def duplicate(folder: Path) -> None:
    """The second shard also holds a tensor of the first."""
    weights = random_weights(tiny_config())
    save_file(dict(list(weights.items())[1::2]) | {next(iter(weights)): torch.zeros(320, 64)},
              folder / "model-00002-of-00002.safetensors")  # fmt: skip


def misplaced(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = dict.fromkeys(data["weight_map"], "model-00001-of-00002.safetensors")
    index.write_text(json.dumps(data))


def outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {Q0: "../../etc/secret.safetensors"}}))


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def pickle_only(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (truncate, ["00001-of-00002", "bytes", "download it again"]),
        (lose_shard, ["1 of 2 shards", "00002-of-00002"]),
        (bad_header, ["00001-of-00002", "10 bytes"]),
        (duplicate, ["1 tensors are in two shards", "embed_tokens"]),
        (misplaced, ["tensors that the index places here"]),
        (outside, ["../../etc/secret.safetensors", "not a safetensors file in this folder"]),
        (empty_index, ["weight_map"]),
        (no_weights, ["model.safetensors", "download"]),
        (pickle_only, ["pytorch_model.bin", "pickle"]),
    ],
)
def test_a_broken_download_is_one_line(tmp_path: Path, spoil: Any, fragments: list[str]) -> None:
    write_checkpoint(tmp_path, tiny_config(), random_weights(tiny_config()), shards=2)
    spoil(tmp_path)
    refused(lambda: SafetensorsSource(tmp_path), *fragments)


def test_a_type_that_is_no_16_or_32_bit_float_is_refused_by_name(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    weights[Q0] = weights[Q0].to(torch.int8)
    write_checkpoint(tmp_path, tiny_config(), weights)
    refused(lambda: SafetensorsSource(tmp_path), Q0, "I8", "BF16")


def test_the_config_of_another_model_is_refused_with_both_shapes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), random_weights(tiny_config(num_kv_heads=4)))
    refused(lambda: SafetensorsSource(tmp_path), "4 misshapen", "[128, 64]", "[64, 64]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_weight_that_is_not_finite_is_named_and_counted(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(7, 5, dtype=dtype)
    check_finite("good", tensor, "here")
    tensor[3, 2:4] = value
    refused(lambda: check_finite("bad.weight", tensor, "here"), "bad.weight", "2 of 35")


def small_file(folder: Path) -> tuple[Path, bytes]:
    config = tiny_config(vocab_size=4, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1,
                         head_size=4)  # fmt: skip
    path = write_checkpoint(folder, config, random_weights(config)) / "model.safetensors"
    return path, path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 3000), flips=st.integers(0, 6), header_only=st.booleans())
def test_flipped_bits_and_truncation_raise_only_our_error(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cut: int, flips: int, header_only: bool
) -> None:
    path, data = small_file(tmp_path_factory.mktemp("flips"))
    path.write_bytes(spoiled(data, seed, cut, flips, within=900 if header_only else len(data)))
    try:
        source = SafetensorsSource(path.parent)
    except SkvqError as error:
        one_line(error)
    else:
        assert {name: tuple(source.read(name).shape) for name in expected_shapes(source.config)} == expected_shapes(
            source.config
        )


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), length=st.none() | st.integers(0, 2**64 - 1))
def test_arbitrary_bytes_raise_only_our_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int | None
) -> None:
    path, _ = small_file(tmp_path_factory.mktemp("bytes"))
    path.write_bytes(data if length is None else struct.pack("<Q", length) + data)
    refused(lambda: SafetensorsSource(path.parent), "model.safetensors")


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "weights.00.safetensors"])
def test_a_lone_file_under_another_name_is_the_model(tmp_path: Path, name: str) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path, config, random_weights(config))
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    assert weight_files(tmp_path) == {name: ()}
    shutil.copy(tmp_path / name, tmp_path / "weights.01.safetensors")
    refused(lambda: weight_files(tmp_path), "holds neither model.safetensors nor model.safetensors.index.json")


def test_scales_of_another_engine_s_cache_are_left_alone(tmp_path: Path) -> None:
    config = tiny_config()
    scales = {f"model.layers.0.self_attn.{side}_scale": torch.ones(1) for side in ("k", "v")}
    write_checkpoint(tmp_path, config, random_weights(config) | scales)
    assert SafetensorsSource(tmp_path).config == config


@pytest.mark.parametrize("name", ["switch_mlp.gate_proj.weight", "experts.gate_up_proj"])
def test_experts_in_one_tensor_are_named(tmp_path: Path, name: str) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path, config, random_weights(config) | {f"model.layers.0.mlp.{name}": torch.ones(4, 2, 2)})
    refused(
        lambda: SafetensorsSource(tmp_path), f"mlp.{name} holds all experts of a layer", "a tensor for each, or a GGUF file"
    )
