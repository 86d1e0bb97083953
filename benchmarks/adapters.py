"""What past adapters cost a step's generation, against lookahead: both in one engine of vLLM, in turns.

A step's 128 samples, half of them mixed, are sampled in three ways: unmixed; as `lookahead`, whose 64 prefixes for
later steps are sampled beside the samples; and as `placement=shared`, where 1, 2 or 4 past adapters sample the prefixes
first, and each sample goes on when its own is there. Every round does all of them, in a new order; ratios are taken
within a round. There is no trainer and no agent loop: only the engine does another thing.

Example:
    python -m benchmarks.adapters --rounds 15
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import interval, machine
from verl_ext.cpu import CPU_ENV
from verl_ext.historical_policy.snapshots import ADAPTER_FILES

BASE = Path(__file__).parents[1] / "examples/countdown/base_model"
RESULT = Path(__file__).parent / "results" / "adapters.md"
SAMPLES, MIXED, PROMPT, RESPONSE, PREFIX = 128, 64, 9, 14, 8
"""As in the countdown example: samples of a step, mixed ones, tokens of a prompt and a response, longest prefix."""
PAST = (1, 2, 4)


def write_adapters(folder: Path, count: int, rank: int) -> list[Path]:
    """Write random adapters for all linear layers of the example's model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = []
    for number in range(count):
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        peft = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        folders.append(folder / f"version_{number}")
        peft.save_pretrained(str(folders[-1]))
    return folders


class Step:
    """Samples a step's responses in one of the ways.

    Args:
        engine: vLLM's.
        adapters: a request for the current one, and for each past one.
    """

    def __init__(self, engine: Any, adapters: list[Any]) -> None:
        self._engine, (self._current, *self._past) = engine, adapters
        rng = np.random.default_rng(0)
        self._prompts = rng.integers(5, 15, (SAMPLES, PROMPT)).tolist()
        self._lengths = rng.integers(1, PREFIX + 1, MIXED).tolist()
        self._requests = 0

    def _add(self, name: str, ids: list[int], tokens: int, adapter: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=tokens, ignore_eos=True, logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        self._engine.add_request(name, {"prompt_token_ids": ids}, params, lora_request=adapter)
        self._requests += 1

    def _run(self, begin: Callable[[], None], after: Callable[[Any], None]) -> tuple[float, int]:
        self._engine.reset_prefix_cache()
        self._requests, started = 0, time.perf_counter()
        begin()
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                after(output)
        return time.perf_counter() - started, self._requests

    def unmixed(self) -> tuple[float, int]:
        return self._run(lambda: self._rest(0), lambda output: None)

    def _rest(self, first: int) -> None:
        for i in range(first, SAMPLES):
            self._add(f"sample {i}", self._prompts[i], RESPONSE, self._current)

    def lookahead(self) -> tuple[float, int]:
        def begin() -> None:
            for i, length in enumerate(self._lengths):
                self._add(f"later {i}", self._prompts[i], length, self._current)
                self._go_on(i, self._prompts[i][:length])  # what was sampled some steps ago
            self._rest(MIXED)

        return self._run(begin, lambda output: None)

    def _go_on(self, i: int, prefix: list[int]) -> None:
        self._add(f"sample {i}", self._prompts[i] + prefix, RESPONSE - len(prefix), self._current)

    def shared(self, past: int) -> tuple[float, int]:
        def begin() -> None:
            for i, length in enumerate(self._lengths):
                self._add(f"prefix {i}", self._prompts[i], length, self._past[i % past])
            self._rest(MIXED)

        def after(output: Any) -> None:
            kind, number = output.request_id.split()
            if kind == "prefix":
                self._go_on(int(number), list(output.outputs[0].token_ids))

        return self._run(begin, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of which the first one does not count")
    parser.add_argument("--rank", type=int, default=4, help="of the adapters")
    args = parser.parse_args()
    for key in (key for key in CPU_ENV if key.startswith("VLLM_")):
        os.environ.setdefault(key, CPU_ENV[key])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in this process: on a shared machine others come between
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory() as folder:
        folders = write_adapters(Path(folder), 1 + max(PAST), args.rank)
        kept = sum((folders[0] / name).stat().st_size for name in ADAPTER_FILES)
        slots = {"max_loras": 1 + max(PAST), "max_cpu_loras": 2 + max(PAST), "max_lora_rank": max(args.rank, 8)}
        llm = LLM(
            str(BASE),
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            enable_lora=True,
            distributed_executor_backend="uni",
            **slots,
        )
        requests = [LoRARequest(f"v{i}", 1000 + i, str(place)) for i, place in enumerate(folders)]
        step = Step(llm.llm_engine, requests)
        ways: dict[str, Callable[[], tuple[float, int]]] = {"unmixed": step.unmixed, "lookahead": step.lookahead}
        ways |= {f"shared, past adapters: {past}": lambda past=past: step.shared(past) for past in PAST}
        rng, seconds, asked = np.random.default_rng(0), {name: [] for name in ways}, {}
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for name in rng.permutation(list(ways)):
                taken, asked[name] = ways[name]()
                seconds[name].append(taken)
    whole = (BASE / "model.safetensors").stat().st_size
    lines = [
        "# What past adapters cost an engine\n",
        f"`{shlex.join(['python', '-m', 'benchmarks.adapters', *sys.argv[1:]])}`, on {machine()}.\n",
        f"{SAMPLES} samples of {RESPONSE} tokens, {MIXED} of them with a prefix of 1 to {PREFIX}; ratios within each",
        f"of {args.rounds - 1} rounds, median and 95 % interval. A past version of rank {args.rank} takes",
        f"{kept / 1e3:.0f} kB, the whole model {whole / 1e3:.0f} kB. The engine has {slots['max_loras']} slots",
        "in every row.\n",
        "| way | requests | seconds, median | to lookahead |\n|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        ratios = [own / other for own, other in zip(taken[1:], seconds["lookahead"][1:], strict=True)]
        middle, low, high = interval(ratios)
        ratio = "1" if name == "lookahead" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {asked[name]} | {np.median(taken[1:]):.2f} | {ratio} |")
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
