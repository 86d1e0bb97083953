"""Refuse a sweep of Hydra's (`--multirun`) whose jobs would share a folder.

Nothing would be lost, since a run that starts anew puts aside what the one before left. But nobody would know
afterwards which `earlier_<number>` is which job's, and with `trainer.resume_mode=auto` a job
would go on at another's checkpoint.
"""

import copy

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse

FOLDER = "trainer.default_local_dir"


def check_sweep(config: DictConfig) -> None:
    """Check that every swept key is heard of in the folder of checkpoints.

    Args:
        config: of the whole sweep, with Hydra's own keys. A choice of config groups, such as `algorithm=soup,grpo`, is
            left alone: each option may name its runs.

    Raises:
        SystemExit: key, values and what to do.
    """
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=True)
    assert isinstance(given, list)
    for override in OverridesParser.create().parse_overrides([str(text) for text in given]):
        key = override.key_or_group
        if override.is_sweep_override() and "." in key and _folder(config, key, "1") == _folder(config, key, "2"):
            name = OmegaConf.select(config, "trainer.experiment_name")
            why = f"the jobs of --multirun would all write to {FOLDER}={OmegaConf.select(config, FOLDER)}"
            cure = f"name each by the key, 'trainer.experiment_name={name}-${{{key}}}'"
            raise refuse(key, override.get_value_string(), f"{why}; {cure}.")


def _folder(config: DictConfig, key: str, value: str) -> str:
    changed = copy.deepcopy(config)
    OmegaConf.set_struct(changed, False)
    OmegaConf.update(changed, key, value, force_add=True)
    return str(OmegaConf.select(changed, FOLDER))
