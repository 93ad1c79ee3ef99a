"""Quantized weights as a GPU multiplies them: the numbers of the file, and the bytes that were planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ggml_fixtures import SPANNING, blocks_of
from loader_fixtures import gguf_model, tiny_config

from skvq.engine.weight_forms import form_of
from skvq.kernels.ggml.formats import BLOCK, FORMATS
from skvq.kernels.ggml.words import EXPANDED_BYTES, ROWS_AT_A_TIME, to_words, words_bytes
from skvq.loaders.gguf_file import GgufSource
from skvq.loaders.names import expected_shapes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 37, ROWS_AT_A_TIME + 6])
def test_words_are_the_weights_of_the_file(kind: str, rows: int) -> None:
    """To the bit; where a product of two numbers is rounded to float16, to that."""
    columns = 3 * BLOCK * FORMATS[kind].span
    data, weight = blocks_of(kind, rows, columns)
    words = to_words(data, kind, CPU)
    dense = words.dense()
    assert words.shape == (rows, columns) and words.data.nbytes == words_bytes(kind, rows, columns)
    assert [t.is_contiguous() and t.data_ptr() % 4 == 0 for t in (words.codes, words.high, words.pairs)] == [True] * 3
    if kind not in SPANNING:
        assert torch.equal(dense, weight)
        return
    # a scale and an offset, or a scale and 32 times it, are off by 2^-11 of themselves at most; codes are below 64
    largest = torch.maximum(weight.abs(), (weight - words.pairs.view(torch.float16).float().view(rows, -1)[:, :1]).abs()).max()
    assert float((dense - weight).abs().max()) <= 3 * 2**-11 * float(largest)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16"])
def test_bytes_on_a_gpu_are_known_before(tmp_path: Path, kind: str) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=512, num_heads=8)
    source = GgufSource(gguf_model(tmp_path / "m.gguf", config, kind))
    form = form_of("triton", CUDA, torch.bfloat16)
    blocks = [found for name in expected_shapes(config) if (found := source.blocks(name)) is not None]
    matrices = sum(found.shape[0] * found.shape[1] for found in blocks)
    held = sum(to_words(found.data, found.kind, CPU).data.nbytes for found in blocks)
    assert form.held_bytes(source) == held + 2 * (config.num_parameters - matrices)
    assert form.expanded_bytes(source) == (0 if kind == "F16" else EXPANDED_BYTES)
    everything = 2 * config.num_parameters
    assert form_of("triton", CUDA, torch.float32).held_bytes(source) == 2 * everything  # its kernels are of 16 bits
    assert form_of("reference", CUDA, torch.bfloat16).held_bytes(source) == everything
