"""verl's composed config for programs that are not verl's main function."""

from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


def composed(overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """Compose verl's config with overrides, as on the command line of main_ppo.

    Args:
        with_hydra: whether Hydra's own settings, such as the callbacks, are in it as well.

    Raises:
        SystemExit: Hydra's own words on an override that it does not understand.
    """
    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", overrides=list(overrides), return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException, ModuleNotFoundError) as error:
        raise SystemExit(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from error
