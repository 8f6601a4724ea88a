"""Metrics that own their reduction.

A stage returns `Metrics`: keys `area/name`, and values that can join the same metric of another micro-batch, stage or
rank. Averages are never averaged: a mean stays a sum and a count until it is written.

>>> micro_batches = [{"loss/entropy": Mean(2.0, 4)}, {"loss/entropy": Mean(0.5, 1)}]
>>> merge(*micro_batches)["loss/entropy"].value()
0.5
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

Number: TypeAlias = float | torch.Tensor
"""A value on the host, or a scalar tensor on the device until `fetch` copies it to the host."""


@dataclass(frozen=True)
class Sum:
    """A sum, such as a count of tokens."""

    total: Number

    def join(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True)
class Mean:
    """A mean: the sum `total` over `count` samples, tokens or other items. Without items it is NaN.

    >>> Mean(3.0, 4).join(Mean(1.0, 1)).value()
    0.8
    """

    total: Number
    count: Number

    def join(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        return float(self.total / self.count) if self.count else math.nan


@dataclass(frozen=True)
class Max:
    """The largest value; also used for values that all ranks share, such as the gradient norm. NaN beats numbers."""

    x: Number

    def join(self, other: Max) -> Max:
        return Max(math.nan if math.isnan(self.x) or math.isnan(other.x) else max(self.x, other.x))

    def value(self) -> float:
        return float(self.x)


@dataclass(frozen=True)
class Min:
    """The smallest value. NaN beats numbers."""

    x: Number

    def join(self, other: Min) -> Min:
        return Min(math.nan if math.isnan(self.x) or math.isnan(other.x) else min(self.x, other.x))

    def value(self) -> float:
        return float(self.x)


@dataclass(frozen=True)
class EffectiveShare:
    """(sum w)^2 / (n sum w^2) of n importance weights: the effective sample size as a share of n, 1 for equal weights
    (Kong 1992, "A Note on Importance Sampling using Standardized Weights"). Without weights it is NaN.

    >>> EffectiveShare(1.0, 1.0, 1).join(EffectiveShare(2.0, 4.0, 1)).value()  # weights 1 and 2
    0.9
    """

    weights: Number
    squares: Number
    count: Number

    def join(self, other: EffectiveShare) -> EffectiveShare:
        return EffectiveShare(self.weights + other.weights, self.squares + other.squares, self.count + other.count)

    def value(self) -> float:
        return float(self.weights**2 / (self.count * self.squares)) if self.count else math.nan


Metric: TypeAlias = Sum | Mean | Max | Min | EffectiveShare
Metrics: TypeAlias = dict[str, Metric]


def merge(*parts: Mapping[str, Metric]) -> Metrics:
    """Join the metrics of micro-batches, stages or ranks, key by key; a part may lack keys.

    ValueError when parts give a key different reductions, or for a key that is not area/name.
    """
    merged: Metrics = {}
    for part in parts:
        for key, metric in part.items():
            check_key(key)
            if key not in merged:
                merged[key] = metric
            elif type(merged[key]) is type(metric):
                merged[key] = merged[key].join(metric)  # type: ignore[arg-type]
            else:
                raise ValueError(f"{key} is both {merged[key]} and {metric}: give it one reduction everywhere")
    return merged


def fetch(parts: Iterable[Mapping[str, Metric]]) -> list[Metrics]:
    """Copy all device values to the host in one transfer, so that the device is waited for only once.

    >>> fetch([{"loss/entropy": Mean(torch.tensor(2.0), 4)}, {"optim/lr": Max(0.1)}])
    [{'loss/entropy': Mean(total=2.0, count=4)}, {'optim/lr': Max(x=0.1)}]
    """
    parts = list(parts)
    numbers = [number for part in parts for metric in part.values() for number in vars(metric).values()]
    waiting = [number.detach().double() for number in numbers if isinstance(number, torch.Tensor)]
    values = iter(torch.stack(waiting).tolist() if waiting else ())

    def on_host(metric: Metric) -> Metric:
        return type(metric)(*(next(values) if isinstance(n, torch.Tensor) else n for n in vars(metric).values()))

    return [{key: on_host(metric) for key, metric in part.items()} for part in parts]


def countable(reason: str) -> str:
    """Return the part of a reason before its colon, as a name to count by: the rest may differ every time.

    >>> countable("error: KeyError (rewards.py, line 3): 'tests'")
    'error'
    """
    return re.sub(r"[^\w .-]", "_", reason.partition(":")[0].strip(), flags=re.ASCII)[:40]


def check_key(key: str) -> None:
    area, _, name = key.partition("/")
    if not area or not name:
        raise ValueError(f"metric key {key!r} is not area/name, such as loss/entropy")


def reduce_across_ranks(metrics: Mapping[str, Metric], group: dist.ProcessGroup | None) -> Metrics:
    """Join the metrics of all ranks of `group`, in rank order, on every rank; None means this process alone.

    Tensor-parallel peers hold the same numbers, and a sum must count them once: pass the data-parallel group, or empty
    metrics from all peers except one. The objects travel on the CPU, so the group needs a gloo backend.
    """
    if group is None:
        return merge(metrics)
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, dict(metrics), group=group)
    return merge(*parts)
