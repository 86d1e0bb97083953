"""Read a study from its YAML file: which configurations run, with which seeds, and what they share."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from recipe.soup.errors import refuse

DRIVERS = {
    "lab": ["recipe.soup.lab"],
    "main_ppo": ["verl.trainer.main_ppo"],
}
KEYS = ("driver", "baseline", "seeds", "common", "runs")
OPTIONAL = ("first_seeds", "steps")
LAST_CHECKPOINT = "trainer.max_actor_ckpt_to_keep=1"
"""All that a killed run needs to go on; a study may set another number."""


def seed_overrides(seed: int | str) -> list[str]:
    """Return the overrides that set a seed: of the order of the data, and of sampling."""
    return [f"data.seed={seed}", f"actor_rollout_ref.rollout.seed={seed}"]


@dataclass(frozen=True)
class Run:
    """One configuration with one seed.

    Attributes:
        name: name of the configuration.
        overrides: all overrides on verl's config.
        folder: folder for everything that the run writes.
    """

    name: str
    seed: int
    overrides: list[str]
    folder: Path

    @property
    def metrics(self) -> Path:
        """File that verl's file logger writes."""
        return self.folder / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """Folder of verl's dump of validation samples."""
        return self.folder / "validation"

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run, if it was killed, can go on."""
        return (self.folder / "checkpoints" / "latest_checkpointed_iteration.txt").exists()

    @property
    def _mark(self) -> Path:
        return self.folder / "done"

    @property
    def _settings(self) -> str:
        """The overrides without the folder's path, since a study may be moved."""
        return "\n".join(self.overrides).replace(str(self.folder), "FOLDER")

    @property
    def is_done(self) -> bool:
        """Whether the run has come to its end with these overrides."""
        return self._mark.exists() and self._mark.read_text() == self._settings

    @property
    def was_another(self) -> bool:
        """Whether a run with other overrides has come to its end in this folder."""
        return self._mark.exists() and not self.is_done

    def mark_done(self) -> None:
        """Remember that the run has come to its end, and with which overrides."""
        self._mark.write_text(self._settings)

    def elsewhere(self, out: Path) -> "Run":
        """Return the same run in another folder of studies."""
        folder = (out / self.name / f"seed_{self.seed}").absolute()
        overrides = [override.replace(str(self.folder), str(folder)) for override in self.overrides]
        return replace(self, overrides=overrides, folder=folder)


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Attributes:
        driver: `lab` or `main_ppo`.
        baseline: name of the configuration that the others are compared with, seed by seed.
        seeds: seeds with which every configuration runs.
        common: overrides that all runs share; twins differ in `runs` only.
        runs: overrides of each configuration, by name.
        first_seeds: number of seeds, by name, for configurations that run with fewer, which are the first ones.
        steps: steps at which the report compares, in addition to the end; they are named before anything runs.
    """

    driver: str
    baseline: str
    seeds: list[int]
    common: list[str]
    runs: dict[str, list[str]]
    first_seeds: dict[str, int] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)

    def only(self, names: list[str]) -> "Study":
        """Return a study of these configurations and the baseline.

        Raises:
            SystemExit: one of them is not in this study.
        """
        for name in names:
            if name not in self.runs:
                raise refuse("--only", name, f"is none of the runs {', '.join(self.runs)}.")
        kept = {name: overrides for name, overrides in self.runs.items() if name in (*names, self.baseline)}
        return replace(self, runs=kept)

    def in_folder(self, out: Path) -> list[Run]:
        """Return all runs, one seed after the other, so that an interrupted study has whole seeds."""
        runs = []
        for number, seed in enumerate(self.seeds):
            for name, overrides in self.runs.items():
                if number >= self.first_seeds.get(name, len(self.seeds)):
                    continue
                folder = (out / name / f"seed_{seed}").absolute()
                seeded = [*seed_overrides(seed), f"trainer.experiment_name={name}", "trainer.logger=[console,file]"]
                seeded += [f"trainer.validation_data_dir='{folder / 'validation'}'", "trainer.resume_mode=auto"]
                seeded += [f"trainer.default_local_dir='{folder / 'checkpoints'}'"]
                seeded += [f"trainer.rollout_data_dir='{folder / 'samples'}'"]
                runs.append(Run(name, seed, [LAST_CHECKPOINT, *self.common, *overrides, *seeded], folder))
        return runs


def read_study(path: Path) -> Study:
    """Read and check a study's file.

    Raises:
        SystemExit: something is missing or wrong.
    """
    if not path.exists():
        raise refuse("study", path, "no such file; examples are in examples/countdown/studies.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise refuse("study", path, f"is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise refuse("study", path, f"has no keys; it needs {', '.join(KEYS)}.")
    for key in KEYS:
        if key not in content:
            raise refuse("study", path, f"`{key}` is missing; it needs {', '.join(KEYS)}.")
    if unknown := set(content) - {*KEYS, *OPTIONAL}:
        raise refuse("study", path, f"`{unknown.pop()}` is not known; it has {', '.join((*KEYS, *OPTIONAL))}.")
    _check_types(path, content)
    study = Study(**content)
    if study.driver not in DRIVERS:
        raise refuse("driver", study.driver, f"choose one of {', '.join(DRIVERS)}.")
    for name in study.runs:
        if not re.fullmatch(r"[\w.-]+", name):
            raise refuse("runs", name, "a name has letters, digits, dots, dashes and underscores only.")
    for name in study.first_seeds:
        if name not in study.runs:
            raise refuse("first_seeds", name, f"is none of the runs {', '.join(study.runs)}.")
    if study.baseline not in study.runs:
        raise refuse("baseline", study.baseline, f"is none of the runs {', '.join(study.runs)}.")
    return study


def _check_types(path: Path, content: dict[str, Any]) -> None:
    """Refuse values of a type that the key does not take."""

    def strings(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    def mapping(value: object, of: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(isinstance(key, str) and of(item) for key, item in value.items())

    def whole_numbers(value: object) -> bool:
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            return False
        return len(set(value)) == len(value)

    seeds = content["seeds"]
    for key, is_right, form in (
        ("seeds", whole_numbers(seeds) and bool(seeds), "a list of different whole numbers, [0, 1, 2]"),
        ("common", strings(content["common"]), "a list of overrides, [example=countdown], or []"),
        ("runs", mapping(content["runs"], strings), "for each name a list of overrides, grpo: [algorithm=grpo]"),
        ("steps", whole_numbers(content.get("steps", [])), "a list of different whole numbers, [100, 200]"),
        (
            "first_seeds",
            mapping(content.get("first_seeds", {}), lambda n: isinstance(n, int)),
            "a number for each name",
        ),
    ):
        if not is_right:
            raise refuse(key, content.get(key), f"in {path} must be {form}.")
