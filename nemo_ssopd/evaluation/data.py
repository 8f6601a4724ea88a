"""The problems of an evaluation, with the tokens that the model reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nemo_ssopd.config.evaluation import EvalConfig, SetConfig
from nemo_ssopd.data.prompts import load_prompts
from nemo_ssopd.data.templates import load_tokenizer, render_student, stop_token_ids
from nemo_ssopd.types import RenderedPrompt


@dataclass(frozen=True)
class EvalData:
    """The problems of an evaluation, by set, with the tokenizer and its stop tokens.

    >>> load_sets(config, "models/Qwen3-8B").sets.keys()
    dict_keys(['aime_2024', 'aime_2025', 'hmmt_feb_2025'])
    """

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    sets: dict[str, tuple[RenderedPrompt, ...]]


def load_sets(config: EvalConfig, tokenizer_folder: str | Path) -> EvalData:
    """Load and render the problems of every chosen set. ValueError, with file, row, field and remedy, for bad data."""
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=config.trust_remote_code)
    return EvalData(
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(tokenizer, tokenizer_folder),
        sets={name: _rendered(name, chosen, config, tokenizer) for name, chosen in config.chosen_sets.items()},
    )


def _rendered(
    name: str, chosen: SetConfig, config: EvalConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[RenderedPrompt, ...]:
    """Return every problem of a set, rendered. ValueError if one is too long: dropping it would change the set."""
    data, limit = config.data_config(chosen), config.max_prompt_tokens
    try:
        prompts = load_prompts(chosen.source, data, for_function=config.reward.function is not None)
    except ValueError as error:
        message = re.sub(r"\bdata\.(problem_field|answer_field|split)\b", r"\1", str(error))
        raise ValueError(f"data: {message}{_offline_hint(name, chosen, config)}") from error
    rendered = tuple(RenderedPrompt(prompt, render_student(tokenizer, prompt, data)) for prompt in prompts)
    too_long = [prompt.prompt.id for prompt in rendered if len(prompt.tokens) > limit]
    if too_long:
        raise ValueError(
            f"data: {len(too_long)} prompts of {name}, {too_long[0]!r} among them, are over "
            f"max_prompt_tokens={limit}: raise it"
        )
    return rendered


def _offline_hint(name: str, chosen: SetConfig, config: EvalConfig) -> str:
    if name not in config.sets or chosen.source.endswith((".jsonl", ".parquet")) or chosen.source.startswith("demo:"):
        return ""
    return (
        f". Here: save the {chosen.split!r} split of {chosen.source} as a file with a problem and an answer in each "
        f"row, and give sets.{name}.source=FILE.jsonl (or .parquet)"
    )
