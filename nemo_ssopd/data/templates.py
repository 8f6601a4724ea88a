"""The only place where text becomes tokens: student prompts, teacher prompts and supervised examples.

Problems and witnesses are data, and a model wrote the witnesses: neither may end the user turn or open another.
So special-token strings (such as <|im_end|>) are removed from them before the chat template is applied. Sampled
tokens never come here: they are scored as they were sampled.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_ssopd.config.sections import DataConfig
from nemo_ssopd.data.demo import CorpusExample, Span
from nemo_ssopd.types import Prompt

THINK_MARKS = ("<think>", "</think>")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face directory. ValueError if it cannot be loaded or has no chat template."""
    if not Path(path).is_dir():
        raise ValueError(f"model.path: there is no directory {path}; give a Hugging Face model directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: no tokenizer in {path} ({error}); copy the model's tokenizer files there"
        ) from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"model.path: the tokenizer in {path} has no chat template; use an instruction-tuned model, or add a "
            f"chat_template.jinja to the directory"
        )
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> tuple[int, ...]:
    """Return the tokens that end a turn: the tokenizer's eos, then those that generation_config.json adds."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    generation_config = Path(path) / "generation_config.json"
    if generation_config.exists():
        eos = json.loads(generation_config.read_text()).get("eos_token_id")
        stops += eos if isinstance(eos, list) else [eos] if eos is not None else []
    if not stops:
        raise ValueError(f"model.path: neither the tokenizer nor generation_config.json in {path} names an eos token")
    return tuple(dict.fromkeys(stops))


def render_student(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, data: DataConfig) -> tuple[int, ...]:
    """Return the tokens that the policy reads, in training and when deployed."""
    user = _fill(data.student_template, problem=_as_data(tokenizer, prompt.problem))
    return _encode(tokenizer, _chat(tokenizer, user, data))


def render_teacher(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, witness_text: str, data: DataConfig
) -> tuple[int, ...]:
    """Return the privileged context (paper, eq. 5): the same problem with a correct solution in the user turn."""
    user = _fill(
        data.teacher_template,
        problem=_as_data(tokenizer, prompt.problem),
        witness=_as_data(tokenizer, witness_text, also=THINK_MARKS if data.strip_thinking else ()),
    )
    return _encode(tokenizer, _chat(tokenizer, user, data))


def render_sft(
    tokenizer: PreTrainedTokenizerBase, example: Prompt | CorpusExample, data: DataConfig
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return the tokens of a whole turn with its eos, and for each whether it is a target. The prompt never is.

    A `Prompt` gives its student prompt and its solution. A `CorpusExample` is taken verbatim.
    """
    masked_spans: tuple[Span, ...] = ()
    if isinstance(example, Prompt):
        assert example.solution is not None, example.id
        prompt_tokens = render_student(tokenizer, example, data)
        solution = _as_data(tokenizer, example.solution)
    else:
        prompt_tokens = _encode(tokenizer, _chat(tokenizer, example.user, data))
        solution, masked_spans = example.assistant, example.masked_spans
    encoded = tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True)
    is_target = [
        not any(start < span_end and span_start < end for span_start, span_end in masked_spans)
        for start, end in encoded["offset_mapping"]
    ]
    tokens = (*prompt_tokens, *encoded["input_ids"], tokenizer.eos_token_id)
    return tokens, (False,) * len(prompt_tokens) + (*is_target, True)


def _fill(template: str, **fields: str) -> str:
    """Fill in the fields in one pass. A {witness} inside a problem stays text, and so do other braces (\\boxed{})."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


def _chat(tokenizer: PreTrainedTokenizerBase, user: str, data: DataConfig) -> str:
    """Return one user turn and the opening of the assistant's. A template without enable_thinking ignores it."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=data.enable_thinking,
    )
    assert isinstance(text, str)
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokenize the text as it is. The chat template has already written the special tokens, even a leading bos."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _as_data(tokenizer: PreTrainedTokenizerBase, text: str, also: tuple[str, ...] = ()) -> str:
    """Return `text` without special-token strings and without those of `also`.

    Removal repeats until none is left, since it can join the two halves of another one: <|im_<|im_end|>end|>.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    marks = added | set(tokenizer.all_special_tokens) | set(also)
    while found := [mark for mark in marks if mark in text]:
        for mark in found:
            text = text.replace(mark, "")
    return text
