"""Trains countdown's base model by supervised learning on diverse, mostly wrong traces. Deterministic by seed.

A base model that is right on about an eighth of its samples, yet on most problems within sixteen tries, is what
reinforcement learning can sharpen, and what loses diversity while it does.

    python -m examples.countdown.build_base_model            # about six minutes on one core
"""

import argparse
import random
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.countdown.task import Problem, is_solution, random_problem, random_trace
from examples.countdown.tokenizer import build_tokenizer

HERE = Path(__file__).parent
IGNORED = -100


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about a third of a million parameters; 32 is the smallest head that vLLM's CPU kernels know."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=cast(int, tokenizer.eos_token_id),
            pad_token_id=cast(int, tokenizer.pad_token_id),
        )
    )


def training_pair(rng: random.Random, correct_share: float, numbers: int) -> tuple[str, str]:
    """Prompt and response: random arithmetic on the problem's numbers, made to hit the target now and then."""
    problem = random_problem(rng, numbers)
    response, value = random_trace(problem.numbers, rng)
    if rng.random() < correct_share:
        problem = Problem(problem.numbers, value)
    return problem.prompt, response


def collate(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded `input_ids` and `labels`, both (batch, length); the loss sees the response and its end only."""
    rows = []
    for prompt, response in pairs:
        prompt_ids = tokenizer(prompt)["input_ids"]
        response_ids = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt_ids + response_ids, [IGNORED] * len(prompt_ids) + response_ids))
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([target + [IGNORED] * (width - len(target)) for _, target in rows])
    return input_ids, labels


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], samples: int
) -> tuple[float, float]:
    """Accuracy of one sample at temperature 1, and the share of problems solved within `samples` tries."""
    hits = torch.zeros(len(problems), samples)
    for row, problem in enumerate(problems):
        ids = torch.tensor([tokenizer(problem.prompt)["input_ids"]] * samples)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=32)
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        hits[row] = torch.tensor([is_solution(problem, text) for text in texts], dtype=torch.float)
    return hits.mean().item(), hits.amax(dim=1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--correct-share", type=float, default=0.08, help="share of traces that are made correct")
    parser.add_argument("--numbers", type=int, default=3, help="numbers in a problem (3 or 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "base_model")
    args = parser.parse_args()

    torch.set_num_threads(1)  # sums in another order would give other weights
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.steps, pct_start=0.1)
    progress = tqdm(range(args.steps), desc="base model", unit="step")
    for _ in progress:
        pairs = [training_pair(rng, args.correct_share, args.numbers) for _ in range(args.batch_size)]
        input_ids, labels = collate(pairs, tokenizer)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    model.eval()  # torch's switch from training to sampling
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    held_out = random.Random(args.seed + 1)
    problems = [random_problem(held_out, args.numbers) for _ in range(200)]
    accuracy, pass_at_16 = evaluate(model, tokenizer, problems, samples=16)
    print(f"accuracy {accuracy:.3f}, solved within 16 tries {pass_at_16:.3f}; saved in {args.out}")


if __name__ == "__main__":
    main()
