"""What the dump of training samples costs a step: the seconds for which the trainer waits, and those of the writer.

The batch is synthetic, in a real TransferQueue with one storage unit; no model, no engine. While the writer works, the
trainer does what it does in a rollout: it waits, wakes up often, and looks.

Example:
    python -m benchmarks.dump --samples 1024 --tokens 2048
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
import verl.trainer.ppo.v1  # noqa: F401  (brings our trainers with it)
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from transformers import AutoTokenizer
from verl.utils import tensordict_utils as tu

from benchmarks.report import machine
from recipe.soup.settings import SoupSettings
from recipe.soup.verl_adapter.trainer import SoupTrainer

TOKENIZER = Path(__file__).parents[1] / "examples" / "countdown" / "base_model"
POLL_SECONDS = 0.002


def put_batch(samples: int, tokens: int, vocabulary: int) -> KVBatchMeta:
    """A batch of responses of `tokens` tokens each, in groups of 8; the first quarter is history."""
    rng = torch.Generator().manual_seed(0)
    keys = [f"{i // 8:08d}_{i % 8}_0" for i in range(samples)]
    lengths = [tokens] * samples

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (length,), generator=rng)

    fields = TensorDict(
        {
            "prompts": nested([ids(128) for _ in lengths]),
            "responses": nested([ids(n) for n in lengths]),
            "policy_versions": nested([torch.where(torch.arange(n) < n // 4, 3, 19) for n in lengths]),
            "prefix_mask": nested([(torch.arange(n) < n // 4).long() for n in lengths]),
            "old_log_probs": nested([-torch.rand(n, generator=rng) for n in lengths]),
            "advantages": nested([torch.full((n,), 0.5) for n in lengths]),
            "rm_scores": nested([(torch.arange(n) == n - 1).float() for n in lengths]),
        },
        batch_size=samples,
    )
    tu.assign_non_tensor_stack(fields, "uid", [key.split("_")[0] for key in keys])
    tu.assign_non_tensor_stack(fields, "reward_model", [{"ground_truth": "42", "style": "rule"} for _ in keys])
    tags = [{"seq_len": 128 + n} for n in lengths]
    tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    return KVBatchMeta(partition_id="train", keys=keys, tags=tags)


def bare_trainer() -> Any:
    """A trainer that has just what the dump needs."""
    trainer: Any = SoupTrainer.__new__(SoupTrainer)
    trainer.global_steps = 20
    trainer.settings = SoupSettings()
    trainer.tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    trainer._init_dump_executor()
    return trainer


def watch(trainer: Any) -> tuple[float, float]:
    """Poll until the writer is done: its seconds, and by how much a poll was late in the mean, in seconds."""
    started, late = time.perf_counter(), []
    while not all(future.done() for future in trainer._dump_futures):
        asleep = time.perf_counter()
        time.sleep(POLL_SECONDS)
        late.append(time.perf_counter() - asleep - POLL_SECONDS)
    return time.perf_counter() - started, float(np.mean(late)) if late else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024, help="in the batch")
    parser.add_argument("--tokens", type=int, default=2048, help="of each response")
    parser.add_argument("--times", type=int, default=5, help="dumps; the medians are shown")
    args = parser.parse_args()

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    trainer = bare_trainer()
    batch = put_batch(args.samples, args.tokens, len(trainer.tokenizer))
    fetches, waits, writes, lates = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.times + 1):  # the first warms up
            started = time.perf_counter()
            tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["prompts", "responses"])
            fetches.append(time.perf_counter() - started)
            started = time.perf_counter()
            trainer._log_rollout_data(batch, {}, folder)
            waits.append(time.perf_counter() - started)
            write, late = watch(trainer)
            writes.append(write)
            lates.append(late)
        size = (Path(folder) / "20.jsonl").stat().st_size
    trainer._shutdown_dump_executor()
    tq.close()
    ray.shutdown()

    fetch, wait, write, late = (np.median(values[1:]) for values in (fetches, waits, writes, lates))
    print(f"`python -m benchmarks.dump --samples {args.samples} --tokens {args.tokens}`, on {machine()}:\n")
    print(f"- the step waits {wait:.2f} s; fetching token ids alone takes {fetch:.2f} s")
    print(f"- the writer then takes {write:.1f} s for {size / 1e6:.0f} MB; meanwhile the trainer's thread is late by "
          f"{1e3 * late:.1f} ms each time that it wakes up")  # fmt: skip


if __name__ == "__main__":
    main()
