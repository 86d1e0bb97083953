"""Seconds that a snapshot keeps the trainer waiting, and seconds until it is written, with random weights on the host.

`before` is what the engine did at first: a copy in fp32, packed and stored shard by shard while the trainer waits.
On a GPU the copy goes to pinned memory instead; what follows it is the same.

Example:
    python -m benchmarks.snapshot_write --layers 16    # 0.4 G parameters, needs 7 GB
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
import torch
from safetensors.torch import save
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.report import machine
from verl_ext.historical_policy.writing import stage, write_shards

Weights = dict[str, torch.Tensor]
Seconds = tuple[float, float]
"""On the trainer's path, and until everything is written."""


def random_weights(layers: int) -> Weights:
    """Of the Qwen3-0.6B shape, in fp32, as verl trains them."""
    config = Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Qwen3ForCausalLM(config).named_parameters()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def before(weights: Weights, shard_bytes: int, folder: Path | None) -> Seconds:
    started = time.perf_counter()
    pending: Weights = {}
    size, written = 0, []

    def flush() -> None:
        data = save(pending)
        if folder is None:
            written.append(ray.put(data))
        else:
            path = folder / f"{len(written):05d}.safetensors"
            path.write_bytes(data)
            written.append(path)

    for name, tensor in weights.items():
        pending[name] = tensor.to("cpu", copy=True)
        size += tensor.nbytes
        if size >= shard_bytes:
            flush()
            pending, size = {}, 0
    flush()
    seconds = time.perf_counter() - started
    return seconds, seconds


def after(weights: Weights, shard_bytes: int, folder: Path | None, dtype: torch.dtype) -> Seconds:
    with ThreadPoolExecutor(1) as thread:
        started = time.perf_counter()
        staged = stage(weights.items(), dtype)
        writing = thread.submit(write_shards, staged, shard_bytes, folder)
        on_path = time.perf_counter() - started
        writing.result()
        return on_path, time.perf_counter() - started


WAYS: dict[str, Callable[[Weights, int, Path | None], Seconds]] = {
    "before, fp32": before,
    "after, fp32": lambda *args: after(*args, dtype=torch.float32),
    "after, bf16": lambda *args: after(*args, dtype=torch.bfloat16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard-megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    weights, shard_bytes = random_weights(args.layers), args.shard_megabytes << 20
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    ray.init(address="local", num_cpus=1, object_store_memory=round(1.3 * nbytes), include_dashboard=False)
    rows = []
    for storage in ("memory", "disk"):
        seconds: dict[str, list[Seconds]] = {name: [] for name in WAYS}
        # In turn, so that what else the machine does falls on all of them.
        for repeat in tqdm(range(args.repeats + 1), desc=storage):
            for name, way in WAYS.items():
                with tempfile.TemporaryDirectory() as folder:
                    measured = way(weights, shard_bytes, Path(folder) if storage == "disk" else None)
                if repeat > 0:  # the first one makes Ray's memory
                    seconds[name].append(measured)
        for name, pairs in seconds.items():
            cells = []
            for values in zip(*pairs, strict=True):
                cells.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            ratio = statistics.median(old[0] / new[0] for old, new in zip(seconds["before, fp32"], pairs, strict=True))
            rows.append(f"| {storage} | {name} | {' | '.join(cells)} | {1 / ratio:.2f} |")
    command = f"--layers {args.layers} --shard-megabytes {args.shard_megabytes} --repeats {args.repeats}"
    print(f"`python -m benchmarks.snapshot_write {command}`, on {machine()}:\n")
    print(
        f"{nbytes / 4e6:.0f} M parameters, {nbytes / 1e9:.2f} GB in fp32; medians of {args.repeats}, and their range.\n"
    )
    print("| storage | | the trainer waits, s | until written, s | waits, of before |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
