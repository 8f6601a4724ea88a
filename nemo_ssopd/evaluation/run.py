"""Evaluate one model on every set, on this worker: engine and grader, batches of problems, files, table.

Every rank runs the same code. Only the main process reads and writes the results.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nemo_ssopd.config.evaluation import EvalConfig
from nemo_ssopd.evaluation.data import EvalData, load_sets
from nemo_ssopd.evaluation.identity import identities
from nemo_ssopd.evaluation.merge import as_hugging_face, remove_merged
from nemo_ssopd.evaluation.models import ModelSource, find_model
from nemo_ssopd.evaluation.results import SetWriter, set_folder
from nemo_ssopd.evaluation.samples import Place, Sample, evaluate
from nemo_ssopd.evaluation.table import cells, column_headings, write_table
from nemo_ssopd.megatron.runtime import Runtime, initialize, shutdown
from nemo_ssopd.rollout.collector import RolloutCollector
from nemo_ssopd.rollout.engine import RolloutEngine
from nemo_ssopd.rollout.graders import Grader, build_grader
from nemo_ssopd.types import RenderedPrompt

MERGED = ".hf"  # a folder for merged weights in the model's folder, whose other folders are sets


def run(config: EvalConfig) -> None:
    """Evaluate the one model of `config` on its sets, except on those that are finished."""
    runtime = initialize(config.parallel, seed=config.evaluation.seed)
    [(name, path)] = config.models.items()
    source = find_model(path, base=config.base)
    data = load_sets(config, source.architecture)
    writers = open_writers(config, name, source, data) if runtime.is_main else {}
    open_sets = from_main(runtime, [chosen for chosen, writer in writers.items() if not writer.is_finished])
    if open_sets:
        grader = build_grader(config) if runtime.layout.tensor.rank == 0 else None
        merged = Path(config.run_dir) / name / MERGED
        folder = as_hugging_face(source, merged, config.parallel, runtime)
        collector = build_collector(config, str(folder), data, runtime, grader)
        for chosen in open_sets:
            evaluate_set(config, chosen, data.sets[chosen], collector, runtime, writers.get(chosen))
        if runtime.is_main:
            remove_merged(merged)
    if runtime.is_main:
        print_table(Path(config.run_dir))
    if open_sets:
        collector.close()
    shutdown()


def open_writers(config: EvalConfig, name: str, source: ModelSource, data: EvalData) -> dict[str, SetWriter]:
    """Open and check the files of every set, before the engine starts. Return a writer per set."""
    writers = {
        chosen: SetWriter(set_folder(config, name, chosen), about)
        for chosen, about in identities(config, source, data).items()
    }
    OmegaConf.save(OmegaConf.structured(config), Path(config.run_dir) / name / "config.yaml")
    return writers


def from_main(runtime: Runtime, value: Any) -> Any:
    """Broadcast the main process's value. Return it on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=runtime.cpu_group)
    return values[0]


def build_collector(
    config: EvalConfig, folder: str, data: EvalData, runtime: Runtime, grader: Grader | None
) -> RolloutCollector:
    """Build this rank's engine and the collector around it. `grader` is None except on a tensor group's first rank."""
    tensor = config.engine.tensor_in(config.parallel)
    return RolloutCollector(
        RolloutEngine(
            folder,
            replace(config.engine, tensor=tensor),
            dtype=config.dtype,
            max_model_len=config.max_prompt_tokens + config.evaluation.max_new_tokens,
            seed=config.evaluation.seed,
            trust_remote_code=config.trust_remote_code,
        ),
        grader,
        data.tokenizer,
        stop_token_ids=data.stop_token_ids,
        engine_tensor=tensor,
        group=runtime.layout.tensor_cpu_group,
    )


def evaluate_set(
    config: EvalConfig,
    chosen: str,
    prompts: Sequence[RenderedPrompt],
    collector: RolloutCollector,
    runtime: Runtime,
    writer: SetWriter | None,
) -> None:
    """Draw and grade the missing samples, batch by batch. `writer` is None except on the main process."""
    done: set[Place] = from_main(runtime, {sample.place for sample in writer.samples} if writer else None)
    fill_engines = max(1, config.engine.max_sequences // config.evaluation.samples) * runtime.layout.data.size
    batches = evaluate(
        collector,
        prompts,
        config.evaluation,
        dp_rank=runtime.layout.data.rank,
        dp_size=runtime.layout.data.size,
        cpu_group=runtime.cpu_group,
        batch=config.batch or fill_engines,
        done=done,
    )
    if writer is None:
        for _ in batches:
            pass
        return
    with SetProgress(title_of(config, chosen), len(prompts), config.evaluation.samples, writer.samples) as progress:
        for batch in batches:
            writer.append(batch)
            progress.show(writer.samples, batch)
    writer.finish(prompts, config.evaluation, title_of(config, chosen), threshold=config.reward.threshold)
    writer.close()


def print_table(run_dir: Path) -> None:
    """Write the table of all that run_dir holds, print it, and say where it is written."""
    rows, titles = write_table([run_dir], run_dir)
    table = Table(title="Avg@n in percent, 95 % interval", header_style="bold")
    for heading in ("", *column_headings(titles)):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(row.model, *cells(row, titles))
    console = Console()
    console.print(table)
    for name in ("table.md", "table.json", "table.png"):
        console.print(f"{name:>10}  {run_dir / name}", highlight=False, soft_wrap=True)


def title_of(config: EvalConfig, chosen: str) -> str:
    return config.chosen_sets[chosen].title or chosen


class SetProgress:
    """A display of problems done, Avg@n so far and tokens per second: a bar on a terminal, else a line per batch."""

    def __init__(self, title: str, problems: int, samples: int, done: Sequence[Sample]) -> None:
        self._title, self._problems, self._samples = title, problems, samples
        self._start, self._tokens = time.perf_counter(), 0
        self._console = Console()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=problems, figures="")
        self.show(done, ())

    def __enter__(self) -> SetProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: Sequence[Sample], new: Sequence[Sample]) -> None:
        """Show the progress. `done` are all samples so far, `new` those of the last batch."""
        self._tokens += sum(sample.tokens for sample in new)
        problems = len(done) // self._samples
        figures = "starting"
        if done:
            figures = f"Avg@{self._samples} {sum(sample.reward for sample in done) / len(done):.1%}"
        if self._tokens:
            figures += f"  {self._tokens / (time.perf_counter() - self._start):,.0f} tokens/s"
        self._progress.update(self._task, completed=problems, figures=figures)
        if not self._console.is_terminal:
            line = f"{self._title}  {problems}/{self._problems} problems  {figures}"
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)
