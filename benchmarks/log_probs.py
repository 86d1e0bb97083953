"""Log-probs without flash-attn: in pieces (verl_ext/logits_in_pieces.py) against verl's token by token, in pairs.

Values and gradient of one micro-batch, of random logits; the two take turns. On a GPU, if there is one.

    python -m benchmarks.log_probs
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from verl.utils import torch_functional

from benchmarks.report import interval, machine
from verl_ext.logits_in_pieces import log_probs_in_pieces

RESULT = Path(__file__).parent / "results" / "log_probs.md"
ON_CPU = [(20, 4096), (4096, 2048), (49152, 512)]
ON_GPU = [(20, 4096), (49152, 8192), (151936, 8192)]
"""Vocabulary, and tokens of a micro-batch."""
BY_TOKEN: Callable[..., torch.Tensor] = torch_functional.logprobs_from_logits_v2
BY_TOKEN = getattr(BY_TOKEN, "__wrapped__", BY_TOKEN)  # verl's own, whether or not ours has replaced it
IN_PIECES = log_probs_in_pieces(BY_TOKEN)


def seconds(function: Callable[..., torch.Tensor], logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Of values and gradient."""
    own = logits.clone().requires_grad_()
    _wait()
    started = time.perf_counter()
    function(own, labels).sum().backward()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    sizes, types = ON_GPU if device == "cuda" else ON_CPU, (torch.float32, torch.bfloat16)
    cases = [(*size, dtype) for size in sizes for dtype in types]
    for vocabulary, tokens, dtype in tqdm(cases):
        logits = torch.randn(tokens, vocabulary, dtype=dtype, device=device)
        labels = torch.randint(vocabulary, (tokens,), device=device)
        # The first pair warms up.
        pairs = [[seconds(each, logits, labels) for each in (BY_TOKEN, IN_PIECES)] for _ in range(args.pairs + 1)][1:]
        verls = interval([by_token for by_token, _ in pairs])[0]
        middle, low, high = interval([in_pieces / by_token for by_token, in_pieces in pairs])
        kind = str(dtype).removeprefix("torch.")
        rows.append(f"| {vocabulary:,} | {tokens:,} | {kind} | {verls:.3f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    head = "| vocabulary | tokens | type | token by token, s | in pieces / token by token |\n|---|---|---|---|---|"
    text = f"`python -m benchmarks.log_probs`, {args.pairs} pairs, medians with 95 % intervals, on {machine()}:"
    RESULT.write_text("\n".join(["# Log-probs without flash-attn\n", f"{text}\n", head, *rows, ""]))
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
