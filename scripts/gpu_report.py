"""Test this project on a GPU in under six minutes: kernels, benchmark, actor, model, engine, the whole run.

    python scripts/gpu_report.py --output runs/gpu_report            # on a machine with a GPU; installs nothing
    python scripts/gpu_report.py --stages kernels actor --output DIR
    python scripts/gpu_report.py --device cpu --output DIR           # the same code at tiny sizes

Each step is a process with its own time limit, so it survives the failure of the one before. DIR/gpu_report.json and
DIR/gpu_report.md are written after every result; DIR/*.log hold the output of the steps. Steps that need a missing
package are skipped by name. The exit code is 1 when a step failed, was killed, or broke a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "benchmarks.gpu_report"
POLL_S = 0.2
SECONDS = 345.0  # under six minutes, with room for the last kill
CPU_FACTOR = 4.0  # multiplies the limits, for two busy cores instead of a GPU machine


@dataclass(frozen=True)
class Step:
    """One process of a stage. Limits are guesses until a GPU has run them.

    >>> Step("engine", "engine, merged refit", f"{PACKAGE}.engine:run", 75, ("merged",))
    """

    stage: str
    name: str
    call: str
    limit_s: float
    arguments: tuple[str, ...] = ()
    hides_gpu: bool = False
    runs_beside: bool = False
    """True: start the next step immediately, and wait for both."""


STEPS = (
    Step("kernels", "kernels", f"{PACKAGE}.kernels:run", 60),
    Step("benchmark", "benchmark", f"{PACKAGE}.ops:run", 70),
    Step("actor", "actor, float32 on the CPU", f"{PACKAGE}.actor:reference", 90, hides_gpu=True, runs_beside=True),
    Step("actor", "actor", f"{PACKAGE}.actor:policy", 70),
    Step("actor", "actor, local layers", f"{PACKAGE}.actor:local_layers", 50),
    Step("actor", "actor, compared", f"{PACKAGE}.actor:compare", 30),
    Step("model", "model", f"{PACKAGE}.model:run", 70),
    Step("engine", "engine, adapter refit", f"{PACKAGE}.engine:run", 130, ("adapter",)),
    Step("engine", "engine, merged refit", f"{PACKAGE}.engine:run", 110, ("merged",)),
    Step("run", "run, merged refit", f"{PACKAGE}.training:run", 110, ("merged", "first")),
    Step("run", "run, resumed with adapter refit", f"{PACKAGE}.training:run", 110, ("adapter", "second")),
)


@dataclass
class Report:
    """All results so far, on disk after every change. `steps` maps names to results, in the order of their start."""

    folder: Path
    machine: dict[str, str]
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return all(step["status"] in ("passed", "skipped") for step in self.steps.values())

    def write(self) -> None:
        content = {"machine": self.machine, "steps": self.steps}
        _replace(self.folder / "gpu_report.json", json.dumps(content, indent=1) + "\n")
        _replace(self.folder / "gpu_report.md", page(self.machine, self.steps))


@dataclass
class Running:
    """A running step: its process, and how far its results have been read."""

    step: Step
    process: subprocess.Popen[bytes]
    results: Path
    log: Path
    started: float
    deadline: float
    lines_read: int = 0
    ending: dict[str, Any] = field(default_factory=dict)
    """The last line that the step wrote: its status and the reason; empty before that."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options.output, {"card": card() if options.device == "cuda" else "none, on the CPU"})
    work = Path(tempfile.mkdtemp(prefix="gpu_report-"))
    end = time.monotonic() + options.seconds
    beside: list[Running] = []
    try:
        for number, step in enumerate(step for step in STEPS if step.stage in options.stages):
            if time.monotonic() >= end:
                report.steps[step.name] = {"status": "not reached", "reason": f"--seconds {options.seconds:g} are over"}
                report.write()
                continue
            beside.append(start(step, number, report, work, options.device, end))
            if not step.runs_beside:
                finish(beside, report)
                beside = []
        finish(beside, report)
    finally:
        for running in beside:
            kill(running)
        shutil.rmtree(work, ignore_errors=True)
    print(summary(report), flush=True)
    return 0 if report.is_good else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    stages = list(dict.fromkeys(step.stage for step in STEPS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, metavar="STAGE", help=", ".join(stages))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_report", metavar="DIR")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together (default: %(default)g)")
    return parser.parse_args(arguments)


def card() -> str:
    """Return name, memory and driver of the GPU, without creating a CUDA context in this process."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: nvidia-smi gives {type(error).__name__}"
    return answer.strip().splitlines()[0]


# ---- Processes -------------------------------------------------------------------------------------------------------


def start(step: Step, number: int, report: Report, work: Path, device: str, end: float) -> Running:
    """Start a step's process in its own session, so that everything that it starts can be killed with it."""
    results, log = (
        work / f"{number}.jsonl",
        report.folder / f"{number:02}_{step.name.replace(', ', '_').replace(' ', '_')}.log",
    )
    command = [sys.executable, "-m", f"{PACKAGE}.stage", step.call, *step.arguments]
    command += ["--device", device, "--folder", str(work), "--results", str(results)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if step.hides_gpu or device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    now = time.monotonic()
    report.steps[step.name] = {"status": "running", "reason": "", "seconds": 0.0, "results": []}
    report.write()
    limit_s = step.limit_s if device == "cuda" else CPU_FACTOR * step.limit_s
    return Running(step, process, results, log, now, min(now + limit_s, end))


def finish(beside: list[Running], report: Report) -> None:
    """Wait for steps that run at the same time; add results to the report as they arrive."""
    waiting = list(beside)
    while waiting:
        time.sleep(POLL_S)
        for running in list(waiting):
            ended = running.process.poll() is not None
            late = not ended and time.monotonic() >= running.deadline
            if late:
                kill(running)
            changed = read(running, report)
            if ended or late:
                kill(running)  # processes that the step left behind
                waiting.remove(running)
                conclude(running, report, late=late)
            if changed or ended or late:
                report.write()


def read(running: Running, report: Report) -> bool:
    """Move new whole lines of a step's results into the report; tell whether there were any."""
    text = running.results.read_text() if running.results.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()[running.lines_read :]
    running.lines_read += len(lines)
    for line in map(json.loads, lines):
        if "result" in line:
            report.steps[running.step.name]["results"].append(line["result"])
        else:
            running.ending = line
            report.machine |= {key: value for key, value in line["machine"].items() if key not in report.machine}
    return bool(lines)


def conclude(running: Running, report: Report, *, late: bool) -> None:
    """Write how a step ended, and print it."""
    entry = report.steps[running.step.name]
    code, ending = running.process.returncode, running.ending
    seconds = time.monotonic() - running.started
    broken = [row["name"] for row in entry["results"] if not row.get("ok", True)]
    if late:
        status, reason = "killed", f"it ran past its limit of {running.deadline - running.started:.0f} s"
    elif not ending:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        status, reason = "failed", f"{how} without a word: see {running.log.name}"
    elif ending["status"] != "done":
        status, reason = ending["status"], ending["reason"]
    else:
        status, reason = ("failed", f"limits broken: {'; '.join(broken)}") if broken else ("passed", "")
    entry |= {"status": status, "reason": reason, "seconds": round(seconds, 1)}
    print(f"{running.step.name}: {status}, {seconds:.0f} s {reason[:200]}", flush=True)


def kill(running: Running) -> None:
    try:
        os.killpg(running.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing of it is left
    running.process.wait()


# ---- Pages -----------------------------------------------------------------------------------------------------------


def page(machine: dict[str, str], steps: dict[str, dict[str, Any]]) -> str:
    """Return the report as a Markdown page for docs/."""
    about = ", ".join(f"{name} {version}" for name, version in machine.items() if name != "card")
    lines = ["# GPU report", "", f"Written by `scripts/gpu_report.py`. Card: {machine['card']}. {about}.", ""]
    for name, step in steps.items():
        seconds = f", {step['seconds']:.0f} s" if step.get("seconds") else ""
        lines += [
            f"## {name.capitalize()}",
            "",
            f"{step['status']}{seconds}{': ' if step['reason'] else ''}{step['reason']}",
            "",
        ]
        if step.get("results"):
            lines += ["| what | value | limit | |", "|---|---|---|---|", *map(_table_row, step["results"]), ""]
    return "\n".join(lines)


def _table_row(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"| {row['name']} | skipped: {row['skipped']} | | |"
    value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
    verdict = "" if "ok" not in row else "ok" if row["ok"] else "**broken**"
    return f"| {row['name']} | {value} {row['unit']} | {row.get('limit', '')} | {verdict} |"


def summary(report: Report) -> str:
    counts: dict[str, int] = {}
    for step in report.steps.values():
        counts[step["status"]] = counts.get(step["status"], 0) + 1
    return (
        f"{report.machine['card']}: {', '.join(f'{n} {status}' for status, n in counts.items())}; see {report.folder}"
    )


def _replace(path: Path, text: str) -> None:
    """Replace a file in one step, so that readers see the whole old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
