"""All data of a run, loaded and rendered before any process group or engine starts, since its errors are cheap here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from urllib.parse import parse_qsl

from transformers import PreTrainedTokenizerBase

from nemo_ssopd.config import Config
from nemo_ssopd.data.demo import CorpusExample, demo_corpus
from nemo_ssopd.data.prompts import load_prompts
from nemo_ssopd.data.templates import load_tokenizer, render_student, stop_token_ids
from nemo_ssopd.types import Prompt, RenderedPrompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """What a run reads. `supervised` is for SFT, `train` for every other recipe; the other one is empty.

    Prompts are rendered here, since their lengths are checked; supervised examples when a step takes them.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    train: tuple[RenderedPrompt, ...]
    supervised: tuple[Prompt | CorpusExample, ...]
    eval: tuple[RenderedPrompt, ...]


def load_data(config: Config) -> RunData:
    """ValueError, with file, row, field and remedy, for anything that cannot be used."""
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    is_sft = config.algorithm.name == "sft"
    return RunData(
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(tokenizer, config.model.path),
        train=() if is_sft else _rendered("data.train", config.data.train, config, tokenizer),
        supervised=_supervised(config) if is_sft else (),
        eval=_rendered("data.eval", config.data.eval, config, tokenizer) if config.data.eval else (),
    )


def _rendered(name: str, source: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[RenderedPrompt, ...]:
    """Problems with the student's tokens. Prompts over rollout.max_prompt_tokens are left out, and counted."""
    need_solution = name == "data.train" and config.algorithm.distils and config.algorithm.witness == "solution"
    prompts = load_prompts(source, config.data, need_solution=need_solution)
    rendered = [RenderedPrompt(prompt, render_student(tokenizer, prompt, config.data)) for prompt in prompts]
    kept = tuple(prompt for prompt in rendered if len(prompt.tokens) <= config.rollout.max_prompt_tokens)
    limit = f"rollout.max_prompt_tokens={config.rollout.max_prompt_tokens}"
    if not kept:
        raise ValueError(f"{name}={source!r}: every one of its {len(rendered)} prompts is over {limit}; raise it")
    if len(kept) < len(rendered):
        logger.warning("%s: left out %d of %d prompts, over %s", name, len(rendered) - len(kept), len(rendered), limit)
    return kept


def _supervised(config: Config) -> tuple[Prompt | CorpusExample, ...]:
    """A file's problems with their reference solutions, or the demo task's corpus (corpus:NAME?count=N&seed=S)."""
    source = config.data.train
    if not source.startswith("corpus:"):
        return tuple(load_prompts(source, config.data, need_solution=True))
    name, _, query = source.removeprefix("corpus:").partition("?")
    options = {"count": "20000", "seed": "1", **dict(parse_qsl(query))}
    return tuple(demo_corpus(int(options["count"]), int(options["seed"]), name))
