"""Follows verl's samples through its replay buffer, and counts those that never come (`missing_samples.py`).

verl's synchronous trainer goes on with the rest of the group of a sample that it dropped, the other one replaces the
whole group.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from recipe.soup.verl_adapter.missing_samples import MissingSamples
from verl_ext.failures import first_failure

NOTHING_LEFT = "no materializable trajectories"
"""In what verl raises where every sample of a step was lost."""


class LostSamples(MissingSamples):
    """Follows each prompt from the moment it is sent out until its group is trained on, filtered out or given up.

    Groups that verl filters out or replaces are not lost, only those of their samples that never came; padding rows
    were never asked for.

    Args:
        samples: of each prompt.
        per_step: samples that a step is to have.
        most: the largest share that a step may lose.

    Attributes:
        agents: verl's agent-loop workers, which know why samples were lost.
    """

    def __init__(self, samples: int, per_step: int, most: float) -> None:
        super().__init__(per_step, most, lambda: first_failure(self.agents))
        self._samples = samples
        self._under_way: dict[str, int] = {}
        self._step = 0
        self.agents: list[Any] = []

    def send(self, batch: TensorDict) -> None:
        """Prompts are sent out."""
        uids = list(batch["uid"])
        counts = list(batch["__rollout_n__"]) if "__rollout_n__" in batch else [self._samples] * len(uids)
        self._under_way.update((str(uid), int(count)) for uid, count in zip(uids, counts, strict=True))

    def resume(self, queue: dict[str, dict]) -> None:
        """Take over the groups of a checkpoint that only wait to be trained on, whole, whatever `samples` is now.

        Args:
            queue: verl's tags of prompts and samples, by key.
        """
        counted = self._sessions(key for key, tag in queue.items() if not tag.get("is_prompt"))
        waiting = [uid for uid, tag in queue.items() if tag.get("is_prompt") and tag["status"] == "finished"]
        self._under_way.update((uid, counted[uid]) for uid in waiting)

    @staticmethod
    def _sessions(keys: Iterable[str]) -> Counter[str]:
        """Count the samples of each prompt. A session may have several rows: `{uid}_{session}_{index}`."""
        return Counter(session.split("_")[0] for session in {key.rsplit("_", 1)[0] for key in keys})

    def watch(self, buffer: Any) -> None:
        """Count what comes through verl's `ReplayBuffer`; its `sample` then has our metrics, and may end the run.

        Raises:
            RunEndedError: from `sample`, as soon as the step has lost too much, or a validation everything.
        """
        clear_groups, materialize, sample = buffer._clear_groups, buffer._materialize_batch, buffer.sample

        def clear_and_count(partition_id: str, uids: set[str]) -> None:
            if partition_id == "train":
                self._settle(uids, buffer.partitions[partition_id])
            clear_groups(partition_id, uids)

        def materialize_and_count(partition_id: str, selected_prompt_uids: list[str], snapshot: dict) -> KVBatchMeta:
            if partition_id == "train":
                self._settle(selected_prompt_uids, snapshot)
            return materialize(partition_id, selected_prompt_uids, snapshot)

        def sample_and_count(*args: Any, global_steps: int, partition_id: str, **kwargs: Any) -> Any:
            self._step = global_steps
            try:
                batch, metrics = sample(*args, global_steps=global_steps, partition_id=partition_id, **kwargs)
            except RuntimeError as error:
                if NOTHING_LEFT in str(error):
                    self._settle(list(self._under_way), ())
                    self.none_left(f"Step {global_steps}")
                raise
            if partition_id != "train":
                if not batch.keys:
                    self.none_left(f"The validation after step {global_steps}")
                return batch, metrics
            trained = sum(not tag.get("is_padding", False) for tag in batch.tags)
            return batch, metrics | self.metrics(global_steps, trained)

        buffer._clear_groups, buffer._materialize_batch = clear_and_count, materialize_and_count
        buffer.sample = sample_and_count

    def _settle(self, uids: Iterable[str], keys: Iterable[str]) -> None:
        """No more samples of these prompts will come; `keys` are those that did, and others'."""
        counted = self._sessions(keys)
        asked = arrived = 0
        for uid in uids:
            expected = self._under_way.pop(uid, self._samples)  # of a resumed run: sent out by the one before
            asked += expected
            arrived += min(counted[uid], expected)
        self.add(self._step, asked, arrived)
