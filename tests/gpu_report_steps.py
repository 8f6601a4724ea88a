"""Steps of a GPU report that go wrong, for tests/test_gpu_report.py: each runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_report.stage import Results


def good(results: Results, value: str = "1.0") -> None:
    results.add("a number", float(value), "ms", below=2.0)
    results.skip("another", "it needs a rival")


def raises(results: Results) -> None:
    results.add("before", 1)
    raise ValueError("no such luck")


def hangs(results: Results, pid_file: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pid_file).write_text(str(child.pid))
    results.add("before", 1)
    child.wait()


def dies(results: Results) -> None:
    results.add("before", 1)
    os.abort()


def sees(results: Results) -> None:
    results.add("preload", os.environ["SOME_VARIABLE"])
    results.add("visible", os.environ.get("CUDA_VISIBLE_DEVICES"))
    results.add("path", os.environ["PYTHONPATH"].split(os.pathsep))


def leaves(results: Results) -> None:
    time.sleep(1.0)
    (results.folder / "left").write_text("for the next")


def finds(results: Results) -> None:
    results.check("left", (results.folder / "left").read_text(), "for the next")
