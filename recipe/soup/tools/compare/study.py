"""Read a study from its YAML file: which configurations run, with which seeds, and what they share."""

import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from recipe.soup.errors import refuse
from recipe.soup.tools.compare.one_run import Run, seed_overrides

DRIVERS = {
    "lab": ["recipe.soup.lab"],
    "main_ppo": ["verl.trainer.main_ppo"],
}
LAST_CHECKPOINT = "trainer.max_actor_ckpt_to_keep=1"
"""All that a killed run needs to go on; a study may set another number."""


class Study(BaseModel):
    """What a study's file says; a key's description is what a wrong value is told it must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    driver: Literal["lab", "main_ppo"]
    baseline: StrictStr = Field(description="the name of a run, with which the others are compared seed by seed")
    seeds: list[StrictInt] = Field(min_length=1, description="a list of different whole numbers, [0, 1, 2]")
    """Every configuration runs with each."""
    common: list[StrictStr] = Field(description="a list of overrides, [example=countdown], or []")
    """What all share; the twins differ in `runs` only."""
    runs: dict[StrictStr, list[StrictStr]] = Field(
        min_length=1, description="for each name a list of overrides, grpo: [algorithm=grpo]"
    )
    first_seeds: dict[StrictStr, StrictInt] = Field({}, description="a number for each name")
    """How many of the seeds a configuration runs with, for those that run with fewer."""
    steps: list[StrictInt] = Field([], description="a list of different whole numbers, [100, 200]")
    """At which the report compares, beside the end: named before anything ran."""

    @field_validator("seeds", "steps")
    @classmethod
    def _are_different(cls, numbers: list[int]) -> list[int]:
        if len(set(numbers)) < len(numbers):
            raise ValueError("a number twice")
        return numbers

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.runs:
            if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):  # it names a folder, and stands in an override
                why = "a name has letters without accents, digits, dots, dashes and underscores only"
                raise refuse("runs", name, f"{why}, and begins with none of dot and dash.")
        for key, names in (("first_seeds", list(self.first_seeds)), ("baseline", [self.baseline])):
            for name in names:
                if name not in self.runs:
                    raise refuse(key, name, f"is none of the runs {', '.join(self.runs)}.")
        return self

    def only(self, names: list[str]) -> "Study":
        """Return a study of these configurations and the baseline.

        Raises:
            SystemExit: one of them is not in this study.
        """
        for name in names:
            if name not in self.runs:
                raise refuse("--only", name, f"is none of the runs {', '.join(self.runs)}.")
        kept = {name: overrides for name, overrides in self.runs.items() if name in (*names, self.baseline)}
        return self.model_copy(update={"runs": kept})

    def in_folder(self, out: Path) -> list[Run]:
        """Return all runs, one seed after the other, so that an interrupted study has whole seeds."""
        runs = []
        for number, seed in enumerate(self.seeds):
            for name, overrides in self.runs.items():
                if number >= self.first_seeds.get(name, len(self.seeds)):
                    continue
                folder = (out / name / f"seed_{seed}").absolute()
                seeded = [*seed_overrides(seed), f"trainer.experiment_name={name}", "trainer.logger=[console,file]"]
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
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise refuse("study", path, f"cannot be read ({error.strerror}); give a YAML file.") from None
    except UnicodeDecodeError:
        raise refuse("study", path, "is no UTF-8 text; save it as UTF-8.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise refuse("study", path, f"is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise refuse("study", path, f"has no keys; it needs {', '.join(_keys(needed=True))}.")
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise _refusal(path, error.errors()[0], content) from None


def _keys(needed: bool) -> list[str]:
    return [key for key, field in Study.model_fields.items() if field.is_required() or not needed]


def _refusal(path: Path, error: Any, content: dict[str, Any]) -> SystemExit:
    """One of pydantic's errors as a sentence of ours."""
    key, kind = error["loc"][0], error["type"]
    if kind == "missing":
        return refuse("study", path, f"`{key}` is missing; it needs {', '.join(_keys(needed=True))}.")
    if kind in ("extra_forbidden", "invalid_key"):
        return refuse("study", path, f"`{key}` is not known; it has {', '.join(_keys(needed=False))}.")
    if kind == "literal_error":
        return refuse(key, content[key], f"choose one of {', '.join(DRIVERS)}.")
    return refuse(key, content[key], f"in {path} must be {Study.model_fields[key].description}.")
