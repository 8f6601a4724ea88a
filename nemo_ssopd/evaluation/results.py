"""The files of one model on one set: what was evaluated, every sample as soon as it is graded, the summary at the end.

run_dir/MODEL/SET/evaluation.json    model, data, sampling: must be the same to continue
run_dir/MODEL/SET/samples.jsonl      one line per completion, appended batch by batch
run_dir/MODEL/SET/summary.json       written when the evaluation is finished
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_ssopd.config.evaluation import EvalConfig
from nemo_ssopd.config.sections import EvaluationConfig
from nemo_ssopd.evaluation.samples import Sample, read_samples, summary_of, to_lines
from nemo_ssopd.evaluation.statistics import average
from nemo_ssopd.metrics import countable
from nemo_ssopd.types import RenderedPrompt

IDENTITY, SAMPLES, SUMMARY = "evaluation.json", "samples.jsonl", "summary.json"
# Keys that may change: the same model and the same problems may be at another path.
_FREE = ("model.path", "model.kind", "data.source")


def set_folder(config: EvalConfig, model: str, chosen: str) -> Path:
    """Return the folder for the results of a model on a set."""
    return Path(config.run_dir) / model / chosen


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse to write into a folder that is not empty, unless `resume` is set."""
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds an evaluation: give another run_dir, or continue it with resume=true")


def has_begun(folder: Path) -> bool:
    return (folder / IDENTITY).exists()


def check_identity(folder: Path, now: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if `folder` holds the beginning of another evaluation than `now`."""
    before = json.loads((folder / IDENTITY).read_text())
    for section, values in now.items():
        for key, value in values.items():
            name, old = f"{section}.{key}", before.get(section, {}).get(key)
            if name not in _FREE and old != value:
                raise ValueError(
                    f"{folder} cannot be continued: {name} was {_short(old)} and is {_short(value)} now (from "
                    f"{before.get(section, {}).get('path' if section == 'model' else 'source', 'the config')}). "
                    f"Set it back, or give another run_dir"
                )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


class SetWriter:
    """The writer of the files of one model on one set, on the main process.

    `samples` are those on disk, without their texts. ValueError if another process writes to the same files, or if the
    folder holds another evaluation.
    """

    def __init__(self, folder: Path, about: Mapping[str, Mapping[str, Any]]) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._file = (folder / SAMPLES).open("a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder / SAMPLES} is being written by another process: end that one first") from None
        if has_begun(folder):
            check_identity(folder, about)
        else:
            _replace(folder / IDENTITY, about)
        self.samples = [replace(sample, text="") for sample in read_samples(folder / SAMPLES)]
        _cut_torn_line(folder / SAMPLES)

    @property
    def is_finished(self) -> bool:
        return (self._folder / SUMMARY).exists()

    def append(self, samples: Sequence[Sample]) -> None:
        """Append the samples to the file. They are on disk when this returns."""
        self._file.write(to_lines(samples))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.samples += [replace(sample, text="") for sample in samples]

    def finish(
        self, prompts: Sequence[RenderedPrompt], evaluation: EvaluationConfig, title: str, *, threshold: float
    ) -> dict[str, Any]:
        """Write the summary of all samples and return it."""
        by_place = {sample.place: sample for sample in self.samples}
        samples = [by_place[prompt.prompt.id, k] for prompt in prompts for k in range(evaluation.samples)]
        n = evaluation.samples
        rewards_PN = [[sample.reward for sample in samples[i : i + n]] for i in range(0, len(samples), n)]
        figures = summary_of(samples, evaluation, threshold=threshold)
        summary = {
            "title": title,
            "problems": len(prompts),
            "samples": n,
            "tokens": sum(sample.tokens for sample in samples),
            **{key.removeprefix("eval/"): asdict(value) for key, value in figures.items()},
            "reasons": dict(Counter(countable(sample.reason) for sample in samples).most_common()),
            "scores": dict(zip([p.prompt.id for p in prompts], average(rewards_PN).tolist(), strict=True)),
        }
        _replace(self._folder / SUMMARY, summary)
        return summary

    def close(self) -> None:
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Cut what follows the last newline: a line that an interrupted write left incomplete."""
    with path.open("rb+") as file:
        file.truncate(path.read_bytes().rfind(b"\n") + 1)


def _replace(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
