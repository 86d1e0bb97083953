"""Prompts ahead of their time: what the trainer tells a source of prefixes, and what it hands out with each batch."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer

from recipe.soup.names import OURS_FOR, REQUESTS_KEY, TOOL_AGENT_NAME, VISIT_KEY
from recipe.soup.prefixes.demonstrations import Demonstrations
from recipe.soup.prefixes.finished import fingerprint
from recipe.soup.prefixes.make_source import make_source
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.requests import PromptRequests, PromptWithTools
from recipe.soup.verl_adapter.historical_adapters import HistoricalAdapters
from recipe.soup.verl_adapter.historical_replicas import HistoricalReplicas
from recipe.soup.verl_adapter.lost_samples import LostSamples
from recipe.soup.verl_adapter.run_facts import run_facts
from recipe.soup.verl_adapter.scores import TrainerScores
from recipe.soup.verl_adapter.step_state import Stage
from verl_ext.health import end_run


def without_agent_names(rows: Any, collate: Callable[[Any], dict[str, Any]], loop: str) -> dict[str, Any]:
    """Collate rows without verl's column `agent_name`, by which each would choose verl's loop in place of ours.

    Raises:
        ValueError: a row asks for a loop of another kind than the run's. Files are looked at before the start; what a
            dataset class of the user's own makes of them is seen here only.
    """
    batch = collate(rows)
    asked = {str(name) for name in batch.pop("agent_name", ())}
    if others := sorted(name for name in asked if OURS_FOR.get(name, name) != loop):
        raise ValueError(f"agent_name={others[0]} in the data: this run has {loop} for all rows; remove the column")
    return batch


def with_tools(messages: Any, extra_info: Any) -> Any:
    """The prompt with the tools that its row chooses, if it does."""
    chosen = (extra_info or {}).get("tool_selection")
    return messages if chosen is None or not len(chosen) else PromptWithTools(messages, tuple(map(str, chosen)))


class PromptStage(Stage):
    """A prefix source in front of verl's dataloader.

    Attributes:
        history: what serves past weights, if the source needs it.
        lost: counts the samples that never come.
    """

    history: HistoricalReplicas | HistoricalAdapters | None
    lost: LostSamples

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        for loader in (self.train_dataloader, self.val_dataloader):
            loader.collate_fn = partial(without_agent_names, collate=loader.collate_fn, loop=self._loop)
        prompts_per_epoch = self.steps_per_epoch * self.config.data.train_batch_size
        self._read_ahead(run_facts(self.config, prompts_per_epoch, self.config.actor_rollout_ref.rollout.seed))

    @property
    def _loop(self) -> str:
        return self.config.actor_rollout_ref.rollout.agent.default_agent_loop

    def _read_ahead(self, facts: RunFacts) -> None:
        """Make the source, which reads prompts from the dataloader before their step."""
        self._loader_state = self.train_dataloader.state_dict
        model, folder = str(self.config.actor_rollout_ref.model.path), None
        if self.history is not None:
            model, folder = self.history.base_model, self.history.folder
        shown = None
        if self.settings.demonstrates:
            shown = Demonstrations(self.settings.demonstrations, self.tokenizer, self._columns)
        self.source = make_source(
            self.settings, facts, self._fetch_prompts, self.history, model, folder, shown, TrainerScores(self)
        )
        # A checkpoint must resume at the first prompt that was not trained on.
        resume_state = partial(self.source.resume_state, self._loader_state)
        self.train_dataloader.state_dict = resume_state  # pyright: ignore[reportAttributeAccessIssue]

    def _columns(self, batch: TensorDict) -> list[dict[str, Any]]:
        """Of each prompt the column in which its demonstrations are, if it came through verl's dataset."""
        column = self.settings.demonstrations.column.partition(".")[0]
        if column not in batch:
            end_run(f"algorithm.soup.demonstrations.column={column}: no such column in what the dataset returned.")
        return [{column: value} for value in cast(Any, batch[column])]

    def _fetch_prompts(self) -> tuple[TensorDict, list[Any], dict | None]:
        state = self._loader_state() if self.config.trainer.save_freq > 0 else None
        batch = super()._fetch_one_gen_batch()
        prompts = list(cast(Any, batch["raw_prompt"]))
        if self._loop == TOOL_AGENT_NAME and "extra_info" in batch:
            prompts = list(map(with_tools, prompts, cast(Any, batch["extra_info"])))
        return batch, prompts, state

    def _fetch_one_gen_batch(self) -> TensorDict:
        chunk, prefixes = self.source.take(self.global_steps)
        # With the row, so that it comes back with each sample, also of a run that was resumed meanwhile.
        visits = [
            {"ordinal": chunk.first_ordinal + row, "prompt": fingerprint(messages)}
            for row, messages in enumerate(chunk.messages)
        ]
        tu.assign_non_tensor_stack(chunk.batch, VISIT_KEY, visits)
        late = self.source.late(chunk, self.global_steps)
        rows = [PromptRequests(prefixes=slots, late=now) for slots, now in zip(prefixes, late, strict=True)]
        tu.assign_non_tensor_stack(chunk.batch, REQUESTS_KEY, rows)
        return chunk.batch

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        batch = super()._next_train_batch(num_prompts)
        if num_prompts is None:  # the step's own batch, not a refill of filtered groups
            self.source.order(self.global_steps, list(cast(Any, batch[REQUESTS_KEY])))
        return batch

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        self.lost.send(batch)
        return super()._submit_batch_to_rollout(batch)

    def on_sample_end(self) -> None:
        super().on_sample_end()
        self.source.generated(self.global_steps)

    def on_step_end(self) -> None:
        # Before the current policy's engine wakes up.
        with marked_timer("verification" if self.settings.verifies else "snapshot", self.timing_raw):
            self.source.updated(self.global_steps)
        super().on_step_end()
