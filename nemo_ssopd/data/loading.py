"""Load and render all data of a run before any process group or engine starts, when an error is still cheap."""

from __future__ import annotations

import logging
from collections.abc import Sized
from dataclasses import dataclass
from urllib.parse import parse_qsl

from transformers import PreTrainedTokenizerBase

from nemo_ssopd.config.run import Config
from nemo_ssopd.data.demo import CorpusExample, demo_corpus
from nemo_ssopd.data.prompts import load_prompts
from nemo_ssopd.data.templates import load_tokenizer, render_sft, render_student, stop_token_ids
from nemo_ssopd.models.family import read_hf_config
from nemo_ssopd.types import Prompt, RenderedPrompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The data of a run. `supervised` is for SFT, `train` for every other recipe. The unused one is empty.

    Prompts are rendered already, since their lengths were checked. A step renders its supervised examples.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    train: tuple[RenderedPrompt, ...]
    supervised: tuple[Prompt | CorpusExample, ...]
    eval: tuple[RenderedPrompt, ...]


def load_data(config: Config) -> RunData:
    """Load all data of a run. ValueError, with file, row, field and remedy, for anything that cannot be used."""
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    is_sft = config.algorithm.name == "sft"
    return RunData(
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(tokenizer, config.model.path),
        train=() if is_sft else _rendered("data.train", config.data.train, config, tokenizer),
        supervised=_supervised(config, tokenizer) if is_sft else (),
        eval=_rendered("data.eval", config.data.eval, config, tokenizer) if config.data.eval else (),
    )


def _rendered(name: str, source: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[RenderedPrompt, ...]:
    """Return the problems with the student's tokens. Leave out, and count, prompts over rollout.max_prompt_tokens."""
    for_function = config.reward.function is not None
    need_solution = name == "data.train" and config.algorithm.distills and config.algorithm.witness == "solution"
    prompts = load_prompts(source, config.data, need_solution=need_solution, for_function=for_function)
    rendered = [RenderedPrompt(prompt, render_student(tokenizer, prompt, config.data)) for prompt in prompts]
    kept = tuple(prompt for prompt in rendered if len(prompt.tokens) <= config.rollout.max_prompt_tokens)
    _check_kept(
        f"{name}={source!r}", "prompts", rendered, kept, "rollout.max_prompt_tokens", config.rollout.max_prompt_tokens
    )
    return kept


def _supervised(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt | CorpusExample, ...]:
    """Return a file's problems with their reference solutions, or the demo corpus (corpus:NAME?count=N&seed=S).

    Problems of a file whose turn is longer than the model's context are left out, and counted.
    """
    source = config.data.train
    if source.startswith("corpus:"):
        name, _, query = source.removeprefix("corpus:").partition("?")
        options = {"count": "20000", "seed": "1", **dict(parse_qsl(query))}
        return tuple(demo_corpus(int(options["count"]), int(options["seed"]), name))
    for_function = config.reward.function is not None
    prompts = load_prompts(source, config.data, need_solution=True, for_function=for_function)
    context = read_hf_config(config.model.path).max_position_embeddings
    kept = tuple(prompt for prompt in prompts if len(render_sft(tokenizer, prompt, config.data)[0]) <= context)
    _check_kept(f"data.train={source!r}", "worked problems", prompts, kept, "max_position_embeddings", context)
    return kept


def _check_kept(where: str, what: str, given: Sized, kept: Sized, name: str, limit: int) -> None:
    """Warn how many were too long. ValueError if all were."""
    if not kept:
        raise ValueError(
            f"{where}: every one of its {len(given)} {what} is over {name}={limit}; raise it, or give shorter ones"
        )
    if len(kept) < len(given):
        logger.warning(
            "%s: left out %d of %d %s, over %s=%d", where, len(given) - len(kept), len(given), what, name, limit
        )
