"""One step of scripts/gpu_report.py, in a process of its own: python -m benchmarks.gpu_report.stage MODULE:FUNCTION ...

The function gets a `Results` and adds to it. Every result is on disk when `add` returns, so a step that hangs, crashes
or is killed later loses nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = ("nemo_ssopd", "benchmarks", "tests", "scripts")
VERSIONED = ("torch", "triton", "transformer_engine", "megatron.core", "vllm", "transformers", "liger_kernel", "numba")


@dataclass(frozen=True)
class Results:
    """Where a step writes its results: one JSON object a line.

    >>> results.add("hidden states, relative error", 0.004, below=0.02)
    """

    device: str
    """cuda, or cpu for a trial of the same code at tiny sizes."""
    folder: Path
    """For files that later steps read. Removed when the report ends."""
    path: Path

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    def add(
        self, name: str, value: Any, unit: str = "", *, below: float | None = None, above: float | None = None
    ) -> None:
        """Write one result. With a limit it counts as passed or failed; NaN is failed."""
        row: dict[str, Any] = {"name": name, "value": value, "unit": unit}
        if below is not None:
            row |= {"limit": f"< {below:g}", "ok": value < below}
        if above is not None:
            row |= {"limit": f"> {above:g}", "ok": value > above}
        self._write({"result": row})

    def check(self, name: str, value: Any, expected: Any) -> None:
        """Write a result that must equal what is expected."""
        self._write(
            {"result": {"name": name, "value": value, "unit": "", "limit": f"= {expected}", "ok": value == expected}}
        )

    def skip(self, name: str, reason: str) -> None:
        """Name what is not measured, and why."""
        self._write({"result": {"name": name, "skipped": reason}})

    def end(self, status: str, reason: str = "") -> None:
        self._write({"status": status, "reason": reason, "machine": versions()})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line, default=float) + "\n")


def versions() -> dict[str, str]:
    """The card, and the versions of what this process has imported: nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            found[name] = str(module.__version__)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found |= {"card": torch.cuda.get_device_name(), "CUDA of torch": str(torch.version.cuda)}
    return found


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package that is not installed; None where part of an installed one, or of ours, is missing: a failure."""
    name = error.name or ""
    return name if name and "." not in name and name not in OURS else None


def join_alone() -> None:
    """Set torchrun's variables for a world of one process, over the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def run(call: str, arguments: list[str], results: Results) -> int:
    """Call MODULE:FUNCTION; the exit code. A missing package is a reason to skip, any other error a failure."""
    module, _, function = call.partition(":")
    try:
        getattr(importlib.import_module(module), function)(results, *arguments)  # noqa: TID251 -- a step of ours
        results.end("done")
        return 0
    except Exception as error:  # the report goes on with the next step, and shows this one's error
        traceback.print_exc()
        package = missing_package(error) if isinstance(error, ModuleNotFoundError) else None
        if package:
            results.end("skipped", f"{package} is not installed")
            return 0
        results.end("failed", f"{type(error).__name__}: {str(error).strip() or 'no message'}")
        return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", metavar="MODULE:FUNCTION")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    join_alone()
    code = run(arguments.call, arguments.arguments, Results(arguments.device, arguments.folder, arguments.results))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without destructors of process groups and engines, which may wait for ever after an error


if __name__ == "__main__":
    main()
