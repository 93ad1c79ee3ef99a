"""Mixtures of experts: stacks in every form, few tokens as many, and the engine over them."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from ggml_fixtures import blocks_of, random
from loader_fixtures import byte_level_pipeline, gguf_model, random_weights, refused, tiny_config, write_checkpoint
from tiny import random_ids, steps, tiny_cache, tiny_engine
from torch import Tensor
from transformers import GlmConfig, MixtralConfig, Qwen3MoeConfig

from skvq.engine.config import SamplingConfig
from skvq.engine.decode import EagerStep, GraphStep
from skvq.engine.model_config import ExpertConfig, ModelConfig
from skvq.engine.weight_forms import form_of
from skvq.kernels.experts import FEW_TOKENS, DenseStack, Experts, Stack, StoredStack, route
from skvq.kernels.ggml.formats import FORMATS
from skvq.kernels.linear import DenseLinear
from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
from skvq.kernels.numba_cpu.half_matrix import HalfMatrix
from skvq.kernels.numba_cpu.ops import NumbaOps
from skvq.kernels.numba_cpu.tape import Tape
from skvq.kernels.ops import TorchOps
from skvq.loaders.checkpoint import SafetensorsSource
from skvq.loaders.dummy import DummySource
from skvq.loaders.fields import Fields
from skvq.loaders.hf import parse_config
from skvq.loaders.names import canonical_names, expected_shapes

MIXTRAL = tiny_config(family="mixtral", experts=ExpertConfig(count=5, chosen=2), bos_token_id=None, eos_token_ids=())
QWEN = tiny_config(
    family="qwen3_moe", qk_norm=True, intermediate_size=32, experts=ExpertConfig(count=9, chosen=4, normed=False)
)


def stack_of(kind: str, experts: int, outs: int, columns: int, seed: int = 0) -> Stack:
    """Random matrices as a file stores them, or with a dtype for kind."""
    if kind in FORMATS:
        return StoredStack(BlockMatrix(blocks_of(kind, experts * outs, columns, seed)[0], kind), outs)
    weight = random(experts * outs, columns, seed=seed) / columns**0.5
    if kind == "float32":
        return DenseStack(weight.view(experts, outs, columns))
    return StoredStack(HalfMatrix(weight.to(getattr(torch, kind))), outs)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", *FORMATS])
@pytest.mark.parametrize("threads", [1, 2])
def test_each_vector_by_the_matrix_of_its_expert(kind: str, threads: int) -> None:
    """Several experts a vector, an expert of several vectors, and one that none has."""
    torch.set_num_threads(threads)
    try:
        for vectors, ids in ((1, [4, 0]), (3, [2, 2, 0, 4, 1, 2]), (2, [1, 3]), (1, [3])):
            stack, x = stack_of(kind, 5, 48, 256), random(vectors, 256, seed=1)
            got, want = (ops.each(stack, x, torch.tensor(ids)) for ops in (NumbaOps(), TorchOps()))
            assert torch.equal(stack.of(4).dense(), stack_dense(stack, 48)[4])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    finally:
        torch.set_num_threads(1)


def stack_dense(stack: Stack, outs: int) -> Tensor:
    """All matrices, float32 [experts, out, in]."""
    if isinstance(stack, DenseStack):
        return stack.weight
    assert isinstance(stack, StoredStack)
    rows = stack.matrix.shape[0]
    return stack.matrix.rows(torch.arange(rows)).view(rows // outs, outs, -1)


def test_a_step_in_bfloat16_is_one_in_float32_rounded() -> None:
    """On a CPU that computes in 16 bits; and what tells the host its experts is not recorded."""
    stack, x, ids = DenseStack(random(4, 32, 64).bfloat16()), random(2, 64, seed=1).bfloat16(), torch.tensor([3, 0, 1, 1])
    want = torch.cat([x[p // 2, None].float() @ stack.weight[i].float().T for p, i in enumerate(ids.tolist())])
    torch.testing.assert_close(NumbaOps().each(stack, x, ids), want.bfloat16(), rtol=2e-2, atol=2e-2)
    experts, many = experts_of("float32", normed=True), random(FEW_TOKENS + 1, 64)
    with pytest.raises(RuntimeError, match="cannot be recorded"), Tape():
        NumbaOps().mix_many(many, *route(experts.router(many), 3, normed=True), experts)
    assert SamplingConfig(prompt_lookup=FEW_TOKENS - 1).prompt_lookup == FEW_TOKENS - 1
    refused(lambda: SamplingConfig(prompt_lookup=FEW_TOKENS), "prompt_lookup")


def test_a_router_chooses_the_largest_and_weighs_them() -> None:
    logits = random(7, 9)
    ids, weights = route(logits, 3, normed=False)
    every = logits.softmax(-1)
    torch.testing.assert_close(weights, every.gather(1, ids))
    assert torch.equal(ids, every.argsort(-1, descending=True)[:, :3])
    torch.testing.assert_close(route(logits, 3, normed=True)[1], weights / weights.sum(-1, keepdim=True))


def experts_of(kind: str, normed: bool) -> Experts:
    return Experts(
        router=DenseLinear(random(6, 64, seed=3), None),
        gate_up=stack_of(kind, 6, 2 * 96, 64, seed=4),
        down=stack_of(kind, 6, 64, 96, seed=5),
        count=6,
        chosen=3,
        normed=normed,
    )


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "Q4_0"])
@pytest.mark.parametrize("ops", [TorchOps(), NumbaOps()], ids=["torch", "numba"])
def test_a_layer_is_what_its_definition_says(ops: TorchOps, kind: str) -> None:
    """Of few tokens and of many, in float64 expert by expert; a token's numbers do not depend on the others'."""
    experts, norm = experts_of(kind, normed=kind != "Q4_0"), random(64, seed=7)
    output = DenseLinear(random(64, 32, seed=8) / 6, random(64, seed=9))
    x, attended = random(2, FEW_TOKENS + 5, 64), random(2, FEW_TOKENS + 5, 32, seed=1)
    before = x.clone()
    found = ops.after_attention_experts(x, attended, output, norm, 1e-5, experts)
    few = ops.after_attention_experts(x[:, :FEW_TOKENS], attended[:, :FEW_TOKENS], output, norm, 1e-5, experts)
    assert torch.equal(x, before)

    y = x.double() + attended.double() @ output.weight.double().T + output.bias.double()  # type: ignore[union-attr]
    h = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    gates, downs = stack_dense(experts.gate_up, 192).double(), stack_dense(experts.down, 64).double()
    shares = (h @ experts.router.dense().double().T).softmax(-1)
    wanted = y.clone()
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(FEW_TOKENS + 5)).tolist():
        share, token = shares[*at], h[*at]
        chosen = share.topk(3).indices.tolist()
        total = float(share[chosen].sum()) if experts.normed else 1.0
        for e in chosen:
            gate, up = (gates[e] @ token).chunk(2)
            wanted[*at] += share[e] / total * (downs[e] @ (gate * gate.sigmoid() * up))
    scale = float(wanted.abs().max())
    for got, want in ((found, wanted), (few, wanted[:, :FEW_TOKENS])):
        assert float((got.double() - want).abs().max()) < 2e-5 * scale


@pytest.fixture(scope="module", params=["mixtral", "qwen"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return {"mixtral": MIXTRAL, "qwen": QWEN}[request.param]


@pytest.fixture(scope="module")
def folder(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, whose experts differ."""
    weights = {
        name: (1 + 0.3 * t if t.ndim == 1 else 1.5 * t / t.shape[1] ** 0.5).bfloat16()
        for name, t in random_weights(config).items()
    }
    return with_tokenizer(write_checkpoint(tmp_path_factory.mktemp("experts"), config, weights))


def with_tokenizer(folder: Path) -> Path:
    byte_level_pipeline().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_decode_prefill_and_batches_agree(folder: Path, backend: str) -> None:
    """Read then decoded is what teacher-forced scoring says; a batch is its singles; graphs are what is launched one by one."""
    engine = tiny_engine(folder, tiny_cache(method="fp"), backend=backend, dummy_weights=False)
    ids = random_ids(90)
    wanted = engine.logits(ids)
    with engine.prefill(ids[:60]) as sequence:
        assert sequence.logits is not None
        rows = torch.cat([sequence.logits[None], steps(engine, [sequence], [ids[60:]])[0]])
    torch.testing.assert_close(rows, wanted[59:], rtol=1e-3, atol=2e-3 * float(wanted.abs().max()))
    texts = [random_ids(50, seed=seed) for seed in (1, 2, 3)]
    alone = torch.cat([steps(engine, [s], [random_ids(4, seed=9)]) for s in map(engine.prefill, texts)])
    assert isinstance(engine.step, GraphStep if backend == "numba" else EagerStep)
    engine = tiny_engine(folder, tiny_cache(method="fp"), backend=backend, dummy_weights=False, cuda_graph=False)
    together = steps(engine, [engine.prefill(text) for text in texts], [random_ids(4, seed=9)] * 3)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def test_backends_and_forms_agree(folder: Path, config: ModelConfig) -> None:
    """Weights as they are stored, and expanded; and the cache that is packed."""
    ids = random_ids(200)
    cache = tiny_cache(method="plain", key_bits=4.0, value_bits=4.0)
    engines = [tiny_engine(folder, cache, backend=backend, dummy_weights=False) for backend in ("reference", "numba")]
    found = [engine.nll(ids) for engine in engines]
    assert float((found[0] - found[1]).abs().max()) < 0.05
    shapes = expected_shapes(config).values()
    assert config.num_parameters == sum(map(prod, shapes))
    matrices, vectors = (sum(prod(shape) for shape in shapes if len(shape) == n) for n in (2, 1))
    held = form_of("numba", torch.device("cpu"), torch.float32).held_bytes(SafetensorsSource(folder))
    assert held == engines[1].parts.model.weights.nbytes == 2 * matrices + 4 * vectors


def test_what_a_step_leaves_unread(config: ModelConfig) -> None:
    source, form = DummySource(config), form_of("reference", torch.device("cpu"), torch.bfloat16)
    assert config.experts is not None
    d, f, e = config.hidden_size, config.intermediate_size, config.experts
    idle = config.num_layers * (e.count - e.chosen) * 3 * d * f + config.vocab_size * d
    assert form.idle_bytes(source) == 2 * idle
    table = config.vocab_size * d  # embedding and head
    assert config.active_parameters == config.num_parameters - 2 * table - (idle - table)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_gguf_file_is_held_as_it_is_stored(tmp_path: Path, kind: str) -> None:
    """Experts of one matrix in the file are blocks in memory, and what comes out is what the expanded weights give."""
    file = gguf_model(tmp_path / "m.gguf", QWEN, kind)
    ids = random_ids(40)
    engines = [
        tiny_engine(file, tiny_cache(method="fp"), backend=backend, dummy_weights=False) for backend in ("reference", "numba")
    ]
    mlp: Any = engines[1].parts.model.weights.layers[0].mlp
    assert isinstance(mlp.experts.gate_up.matrix, BlockMatrix) and isinstance(mlp.experts.down.matrix, BlockMatrix)
    found = [engine.logits(ids) for engine in engines]
    assert float((found[0] - found[1]).norm()) < 2e-3 * float(found[0].norm())
    rows = [steps(engine, [engine.prefill(ids[:20])], [ids[20:]]) for engine in engines]
    assert float((rows[0] - rows[1]).norm()) < 2e-3 * float(rows[0].norm())


def test_experts_that_are_not_stored_alike_are_held_as_float16(tmp_path: Path) -> None:
    """As plans count them."""
    weights = {name: t.bfloat16() for name, t in random_weights(MIXTRAL).items()}
    odd = "model.layers.0.mlp.experts.3.up_proj.weight"
    weights[odd] = weights[odd].half()
    source = SafetensorsSource(with_tokenizer(write_checkpoint(tmp_path, MIXTRAL, weights)))
    form = form_of("numba", torch.device("cpu"), torch.float32)
    kept = form._kept(source)
    assert kept[odd] == kept["model.layers.0.mlp.experts.0.gate_proj.weight"] == "torch.float16"
    assert {kept[f"model.layers.{name}_proj.weight"] for name in ("0.mlp.experts.3.down", "1.mlp.experts.3.up")} == {
        "torch.bfloat16"
    }
    engine = tiny_engine(tmp_path, tiny_cache(method="fp"), backend="numba", dummy_weights=False)
    layers: Any = engine.parts.model.weights.layers
    assert [layer.mlp.experts.gate_up.matrix.data.dtype for layer in layers] == [torch.float16, torch.bfloat16]
    assert engine.parts.model.weights.nbytes == form.held_bytes(source)
    other = tiny_engine(tmp_path, tiny_cache(method="fp"), dummy_weights=False)
    ids = random_ids(30)
    torch.testing.assert_close(engine.logits(ids), other.logits(ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"num_experts_per_tok": 9, "num_experts": 8}, ["9 of 8 experts"]),
        ({"num_experts": 0}, ["num_experts", "0"]),
        ({"num_experts": 40000}, ["8 of 40000 experts", "1,024"]),
        ({"hidden_size": 72}, ["from 72"]),
        ({"mlp_only_layers": [1]}, ["mlp_only_layers"]),
        ({"decoder_sparse_step": 2}, ["decoder_sparse_step"]),
        ({"moe_intermediate_size": 12}, ["12 channels"]),
    ],
)
def test_what_cannot_be_is_one_line(fields: dict[str, Any], fragments: list[str]) -> None:
    base = {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "vocab_size": 320, "moe_intermediate_size": 48,
    }  # fmt: skip
    refused(lambda: parse_config(Fields(base | fields, "config.json")), "config.json", *fragments)


def test_mixtral_without_its_head_or_what_is_usual() -> None:
    """Saved alone, its names begin with ``layers``; without a theta it is that of its authors."""
    found = canonical_names(
        ["norm.weight", "layers.1.block_sparse_moe.experts.4.w3.weight", "layers.0.block_sparse_moe.gate.weight"]
    )
    assert list(found.values())[1:] == ["model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.0.mlp.gate.weight"]
    for kind in (MixtralConfig, Qwen3MoeConfig, GlmConfig):
        theirs = kind(num_hidden_layers=2)
        data = {"model_type": theirs.model_type, "num_hidden_layers": 2}
        data |= {key: getattr(theirs, key) for key in ("hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")}
        ours = parse_config(Fields(data, "config.json"))
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"] and ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    weights = random_weights(MIXTRAL)
    del weights["model.layers.1.mlp.experts.4.up_proj.weight"]
    refused(lambda: SafetensorsSource(write_checkpoint(tmp_path, MIXTRAL, weights)), "1 missing", "experts.4.up_proj")
