"""verl's composed config for programs that are not verl's main function."""

from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig

from recipe.soup.errors import last_line


def composed(overrides: Sequence[str]) -> DictConfig:
    """Compose verl's config with overrides, as on the command line of main_ppo.

    Raises:
        SystemExit: Hydra's own words on an override that it does not understand.
    """
    with initialize_config_module("verl.trainer.config", version_base=None):
        try:
            return compose("ppo_trainer", overrides=list(overrides))
        except HydraException as error:
            raise SystemExit(f"{' '.join(overrides)}: {last_line(error)}") from error
