"""Refuse a sweep of Hydra's (`--multirun`) whose jobs would share a folder, or the file of their metrics.

Nothing would be lost, since a run that starts anew puts aside what the one before left. But nobody would know
afterwards which `earlier_<number>` is which job's, and with `trainer.resume_mode=auto` a job
would go on at another's checkpoint.
"""

import copy

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse
from recipe.soup.records.earlier_runs import folders
from recipe.soup.records.metrics_file import metrics_file, trackers


def check_sweep(config: DictConfig) -> None:
    """Check that every folder that a run writes to, and the file of its metrics, has every swept key in its name.

    Args:
        config: of the whole sweep, with Hydra's own keys. A choice of config groups, such as `algorithm=soup,grpo`, is
            left alone: each option may name its runs.

    Raises:
        SystemExit: key, values and what to do.
    """
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=True)
    assert isinstance(given, list)
    shared: dict[str, tuple[str, str]] = {}
    for override in OverridesParser.create().parse_overrides([str(text) for text in given]):
        key = override.key_or_group
        if not override.is_sweep_override() or "." not in key:
            continue
        one, another = _places(config, key, "1"), _places(config, key, "2")
        for place in one:
            if place in another:
                shared.setdefault(key, (override.get_value_string(), place))
    for key, (values, place) in shared.items():
        raw = OmegaConf.to_container(config.trainer, resolve=False)
        assert isinstance(raw, dict)
        name = "-".join([str(raw["experiment_name"]), *(f"${{{missing}}}" for missing in shared)])
        why = f"the jobs of --multirun would all write to {place}"
        raise refuse(key, values, f"{why}; have the key in its name, by default with 'trainer.experiment_name={name}'.")


def _places(config: DictConfig, key: str, value: str) -> list[str]:
    changed = copy.deepcopy(config)
    OmegaConf.set_struct(changed, False)
    OmegaConf.update(changed, key, value, force_add=True)
    metrics = [f"the metrics file {metrics_file(changed)}"] if "file" in trackers(changed) else []
    return [*(f"{place}={folder}" for place, folder in folders(changed).items()), *metrics]
