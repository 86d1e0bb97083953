"""Samples that were asked for and never came: counted in each step, told once, and above a share the run's end.

verl drops a sample whose generation or reward raised. Its synchronous trainer goes on with the rest of the group, the
other one replaces the whole group. Either way what is trained on is chosen by what the reward can score.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_ext.failures import first_failure
from verl_ext.health import ENDED, NOTICE

KEY = "algorithm.soup.max_lost_share"
NOTHING_LEFT = "no materializable trajectories"
"""In what verl raises where every sample of a step was lost."""


class TooManyLostError(RuntimeError):
    """A step lost a larger share of its samples than the settings allow."""


class LostSamples:
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
        self._samples, self._per_step, self._most = samples, per_step, most
        self._under_way: dict[str, int] = {}
        self._step = self._asked = self._arrived = 0
        self._error: str | None = None
        self._told = False
        self.agents: list[Any] = []

    def send(self, batch: TensorDict) -> None:
        """Prompts are sent out."""
        uids = list(batch["uid"])
        counts = list(batch["__rollout_n__"]) if "__rollout_n__" in batch else [self._samples] * len(uids)
        self._under_way.update((str(uid), int(count)) for uid, count in zip(uids, counts, strict=True))

    def watch(self, buffer: Any) -> None:
        """Count what comes through verl's `ReplayBuffer`; its `sample` then has our metrics, and may end the run.

        Raises:
            TooManyLostError: from `sample`, as soon as the step has lost too much.
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
            if partition_id != "train":
                return sample(*args, global_steps=global_steps, partition_id=partition_id, **kwargs)
            self._step = global_steps
            try:
                batch, metrics = sample(*args, global_steps=global_steps, partition_id=partition_id, **kwargs)
            except RuntimeError as error:
                if NOTHING_LEFT in str(error):
                    self._settle(list(self._under_way), ())
                raise
            return batch, metrics | self._metrics(batch)

        buffer._clear_groups, buffer._materialize_batch = clear_and_count, materialize_and_count
        buffer.sample = sample_and_count

    def _settle(self, uids: Iterable[str], keys: Iterable[str]) -> None:
        """No more samples of these prompts will come; `keys` are those that did, and others'."""
        # A session may have several rows: `{uid}_{session}_{index}`.
        arrived = Counter(session.split("_")[0] for session in {key.rsplit("_", 1)[0] for key in keys})
        for uid in uids:
            asked = self._under_way.pop(uid, self._samples)  # of a resumed run: sent out by the one before
            self._asked += asked
            self._arrived += min(arrived[uid], asked)
        lost, of = self._asked - self._arrived, max(self._asked, self._per_step)
        if lost > self._most * of:
            reason = (
                f"Step {self._step} lost {lost} of {of} samples, more than {KEY}={self._most:g} allows: the rest would "
                f"be chosen by what can be sampled and graded. The first error was {self._first_error()}. Mend it, or "
                f"raise {KEY} (1: never end a run). {ENDED}"
            )
            print(reason, flush=True)
            raise TooManyLostError(reason)

    def _metrics(self, batch: KVBatchMeta) -> dict[str, float]:
        """Of the step, whose samples are all there."""
        asked, arrived = self._asked, self._arrived
        self._asked = self._arrived = 0
        if arrived < asked and not self._told:
            self._told = True
            print(
                f"{NOTICE}step {self._step} lost {asked - arrived} of {asked} samples; the first error was "
                f"{self._first_error()}. Losses are counted in soup/train/samples/lost_share; a step that loses more "
                f"than {KEY}={self._most:g} ends the run.",
                flush=True,
            )
        return {
            "soup/train/samples/asked": float(asked),
            "soup/train/samples/arrived": float(arrived),
            "soup/train/samples/trained": float(sum(not tag.get("is_padding", False) for tag in batch.tags)),
            "soup/train/samples/lost_share": (asked - arrived) / asked if asked else 0.0,
        }

    def _first_error(self) -> str:
        self._error = first_failure(self.agents) or self._error
        return self._error or "not logged"
