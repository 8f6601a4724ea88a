"""Tests marked `heavy` start processes, or import Megatron-Core or vLLM. `make test-fast` runs the others.

A test without the mark that does so fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported. Threads that wait for each other on busy cores made small sums forty times as slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LIGHT = "not heavy"
HEAVY_MODULES = ("megatron.core", "vllm")

_light: list[str] = []
"""The test without the mark that runs now."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import a file whose tests are all left out."""
    is_left_out = config.option.markexpr == LIGHT and collection_path.suffix == ".py"
    return True if is_left_out and "\npytestmark = pytest.mark.heavy\n" in collection_path.read_text() else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _light[:] = [] if item.get_closest_marker("heavy") else [item.nodeid]
    try:
        return (yield)
    finally:
        _light.clear()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    imported = [name for name in HEAVY_MODULES if name in sys.modules]
    assert item.config.option.markexpr != LIGHT or not imported, f"{item.nodeid}: {imported} is imported: mark it heavy"


def _refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    if _light and (event == "os.fork" or event == "subprocess.Popen" and arguments[0] == sys.executable):
        raise AssertionError(f"{_light[0]} starts a process: mark it heavy")


def _start(process: BaseProcess) -> None:
    _refuse_processes("os.fork", ())
    _start_process(process)


_start_process = BaseProcess.start
BaseProcess.start = _start  # type: ignore[method-assign]  # the server that forks for it raises no event here
sys.addaudithook(_refuse_processes)
