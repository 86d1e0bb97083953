"""What a source of prefixes must know of the run, from verl's config."""

from typing import Any

from recipe.soup.bank_origin import bank_origin
from recipe.soup.prefixes.plan import RunFacts


def run_facts(config: Any, prompts_per_epoch: int, seed: int) -> RunFacts:
    """Read the facts of a run.

    Args:
        config: verl's whole config.
        prompts_per_epoch: prompts after which they come again.
        seed: of everything that is drawn.
    """
    rollout, prompts_per_step = config.actor_rollout_ref.rollout, config.data.train_batch_size
    given, epochs = config.trainer.total_training_steps, config.trainer.total_epochs
    steps = prompts_per_epoch // prompts_per_step * epochs
    return RunFacts(
        samples=rollout.n,
        response_length=rollout.response_length,
        seed=seed,
        prompts_per_step=prompts_per_step,
        last_step=steps if given is None else min(given, steps),
        prompts_per_epoch=prompts_per_epoch,
        origin=bank_origin(config),
    )
