"""Refuse a sweep of Hydra's (`--multirun`) whose jobs would share a folder.

Nothing would be lost, since a run that starts anew puts aside what the one before left. But nobody would know
afterwards which `earlier_<number>` is which job's, and with `trainer.resume_mode=auto` a job
would go on at another's checkpoint.
"""

import copy
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse
from recipe.soup.records.earlier_runs import folders


def check_sweep(config: DictConfig) -> None:
    """Check that every folder that a run writes to has every swept key in its name.

    Args:
        config: of the whole sweep, with Hydra's own keys. A choice of config groups, such as `algorithm=soup,grpo`, is
            left alone: each option may name its runs.

    Raises:
        SystemExit: key, values and what to do.
    """
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=True)
    assert isinstance(given, list)
    shared: dict[str, tuple[str, str, Path]] = {}
    for override in OverridesParser.create().parse_overrides([str(text) for text in given]):
        key = override.key_or_group
        if not override.is_sweep_override() or "." not in key:
            continue
        one, another = _folders(config, key, "1"), _folders(config, key, "2")
        for place, folder in one.items():
            if another.get(place) == folder:
                shared.setdefault(key, (override.get_value_string(), place, folder))
    for key, (values, place, folder) in shared.items():
        raw = OmegaConf.to_container(config.trainer, resolve=False)
        assert isinstance(raw, dict)
        name = "-".join([str(raw["experiment_name"]), *(f"${{{missing}}}" for missing in shared)])
        why = f"the jobs of --multirun would all write to {place}={folder}"
        raise refuse(key, values, f"{why}; have the key in its name, by default with 'trainer.experiment_name={name}'.")


def _folders(config: DictConfig, key: str, value: str) -> dict[str, Path]:
    changed = copy.deepcopy(config)
    OmegaConf.set_struct(changed, False)
    OmegaConf.update(changed, key, value, force_add=True)
    return folders(changed)
