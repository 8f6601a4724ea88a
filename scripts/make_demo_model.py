"""Write the demo model's directory: config, character tokenizer, chat template; random weights when a seed is given.

python scripts/make_demo_model.py --output assets/demo_model              # what the repository ships, no weights
python scripts/make_demo_model.py --output out/random_model --seed 1      # with untrained weights
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
CHARACTERS = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace) | {" "}))

# Qwen3's own template, without tools and system turns: thinking of earlier turns is dropped, and disabled thinking
# means an empty block that the model continues from.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' and not loop.last and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1] %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character; unknown characters raise. As in Qwen3, think marks are not
    special tokens."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *THINK, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))  # not in the vocabulary: raises
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in THINK])
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def name_tokenizer_class(tokenizer_config: Path) -> None:
    """Write a class name that transformers 4 and 5 both know; by default 5 writes one that 4 does not know."""
    fields = json.loads(tokenizer_config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_config.write_text(json.dumps(fields, indent=2) + "\n")


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Make a config of 0.31 M parameters, with two key-value heads and an even vocabulary for tensor parallelism."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer) + len(tokenizer) % 2,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        dtype="float32",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, help="also write random weights, drawn with this seed")
    arguments = parser.parse_args()

    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    tokenizer.save_pretrained(arguments.output)
    name_tokenizer_class(arguments.output / "tokenizer_config.json")
    config.save_pretrained(arguments.output)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
        Qwen3ForCausalLM(config).save_pretrained(arguments.output)
    GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id).save_pretrained(arguments.output)
    print(f"wrote {arguments.output}: {config.vocab_size} tokens, weights: {arguments.seed is not None}")


if __name__ == "__main__":
    main()
