"""Weights rounded to Q8_0 while they are read, against ggml's own rounding, and what a name with a colon means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from loader_fixtures import byte_level_pipeline, gguf_model, random_weights, refused, tiny_config, write_checkpoint
from tiny import Listener

from skvq import CacheConfig, Engine
from skvq.engine.model_config import ModelConfig
from skvq.engine.storage import Form
from skvq.engine.weight_forms import form_of
from skvq.loaders.checkpoint import SafetensorsSource
from skvq.loaders.hub import resolve
from skvq.loaders.open import open_model, open_source
from skvq.loaders.rounded import RoundedSource, rounded

CPU: Form = form_of("numba", torch.device("cpu"), torch.float32)
MATRIX = "model.layers.0.mlp.up_proj.weight"


def checkpoint(folder: Path, config: ModelConfig | None = None) -> Path:
    config = config or tiny_config()
    weights = {name: w if w.ndim == 1 else w / w.shape[1] ** 0.5 for name, w in random_weights(config).items()}
    write_checkpoint(folder, config, {name: weight.bfloat16() for name, weight in weights.items()})
    byte_level_pipeline().save(str(folder / "tokenizer.json"))
    return folder


def test_rounding_is_ggmls_but_for_ties() -> None:
    """Scales are the same; ggml divides by the scale before it is rounded to float16, so a code may be the next one."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    weight[3] = 0.0
    weight[4, :40] *= 1e-8
    found = rounded(weight).view(64, 3, 34)
    theirs = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)).view(64, 3, 34)
    assert torch.equal(found[..., :2], theirs[..., :2])
    codes, wanted = (t[..., 2:].contiguous().view(torch.int8).int() for t in (found, theirs))
    normal = weight.view(64, 3, 32).abs().amax(-1) > 0.01  # of the rest the scale is zero, or has few bits
    assert (codes - wanted)[normal].abs().max() <= 1 and (codes != wanted)[normal].float().mean() < 0.01
    expanded = torch.from_numpy(gguf.quants.dequantize(found.view(64, -1).numpy(), gguf.GGMLQuantizationType.Q8_0))
    largest = weight.view(64, 3, 32).abs().amax(-1).repeat_interleave(32, 1)
    assert ((expanded - weight).abs() <= largest / 250 + 1e-7).all()


def test_a_folder_in_8_bits(tmp_path: Path) -> None:
    """Half the memory, planned as it is held, another fingerprint, and nearly the same logits."""
    name = f"{checkpoint(tmp_path)}:Q8_0"
    source, _ = open_model(name)
    whole = SafetensorsSource(tmp_path)
    blocks = source.blocks(MATRIX)
    assert blocks is not None and torch.equal(blocks.data, rounded(whole.read(MATRIX)))
    assert source.stored(MATRIX) == ("Q8_0", blocks.data.numel()) and source.fingerprint != whole.fingerprint
    expanded = torch.from_numpy(gguf.quants.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(source.read(MATRIX), expanded)
    assert torch.equal(source.read("model.norm.weight"), whole.read("model.norm.weight"))
    options: dict[str, Any] = {"cache": CacheConfig(method="fp"), "max_context": 64, "device": "cpu"}
    told = Listener()
    engine, usual = (Engine.load(n, report=told, **options) for n in (name, tmp_path))
    found, wanted = (e.logits(list(range(40))) for e in (engine, usual))
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    assert engine.parts.model.weights.nbytes == CPU.held_bytes(source) < 0.56 * usual.parts.model.weights.nbytes
    dummy, _ = open_model(name, dummy_weights=True)
    assert CPU.held_bytes(dummy) == CPU.held_bytes(source)
    assert not any("more memory" in said for said in told.messages)


def test_rows_that_have_no_whole_blocks_stay(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=72, intermediate_size=96)
    source = RoundedSource(SafetensorsSource(checkpoint(tmp_path, config)))
    assert source.stored(MATRIX) == ("torch.bfloat16", 2 * 96 * 72) and source.blocks(MATRIX) is None
    assert source.stored("model.layers.0.mlp.down_proj.weight")[0] == "Q8_0"


def test_what_is_in_blocks_is_not_rounded_again(tmp_path: Path) -> None:
    path = gguf_model(tmp_path / "m.gguf", tiny_config(), "Q4_0")
    refused(lambda: open_source(resolve(f"{path}:Q8_0")), "in blocks already", "leave :Q8_0 out")
    path = gguf_model(tmp_path / "h.gguf", tiny_config(), "F16")
    source, _ = open_model(f"{path}:Q8_0")
    assert isinstance(source, RoundedSource) and source.stored(MATRIX)[0] == "Q8_0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_weight_is_not_hidden(tmp_path: Path, value: float) -> None:
    config = tiny_config()
    weights = random_weights(config)
    weights[MATRIX][5, 7] = value
    write_checkpoint(tmp_path, config, weights)
    byte_level_pipeline().save(str(tmp_path / "tokenizer.json"))
    options: dict[str, Any] = {"cache": CacheConfig(method="fp"), "max_context": 64, "device": "cpu", "report": Listener()}
    refused(lambda: Engine.load(f"{tmp_path}:Q8_0", **options), MATRIX, "NaN or infinite")
