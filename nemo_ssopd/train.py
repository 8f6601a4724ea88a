"""The training run: one step, the loop, start and end. The only file that knows every stage.

    generate -> verify -> groups and advantages -> teacher pass -> optimizer step -> refit -> log

Every rank runs the same code. A tensor-parallel group works on the same prompts; each data-parallel rank has its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, TypeVar

import psutil
import torch.distributed as dist

from nemo_ssopd.algo.groups import group_metrics, is_uniform, kept_groups
from nemo_ssopd.algo.selection import is_correct
from nemo_ssopd.checkpoint.checkpoint import CheckpointError, CheckpointSaver, LoopState
from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import EvaluationConfig
from nemo_ssopd.convert.exporting import export_hf
from nemo_ssopd.data.loading import load_data
from nemo_ssopd.evaluation.samples import Sample, eval_metrics, evaluate, summary_of, write_samples
from nemo_ssopd.examples import rollout_examples, sft_examples
from nemo_ssopd.megatron.model import DTYPES
from nemo_ssopd.megatron.refit import refit
from nemo_ssopd.megatron.runtime import initialize, shutdown
from nemo_ssopd.megatron.weights import Rounding
from nemo_ssopd.metrics import Max, Mean, Metrics, Sum, merge, reduce_across_ranks
from nemo_ssopd.observe.model_card import model_card
from nemo_ssopd.observe.profiling import profiled
from nemo_ssopd.observe.report import print_summary, write_report
from nemo_ssopd.observe.sinks import Logger
from nemo_ssopd.observe.stages import StageTimer
from nemo_ssopd.rollout.collector import Sampling, request_seed
from nemo_ssopd.run.alarms import UnhealthyRun, check_health, spike_limit
from nemo_ssopd.run.signals import EXIT_STOPPED, note_stop_requests
from nemo_ssopd.run.stopping import TimeBudget, agree_to_stop
from nemo_ssopd.run.watchdog import Watch
from nemo_ssopd.setup import Trainer, build, longest_request, resume_or_begin, sinks
from nemo_ssopd.teacher import held_out_teacher_prompts, read_by_teacher
from nemo_ssopd.types import Completion, RenderedPrompt, Rollout, RolloutGroup, TokenSequence, TrainExample

Example = TypeVar("Example")


# ---- One step --------------------------------------------------------------------------------------------------------


def train_step(trainer: Trainer, step: int) -> Metrics:
    """Take the optimizer steps on one rollout batch. `step` steps were completed; it is the engine's policy version."""
    timer = StageTimer(trainer.watch.enter)
    sampled = sample_groups(trainer, step, timer)
    trainer.collector.engine.sleep()
    groups = kept_groups(sampled, trainer.prompts_per_rank)
    metrics = [group_metrics(sampled, trainer.config.algorithm)]
    metrics += [{"group/dropped_uniform": Sum(len(sampled) - len(groups))}]
    with timer.stage("score"):
        batches = [score(trainer, batch) for batch in split_evenly(groups, trainer.config.trainer.updates_per_step)]
    for examples, example_metrics in batches:
        with timer.stage("teacher"):
            examples = read_by_teacher(examples, trainer.policy)
        with timer.stage("update"):
            result = trainer.policy.update(examples, trainer.token_loss, trainer.aux_losses)
        metrics += [example_metrics, result.metrics]
    with timer.stage("refit"):
        refit(trainer.policy, trainer.collector.engine, trainer.config, policy_version=step + 1)
    return merge(*metrics, timer.metrics())


def sft_step(trainer: Trainer, step: int) -> Metrics:
    """Take one optimizer step of cross-entropy on written solutions."""
    timer = StageTimer(trainer.watch.enter)
    if trainer.optional_collector is not None:
        trainer.collector.engine.sleep()
    with timer.stage("data"):
        solved = local_share(trainer, trainer.data.supervised, step)
        examples = sft_examples(solved, trainer.config.data, trainer.data.tokenizer)
    with timer.stage("update"):
        result = trainer.policy.update(examples, trainer.token_loss)
    tokens = sum(sum(example.token_weights) for example in examples)
    return merge({"progress/tokens": Sum(tokens)}, result.metrics, timer.metrics())


# ---- Its stages, in order --------------------------------------------------------------------------------------------


def local_share(trainer: Trainer, examples: Sequence[Example], step: int, attempt: int = 0) -> list[Example]:
    """Return this data-parallel rank's share of the step's examples; attempts after the first use another order."""
    order, place = trainer.order, step
    if attempt:
        order = replace(order, seed=-1 - order.seed)
        place = step * trainer.config.algorithm.refills + attempt - 1
    indices = order.indices(place, trainer.config.trainer.prompts_per_step)
    return [examples[index] for index in indices[trainer.runtime.layout.data.rank :: trainer.runtime.layout.data.size]]


def sample_groups(trainer: Trainer, step: int, timer: StageTimer) -> list[RolloutGroup]:
    """Return this rank's graded groups. With refills, sample more prompts until enough groups are not uniform."""
    sampled: list[RolloutGroup] = []
    for attempt in range(1 + trainer.config.algorithm.refills):
        missing = trainer.prompts_per_rank - sum(not is_uniform(group) for group in sampled)
        if missing:
            with timer.stage("rollout"):
                completions = sample_completions(trainer, step, attempt, missing)
            with timer.stage("verify"):
                sampled += grade_groups(trainer, completions)
    write_rollouts(trainer, step, sampled)
    return sampled


def sample_completions(
    trainer: Trainer, step: int, attempt: int, count: int
) -> list[tuple[RenderedPrompt, list[Completion]]]:
    """Sample G completions for each of `count` prompts from the current policy."""
    config, G = trainer.config, trainer.config.rollout.group_size
    prompts = local_share(trainer, trainer.data.train, step, attempt)[:count]
    seed, use = config.trainer.seed, f"refill {attempt}" if attempt else "train"
    groups = trainer.collector.generate(
        [prompt.tokens for prompt in prompts],
        seeds=[[request_seed(seed, use, step, prompt.prompt.id, i) for i in range(G)] for prompt in prompts],
        sampling=Sampling(config.rollout.temperature, config.rollout.max_new_tokens),
    )
    assert all(completion.policy_version == step for group in groups for completion in group), "stale engine weights"
    return list(zip(prompts, groups, strict=True))


def grade_groups(trainer: Trainer, sampled: list[tuple[RenderedPrompt, list[Completion]]]) -> list[RolloutGroup]:
    """Grade all completions in one call; return them as groups, one per prompt."""
    completions = [completion for _, group in sampled for completion in group]
    problems = [prompt.prompt for prompt, group in sampled for _ in group]
    verdicts = iter(trainer.collector.grade(completions, problems))
    groups = []
    for prompt, group in sampled:
        rollouts = []
        for completion in group:
            verdict, sequence = next(verdicts), TokenSequence(prompt.tokens + completion.tokens, len(prompt.tokens))
            rollouts.append(Rollout(sequence, completion, verdict.reward, verdict.reason, verdict.answer))
        groups.append(RolloutGroup(prompt.prompt, tuple(rollouts), trainer.config.reward.threshold))
    return groups


def split_evenly(groups: Sequence[RolloutGroup], parts: int) -> list[Sequence[RolloutGroup]]:
    size = len(groups) // parts
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def score(trainer: Trainer, groups: Sequence[RolloutGroup]) -> tuple[list[TrainExample], Metrics]:
    """Make the examples of one optimizer step, with the log-probs that must be computed before the first update.

    With one update per step, the policy is still the one that sampled: its own log-probs, detached, are the old ones.
    """
    config, policy = trainer.config, trainer.policy
    examples, metrics = rollout_examples(
        groups, config, trainer.data.tokenizer, max_length=trainer.hf.max_position_embeddings
    )
    sequences = [example.sequence for example in examples]
    if config.trainer.updates_per_step > 1:
        old = policy.logprobs(sequences)
        examples = [replace(e, old_logprobs=logprobs) for e, logprobs in zip(examples, old, strict=True)]
    if config.algorithm.reference_kl > 0:
        with policy.reference():
            reference = policy.logprobs(sequences)
        examples = [replace(e, reference_logprobs=logprobs) for e, logprobs in zip(examples, reference, strict=True)]
    return examples, metrics


def write_rollouts(trainer: Trainer, step: int, groups: list[RolloutGroup]) -> None:
    """Write every completion and its verdict to run_dir/rollouts/, one file per step and data-parallel rank."""
    if not trainer.config.logging.save_rollouts or trainer.runtime.layout.tensor.rank != 0:
        return
    lines = [
        json.dumps(
            {
                "problem": group.prompt.id,
                "reward": rollout.reward,
                "correct": is_correct(rollout.reward, group.threshold),
                "reason": rollout.reason,
                "answer": rollout.answer,
                "tokens": rollout.sequence.completion_length,
                "finish_reason": rollout.completion.finish_reason,
                "text": rollout.completion.text,
            }
        )
        for group in groups
        for rollout in group.rollouts
    ]
    folder = Path(trainer.config.run_dir) / "rollouts"
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step + 1:06}_rank_{trainer.runtime.layout.data.rank:04}.jsonl").write_text(
        "\n".join(lines) + "\n"
    )


# ---- The loop --------------------------------------------------------------------------------------------------------


def run(trainer: Trainer, logger: Logger, saver: CheckpointSaver, budget: TimeBudget, state: LoopState) -> LoopState:
    """Take steps until trainer.max_steps, or until all ranks agree to stop; evaluate and save in between.

    Return the last state, which is saved. Logged step numbers count completed steps.
    """
    config, last = trainer.config.trainer, trainer.config.trainer.max_steps
    first = saved = state.step
    take_step = sft_step if trainer.config.algorithm.name == "sft" else train_step
    if config.eval_at_ends and trainer.data.eval and state.step == 0:
        logger.log(0, evaluate_policy(trainer, step=0))
    for step in range(first, last):
        if reason := agree_to_stop(budget, trainer.runtime.cpu_group, has_progressed=step > first):
            trainer.watch.enter("save")
            if saved < step:
                saver.save(state)
            saver.finish()
            if trainer.runtime.is_main:
                print(f"stopped after step {step} of {last}, saved: {reason}. Go on with trainer.resume=true")
            return state
        trainer.watch.enter("begin", step + 1)
        saver.check()
        trainer.policy.grad_norm_limit = spike_limit(state.recent_norms, config.spike_factor)
        with profiled(trainer.config, trainer.runtime, trainer.watch, step=step + 1):
            metrics = take_step(trainer, step)
        metrics = reduce_over_data_parallel(trainer, metrics)
        state = state.after(metrics)
        metrics = merge(metrics, progress_metrics(metrics, state))
        is_last = state.step == last
        if is_last and config.eval_at_ends or config.eval_every and state.step % config.eval_every == 0:
            metrics = merge(metrics, evaluate_policy(trainer, step=state.step))
        logger.log(state.step, metrics)
        check_health(metrics, trainer.config, step=state.step, skipped_in_a_row=state.skipped_in_a_row)
        score = metrics["eval/avg_at_n"].value() if "eval/avg_at_n" in metrics else None
        if is_last or config.save_every and state.step % config.save_every == 0 or saver.is_best(score):
            trainer.watch.enter("save")
            saver.save(state, score)
            saved = state.step
    return state


def reduce_over_data_parallel(trainer: Trainer, metrics: Metrics) -> Metrics:
    """Join the metrics of all data-parallel ranks, on every rank; tensor-parallel peers hold the same: one counts."""
    own = metrics if trainer.runtime.layout.tensor.rank == 0 else {}
    return reduce_across_ranks(own, trainer.runtime.cpu_group)


def progress_metrics(metrics: Metrics, state: LoopState) -> Metrics:
    seconds, tokens = metrics["time/step"].value(), metrics["progress/tokens"].value()
    return {
        "progress/step": Max(state.step),
        "progress/tokens_per_second": Max(tokens / seconds),
        "progress/total_tokens": Max(state.tokens),
        "optim/skipped_total": Max(state.skipped),
        "memory/rss_gib": Max(psutil.Process().memory_info().rss / 2**30),
    }


def evaluate_policy(trainer: Trainer, *, step: int) -> Metrics:
    """Measure Avg@n on the held-out problems and write every completion to run_dir/eval/; empty without data.eval."""
    if not trainer.data.eval:
        return {}
    timer = StageTimer(trainer.watch.enter)
    with timer.stage("eval"):
        if trainer.collector.engine.policy_version != step:  # SFT steps do not refit the engine
            refit(trainer.policy, trainer.collector.engine, trainer.config, policy_version=step)
        samples = held_out_samples(trainer, trainer.data.eval, trainer.config.evaluation)
        teacher = evaluate_teacher(trainer, samples, step=step)
    if trainer.runtime.is_main:
        write_samples(samples, Path(trainer.config.run_dir) / "eval" / f"step_{step:06}.jsonl")
    metrics = eval_metrics(summary_of(samples, trainer.config.evaluation, threshold=trainer.config.reward.threshold))
    return metrics | teacher | {"time/eval": timer.metrics()["time/eval"]}


def evaluate_teacher(trainer: Trainer, samples: Sequence[Sample], *, step: int) -> Metrics:
    """Measure how often the teacher, given the witness, solves problems on which the policy's `samples` are mixed."""
    config, engine = trainer.config, trainer.collector.engine
    if config.algorithm.name == "sft" or not config.trainer.teacher_samples:
        return {}
    prompts = held_out_teacher_prompts(
        samples, trainer.data.eval, config, trainer.data.tokenizer, max_length=longest_request(config)
    )
    if not prompts:
        return {"eval/teacher_problems": Max(0)}
    with trainer.policy.teacher():
        refit(trainer.policy, engine, config, policy_version=step)
    answers = held_out_samples(trainer, prompts, replace(config.evaluation, samples=config.trainer.teacher_samples))
    refit(trainer.policy, engine, config, policy_version=step)
    correct = sum(is_correct(answer.reward, config.reward.threshold) for answer in answers)
    return {
        "eval/teacher_problems": Max(len(prompts)),
        "eval/teacher_accuracy": Mean(correct, len(answers)),
    }


def held_out_samples(trainer: Trainer, prompts: Sequence[RenderedPrompt], evaluation: EvaluationConfig) -> list[Sample]:
    """Sample and grade completions with the weights in the engine; return all of them on every rank."""
    runtime = trainer.runtime
    [samples] = evaluate(
        trainer.collector,
        prompts,
        evaluation,
        dp_rank=runtime.layout.data.rank,
        dp_size=runtime.layout.data.size,
        cpu_group=runtime.cpu_group,
    )
    return samples


# ---- A whole run -----------------------------------------------------------------------------------------------------


def train(config: Config) -> int:
    """Run the whole training on this rank and return the exit code.

    An error ends the process; only one rank prints it, in one line.
    """
    budget = TimeBudget(config.trainer.time_budget_minutes)
    data = load_data(config)
    runtime = initialize(config.parallel, seed=config.trainer.seed, deterministic=config.trainer.deterministic)
    with Watch(
        config.run_dir,
        runtime.rank,
        runtime.world_size,
        limit_s=60 * config.parallel.timeout_minutes,
        expected=(ValueError, CheckpointError, UnhealthyRun),
    ) as watch:
        watch.enter("build")
        trainer = build(config, data, runtime, watch)
        state = resume_or_begin(trainer)
        note_stop_requests()  # again: modules imported since then may have set their own handlers
        with (
            Logger(sinks(config, state) if runtime.is_main else []) as logger,
            CheckpointSaver(trainer.policy, config) as saver,
        ):
            state = run(trainer, logger, saver, budget, state)
        if state.step < config.trainer.max_steps:
            leave_together(trainer)
        finish(trainer)
    shutdown()
    return 0


def finish(trainer: Trainer) -> None:
    """Export the model and write the report after the last step."""
    config, runtime, run_dir = trainer.config, trainer.runtime, Path(trainer.config.run_dir)
    if config.trainer.export:
        trainer.watch.enter("export")
        rounding, dtype = Rounding(), config.model.dtype
        export_hf(
            trainer.policy.weights(rounding),
            config.model.path,
            run_dir / "hf",
            runtime,
            dtype=DTYPES[dtype],
            card=lambda: model_card(config, config.trainer.max_steps, run_dir, dtype=dtype, rounding=rounding),
        )
    trainer.watch.enter("report")
    if runtime.is_main:
        write_report(run_dir)
        print_summary(run_dir)
    if trainer.optional_collector is not None:
        trainer.collector.close()


def leave_together(trainer: Trainer) -> NoReturn:
    """Exit immediately on all ranks, with EXIT_STOPPED.

    Synchronize first: srun kills the others once one rank has exited with this code. Grading processes end by
    themselves, when their pipe closes.
    """
    dist.barrier(group=trainer.runtime.cpu_group)
    trainer.watch.leave()
    sys.stdout.flush()
    os._exit(EXIT_STOPPED)
