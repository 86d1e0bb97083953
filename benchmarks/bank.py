"""Memory and speed of the prefix bank at scale: one step puts the prefixes of a later step and takes its own.

Example:
    python -m benchmarks.bank --prompts 512 --samples 8 --tokens 4096 --lag 64    # needs 9 GB
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from benchmarks.report import machine
from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.prefixes.prefix import Prefix


def put_step(bank: PrefixBank, step: int, prompts: int, samples: int, tokens: int) -> float:
    """Seconds to store a step's prefixes, without the making of their arrays."""
    made = [
        Prefix(np.full(tokens, step, np.int32), np.full(tokens, -1.0, np.float32), ((step, tokens),))
        for _ in range(prompts * samples)
    ]
    started = time.perf_counter()
    for i, prefix in enumerate(made):
        bank.put(step * prompts + i // samples, i % samples, prefix)
    return time.perf_counter() - started


def take_step(bank: PrefixBank, step: int, prompts: int) -> float:
    """Seconds to take a step's prefixes out again."""
    started = time.perf_counter()
    taken = [bank.take(step * prompts + i) for i in range(prompts)]
    seconds = time.perf_counter() - started
    assert all(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512, help="prompts a step")
    parser.add_argument("--samples", type=int, default=8, help="mixed samples a prompt")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a prefix")
    parser.add_argument("--lag", type=int, default=64, help="steps that are held")
    args = parser.parse_args()
    shape = args.prompts, args.samples, args.tokens

    process, bank = psutil.Process(), PrefixBank()
    before = process.memory_info().rss
    for step in tqdm(range(args.lag), desc="filling", unit="step"):
        put_step(bank, step, *shape)
    held = args.lag * args.prompts * args.samples * args.tokens
    memory = process.memory_info().rss - before
    puts, takes = [], []
    for step in tqdm(range(args.lag, args.lag + 20), desc="steady state", unit="step"):
        puts.append(put_step(bank, step, *shape))
        takes.append(take_step(bank, step - args.lag, args.prompts))
    started = time.perf_counter()
    size = (len(bank), bank.nbytes)
    count_seconds = time.perf_counter() - started

    small = PrefixBank()
    put_step(small, 0, *shape)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        small.save(Path(folder) / "bank.npz", {}, 0, {})
        save_seconds = time.perf_counter() - started
        started = time.perf_counter()
        PrefixBank.load(Path(folder) / "bank.npz")
        load_seconds = time.perf_counter() - started

    command = f"--prompts {args.prompts} --samples {args.samples} --tokens {args.tokens} --lag {args.lag}"
    print(f"`python -m benchmarks.bank {command}`, on {machine()}:\n")
    print(f"- {size[0]:,} prefixes, {held / 1e9:.2f} G tokens, {size[1] / 1e9:.2f} GB of arrays")
    print(f"- memory of the process: {memory / held:.2f} bytes a token")
    print(f"- a step's {args.prompts * args.samples:,} prefixes: put {1e3 * np.median(puts):.1f} ms, "
          f"take {1e3 * np.median(takes):.1f} ms; size of the bank {1e6 * count_seconds:.0f} us")  # fmt: skip
    step_gb = args.prompts * args.samples * args.tokens * 8 / 1e9
    print(f"- a checkpoint, per step held ({step_gb:.2f} GB): save {save_seconds:.2f} s, load {load_seconds:.2f} s")


if __name__ == "__main__":
    main()
