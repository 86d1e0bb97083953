"""A model of a real architecture with random weights, for costs where no model can be downloaded.

Its tokenizer knows the countdown example's characters and fills the vocabulary up with names, so that the engine may
sample every token of the vocabulary, as it would for a real model. Responses run to the limit.

Example:
    python -m benchmarks.random_model runs/qwen3-0.6b
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.countdown.tokenizer import CHARACTERS, CHAT_TEMPLATE, EOS, PAD


def build_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token per character of the example, and those that verl's prompt builder for this architecture looks up."""
    known = [PAD, EOS, *CHARACTERS, "\n", "<|im_end|>"]
    names = [*known, *(f"<{i}>" for i in range(len(known), size))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, chat_template=CHAT_TEMPLATE, model_max_length=32768
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=151936)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        head_dim=128,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.folder)
    build_tokenizer(args.vocabulary).save_pretrained(args.folder)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in {args.folder}")


if __name__ == "__main__":
    main()
