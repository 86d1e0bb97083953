"""What is checked whenever a run starts, under `algorithm=soup`, `grpo` and `verl`, by subject; two seconds in all.

Each looks at the config, at heads of files and at the machine, and raises a SystemExit with one sentence.
"""

from collections.abc import Callable

from omegaconf import DictConfig

from recipe.soup.checks.batches import check_batches, check_steps
from recipe.soup.checks.correction import check_correction
from recipe.soup.checks.model import check_model
from recipe.soup.checks.outputs import check_outputs
from recipe.soup.checks.reward import check_reward
from recipe.soup.checks.rows import check_rows
from recipe.soup.checks.separate_async import check_separate_async
from recipe.soup.checks.sizes import check_sizes
from recipe.soup.checks.snapshots import standalone_gpus
from verl_ext.placement import check_placement
from verl_ext.socket_paths import check_socket_paths

Check = Callable[[DictConfig], None]


def _check_placement(config: DictConfig) -> None:
    check_placement(config, standalone_gpus(config))


IN_ANY_DRIVER: dict[str, Check] = {
    "sizes": check_sizes,
    "steps": check_steps,
    "rollout correction": check_correction,
    "model": check_model,
    "data": check_rows,
    "reward": check_reward,
    "what it writes": check_outputs,
}
"""Also the lab's. Sizes come first: the others divide by them."""
AT_START: dict[str, Check] = {
    **IN_ANY_DRIVER,
    "a rollout apart": check_separate_async,
    "batches": check_batches,
    "CPUs and GPUs": _check_placement,
    "temporary folder": check_socket_paths,
}


def check_start(config: DictConfig) -> None:
    """Run every check of a start.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    for check in AT_START.values():
        check(config)
