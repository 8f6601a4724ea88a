"""Verifier throughput under load, beside plain sequential math-verify: `python benchmarks/verifier.py [--answers N]`.

The batch is what training produces: groups of completions to one gold, a third right, a third another problem's answer,
a third a wrong expression that only sympy can tell; 1 % of the answers are hostile. The sequential baseline is
math-verify as its README calls it, `verify(parse(gold), parse(completion))` with its own timeouts, in one process, over
a random sample of the same batch: all of it would take too long. Agreement is measured on every gold answer: against
itself, and against other golds of its set, by string code and by sympy. Rewrites its section of docs/benchmarks.md.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from nemo_ssopd.rollout.verifier import MathVerifier, Verdict

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
START, END = "<!-- verifier:start -->", "<!-- verifier:end -->"
HOSTILE_SHARE = 0.01
GROUP_SIZE = 8
BATCHES = 10

_SEQUENTIAL = """
import json, sys, time
from math_verify import parse, verify
seconds = []
for completion, gold in json.load(sys.stdin):
    started = time.monotonic()
    try:
        verify(parse("$" + gold + "$"), parse(completion))
    except BaseException:
        pass
    seconds.append(time.monotonic() - started)
print(json.dumps({"seconds": seconds, "cpu": time.process_time()}))
"""


def make_batch(answers: int, seed: int) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    sets = json.loads((DATA / "verifier_golds.json").read_text())
    hostile = [json.loads(line) for line in (DATA / "verifier_hostile.jsonl").read_text().splitlines()]
    completions: list[str] = []
    golds: list[str] = []
    while len(completions) < answers:
        gold = rng.choice(sets[rng.choice(["gsm8k", "math500"])])
        for _ in range(GROUP_SIZE):
            if rng.random() < HOSTILE_SHARE:
                row = rng.choice(hostile)
                completions.append(f"Attempt {rng.random()}. {row['completion']}")
                golds.append(row["gold"])
                continue
            other = rng.choice(sets["math500"])
            answer = rng.choice([gold, other, rf"{rng.randrange(1, 999)}+\frac{{{gold}}}{{{rng.randrange(2, 99)}}}"])
            completions.append(f"We think step by step. {rng.random()} So it is $\\boxed{{{answer}}}$.")
            golds.append(gold)
    return completions[:answers], golds[:answers]


def family_rss_mb(pid: int) -> tuple[int, float]:
    """Number of processes below `pid`, and their proportional memory."""
    found = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    count, total = len(found), 0.0
    for child in found:
        rollup = Path(f"/proc/{child}/smaps_rollup").read_text()
        total += int(rollup.split("Pss:")[1].split()[0]) / 1024
        below = family_rss_mb(child)
        count, total = count + below[0], total + below[1]
    return count, total


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for: unlike wall-clock time, the same on a busy machine."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_pool(completions: list[str], golds: list[str], workers: int) -> tuple[list[Verdict], float, float, list[str]]:
    """Verdicts, wall-clock seconds, CPU seconds with the start of the pool, and a line after each tenth."""
    log, verdicts, elapsed = [], [], 0.0
    cpu_before = cpu_seconds()
    size = -(-len(completions) // BATCHES)
    with MathVerifier(workers=workers) as verifier:
        verifier.grade([r"\boxed{\frac12}"] * workers, ["0.5"] * workers)
        for start in range(0, len(completions), size):
            started = time.monotonic()
            verdicts += verifier.grade(completions[start : start + size], golds[start : start + size])
            elapsed += time.monotonic() - started
            count, memory = family_rss_mb(os.getpid())
            own = psutil.Process().memory_info().rss / 2**20
            log.append(f"{len(verdicts)}: {count} processes, {memory:.0f} MB, and {own:.0f} MB here")
            print(log[-1], f"{elapsed:.1f} s", flush=True)
    left, _ = family_rss_mb(os.getpid())
    log.append(f"closed: {left} processes")
    assert left == 0, "the pool left processes behind"
    return verdicts, elapsed, cpu_seconds() - cpu_before, log


def run_sequential(completions: list[str], golds: list[str], sample: int) -> tuple[list[float], float]:
    """Wall-clock seconds of each answer, and CPU seconds of the process."""
    chosen = random.Random(1).sample(range(len(completions)), sample)
    rows = json.dumps([[completions[i], golds[i]] for i in chosen])
    done = subprocess.run([sys.executable, "-c", _SEQUENTIAL], input=rows, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    return result["seconds"], result["cpu"]


def agreement(workers: int, shuffles: int) -> str:
    """Rows of a table: per set, how golds verify against themselves and against others; then the hostile answers."""
    sets = json.loads((DATA / "verifier_golds.json").read_text())
    hostile = [json.loads(line) for line in (DATA / "verifier_hostile.jsonl").read_text().splitlines()]
    lines = []
    with MathVerifier(workers=workers) as verifier:
        for name, golds in sets.items():
            own = verifier.grade([rf"So $\boxed{{{gold}}}$." for gold in golds], golds)
            unusable = verifier.check_golds(golds)
            wrong = accepted = 0
            for seed in range(shuffles):
                others = random.Random(seed).sample(golds, len(golds))
                pairs = [(other, gold) for other, gold in zip(others, golds, strict=True) if other != gold]
                verdicts = verifier.grade([rf"So $\boxed{{{other}}}$." for other, _ in pairs], [g for _, g in pairs])
                wrong, accepted = wrong + len(pairs), accepted + sum(verdict.reward == 1 for verdict in verdicts)
            right = sum(verdict.reward == 1 for verdict in own)
            lines.append(f"| {name} | {len(golds)} | {right} | {len(golds) - len(unusable)} | {accepted} of {wrong} |")
        slowest, as_expected = 0.0, 0
        for row in hostile:
            started = time.monotonic()
            [verdict] = verifier.grade([row["completion"]], [row["gold"]])
            slowest = max(slowest, time.monotonic() - started)
            refused = row["may_refuse"] and verdict.reward == 0
            as_expected += refused or (verdict.reward == 1) == row["expected"]
    return "\n".join(
        [*lines, "", f"Hostile answers: {as_expected} of {len(hostile)} as expected, slowest {slowest:.1f} s."]
    )


def write_section(text: str) -> None:
    page = ROOT / "docs" / "benchmarks.md"
    old = page.read_text() if page.exists() else "# Benchmarks\n"
    if START not in old:
        old = f"{old.rstrip()}\n\n{START}\n{END}\n"
    before, after = old.split(START)[0], old.split(END)[1]
    page.write_text(f"{before}{START}\n{text}{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sequential", type=int, default=2000, help="answers given to the sequential baseline")
    parser.add_argument("--shuffles", type=int, default=12, help="other golds that each gold is compared with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()

    completions, golds = make_batch(arguments.answers, arguments.seed)
    verdicts, elapsed, pool_cpu, log = run_pool(completions, golds, arguments.workers)
    seconds, sequential_cpu = run_sequential(completions, golds, min(arguments.sequential, arguments.answers))
    reasons = Counter(verdict.reason for verdict in verdicts)
    graded, pool_rate, sequential_rate = len(verdicts), len(verdicts) / elapsed, len(seconds) / sum(seconds)
    text = f"""## Verifier

`python benchmarks/verifier.py --answers {arguments.answers} --workers {arguments.workers}`: groups of {GROUP_SIZE}
completions, {HOSTILE_SHARE:.0%} hostile, {os.cpu_count()} CPU cores, load average {os.getloadavg()[0]:.1f} at the end.

| | answers | seconds | answers/s | CPU ms per answer | slowest answer |
|---|---|---|---|---|---|
| `MathVerifier`, {arguments.workers} workers | {graded} | {elapsed:.1f} | {pool_rate:.0f} \
| {pool_cpu / graded * 1e3:.1f} | limit: 1.5 s of CPU |
| sequential math-verify (sample) | {len(seconds)} | {sum(seconds):.1f} | {sequential_rate:.0f} \
| {sequential_cpu / len(seconds) * 1e3:.1f} | {max(seconds):.1f} s |

Seconds depend on what else the machine does (see the load average); CPU time hardly does.

Reasons: {", ".join(f"{reason} {count}" for reason, count in reasons.most_common())}.
After each tenth (answers graded: processes below this one, their proportional memory, and the resident set of this
one, which keeps all verdicts): {"; ".join(log)}.

| distinct golds of | golds | right in a box | equal to themselves for sympy | other golds accepted |
|---|---|---|---|---|
{agreement(arguments.workers, arguments.shuffles)}
"""
    print(text)
    if not arguments.no_write:
        write_section(text)


if __name__ == "__main__":
    main()
