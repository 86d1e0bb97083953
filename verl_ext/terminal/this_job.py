"""What a Hydra callback was given, read again for each job of a sweep.

Hydra makes callbacks once, of the first config that it composes, for all jobs of `--multirun`. Where an argument holds
the name of the run, every later job would use that of another.
"""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


def arguments(callback: Callback, config: DictConfig) -> dict[str, Any] | None:
    """Return the arguments that a job's config has for this callback; None if it does not name it.

    Args:
        config: what Hydra hands to `on_job_start`, with its own keys.
    """
    target = f"{type(callback).__module__}.{type(callback).__qualname__}"
    for given in (OmegaConf.select(config, "hydra.callbacks", default=None) or {}).values():
        if given is not None and given.get("_target_") == target:
            return {str(name): value for name, value in given.items() if name != "_target_"}
    return None
