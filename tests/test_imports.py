"""Who may import whom: the layering that lets each file be read, and tested, without the ones above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemo_ssopd"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("megatron", "vllm", "nemo", "transformer_engine")

# Module prefix -> prefixes that it may not import. The first that matches a file decides.
FORBIDDEN = {
    "nemo_ssopd.types": ("nemo_ssopd", *HEAVY),
    "nemo_ssopd.metrics": ("nemo_ssopd", *HEAVY),
    "nemo_ssopd.models": ("nemo_ssopd", "torch", *HEAVY),
    "nemo_ssopd.config.run": (
        "nemo_ssopd.algo",
        "nemo_ssopd.data",
        "nemo_ssopd.megatron",
        "nemo_ssopd.rollout",
        "torch",
        *HEAVY,
    ),
    "nemo_ssopd.config.algorithm": ("nemo_ssopd", "torch", *HEAVY),
    "nemo_ssopd.examples": ("nemo_ssopd.megatron", "nemo_ssopd.rollout", *HEAVY),
    "nemo_ssopd.algo.groups": ("nemo_ssopd.megatron", "nemo_ssopd.rollout", *HEAVY),
    "nemo_ssopd.ops": ("nemo_ssopd.algo", "nemo_ssopd.data", "nemo_ssopd.megatron", "nemo_ssopd.rollout", *HEAVY),
    "nemo_ssopd.algo": (
        "nemo_ssopd.config.run",
        "nemo_ssopd.data",
        "nemo_ssopd.megatron",
        "nemo_ssopd.rollout",
        *HEAVY,
    ),
    "nemo_ssopd.data": ("nemo_ssopd.megatron", "nemo_ssopd.rollout", *HEAVY),
    "nemo_ssopd.config.evaluation": ("nemo_ssopd.megatron", "nemo_ssopd.rollout", *HEAVY),
    "nemo_ssopd.evaluation.samples": ("nemo_ssopd.megatron", "nemo_ssopd.rollout.engine", *HEAVY),
    "nemo_ssopd.evaluation.results": ("nemo_ssopd.megatron", "nemo_ssopd.rollout.engine", *HEAVY),
    "nemo_ssopd.evaluation.table": ("nemo_ssopd.megatron", "nemo_ssopd.rollout.engine", *HEAVY),
    "nemo_ssopd.rollout.engine": ("nemo_ssopd.megatron", "nemo_ssopd.data", "megatron"),
    "nemo_ssopd.rollout": ("nemo_ssopd.megatron", "nemo_ssopd.data", *HEAVY),
    "nemo_ssopd.megatron": ("nemo_ssopd.rollout", "vllm"),
}


def _module(path: Path) -> str:
    return ".".join(("nemo_ssopd", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_layering(path: Path) -> None:
    module = _module(path)
    forbidden = next((ban for prefix, ban in FORBIDDEN.items() if _is_under(module, prefix)), ())
    for name in _imports(path):
        folder = ".".join(module.split(".")[:2])
        if folder in ("nemo_ssopd.models", "nemo_ssopd.rollout") and _is_under(name, folder):
            continue
        assert not any(_is_under(name, prefix) for prefix in forbidden), f"{module} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_only_the_command_line_imports_the_loop(path: Path) -> None:
    if _module(path) != "nemo_ssopd.run.launch":
        assert not any(_is_under(name, "nemo_ssopd.train") for name in _imports(path))
