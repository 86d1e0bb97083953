"""The dump of training samples (`trainer.rollout_data_dir`): arrays on the step's path, text in the writer's thread.

verl's own makes texts and lists of every token before the step goes on. Here the step waits for one fetch only; verl's
writer, a thread, asks for the entries one by one, and writes the file that it always wrote.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

from transfer_queue import KVBatchMeta
from verl.utils.debug import marked_timer

from recipe.soup.algorithm.batch import NOBODY
from recipe.soup.errors import first_line
from recipe.soup.records.json_lines import writable
from recipe.soup.records.marks import marked
from recipe.soup.verl_adapter.step_state import Stage
from recipe.soup.verl_adapter.transfer_queue import fetch, without_padding
from verl_ext.health import ENDED

ARRAYS = ["prompts", "responses", "policy_versions", "prefix_mask", "old_log_probs", "advantages"]


class Column(Sequence[Any]):
    """One field of the dump, of which each entry is made when it is read.

    Args:
        rows: how many.
        make: the entry of a row; tensors may stay tensors, verl's writer turns them into numbers.
    """

    def __init__(self, rows: int, make: Callable[[int], Any]) -> None:
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: Any) -> Any:
        return self._make(row)


def writable_column(values: Sequence[Any]) -> Column:
    """A column of the dump, of which each entry is made writable when it is read."""
    return Column(len(values), lambda row: writable(values[row]))


def in_groups(batch: KVBatchMeta, most: int | None) -> KVBatchMeta:
    """The batch's samples without padding rows, each prompt's together and in order; at most so many.

    Prompts stand in the order of their uids, which are random: those that a cap leaves are a fair sample of them.
    """
    batch = without_padding(batch)
    places = [key.rsplit("_", 2) for key in batch.keys]
    order = sorted(range(len(places)), key=lambda i: (places[i][0], *map(int, places[i][1:])))[:most]
    return KVBatchMeta(
        partition_id=batch.partition_id, keys=[batch.keys[i] for i in order], tags=[batch.tags[i] for i in order]
    )


def columns(batch: KVBatchMeta, tokenizer: Any) -> dict[str, Any]:
    """What verl's writer takes, with what anyone needs to check our ratios; one entry per key, in the keys' order.

    Args:
        tokenizer: the writer's own.
    """
    data = fetch(batch, [*ARRAYS, "rm_scores", "reward_model"])
    arrays = {name: data[name].unbind() for name in ARRAYS}
    prompts, responses, prefix, advantages = (
        arrays[name] for name in ("prompts", "responses", "prefix_mask", "advantages")
    )
    graded = data.pop("reward_model", None)
    # Not verl's response mask, from which an update with loss_tokens=trained has taken more.
    sampled = [versions != NOBODY for versions in arrays["policy_versions"]]

    def column(make: Callable[[int], Any]) -> Column:
        return Column(len(batch), make)

    return {
        "inputs": column(lambda i: tokenizer.decode(prompts[i].tolist(), skip_special_tokens=True)),
        "outputs": column(lambda i: tokenizer.decode(responses[i].tolist(), skip_special_tokens=True)),
        "gts": [None] * len(batch) if graded is None else [item.get("ground_truth") for item in graded.tolist()],
        "scores": data["rm_scores"].sum(dim=1).tolist(),
        "reward_extra_infos_dict": {
            "uid": batch.keys,
            "prompt_ids": prompts,
            "response_ids": responses,
            "response_mask": column(lambda i: sampled[i].long()),
            "marked": column(lambda i: marked(tokenizer, *(a[i].tolist() for a in (responses, prefix, sampled)))),
            "prefix_length": column(lambda i: (prefix[i].bool() & sampled[i]).sum()),
            "demonstration_length": column(lambda i: (prefix[i].bool() & ~sampled[i]).sum()),
            "policy_versions": arrays["policy_versions"],
            "old_log_probs": arrays["old_log_probs"],
            # They differ with `baseline=two_level` only.
            "advantage": column(lambda i: advantages[i][sampled[i] | prefix[i].bool()][-1]),
            "prefix_advantage": column(lambda i: advantages[i][0]),
        },
    }


class DumpStage(Stage):
    """Every dump of a run."""

    def _init_dump_executor(self) -> None:
        super()._init_dump_executor()
        # A tokenizer that encodes in one thread can't decode in another ("Already borrowed").
        self._writers_tokenizer = copy.deepcopy(self.tokenizer)

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        with marked_timer("dump_rollout_generations", timing_raw, color="green"):
            dumped = columns(in_groups(batch, self.settings.dump_rows), self._writers_tokenizer)
            self._dump_generations(**dumped, dump_path=rollout_data_dir)

    def _write_generations(self, *args: Any) -> None:
        """verl's, in the writer's thread. What it raises stops the trainer at the next dump, or at the run's end."""
        inputs, outputs, gts, scores, told, folder, step = args
        if "score" in told:  # it stands in the place of the reward, also where a sample's reward told none
            told = told | {"score": [a if b is None else b for a, b in zip(scores, told["score"], strict=True)]}
        gts, *values = (writable_column(column) for column in (gts, *told.values()))
        try:
            super()._write_generations(inputs, outputs, gts, scores, dict(zip(told, values, strict=True)), folder, step)
        except Exception as error:
            reason = (
                f"The samples of step {step} could not be written to {folder}: {type(error).__name__}: "
                f"{first_line(error)}. Make room there, or name another folder (trainer.rollout_data_dir, "
                f"trainer.validation_data_dir; null: no samples). {ENDED}"
            )
            print(reason, file=sys.stderr, flush=True)
            raise RuntimeError(reason) from error

    def _finish_dumps(self) -> None:
        """Wait for the writer, however the run ended: verl does so at a regular end only, and Ray would kill it."""
        self._dump_executor.shutdown(wait=True)
