"""All keys under `algorithm.soup`, and how a config becomes settings."""

from typing import Any, Literal, Self, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError, model_validator

from recipe.soup.errors import first_line, refuse
from recipe.soup.settings.group import Number, Whole, key, text
from recipe.soup.settings.loss import LossSettings
from recipe.soup.settings.prefixes import PrefixSettings

SEE = "see `algorithm.soup` in recipe/soup/README.md."
NEEDED = {
    "int": "must be a whole number",
    "float": "must be a number",
    "string": "must be a name or a path",
    "model": "is a group of keys, not a value",
    "extra": "is no key",
}
"""What a value of the wrong type is told, by how the names of pydantic's errors begin."""


class SoupSettings(LossSettings, PrefixSettings):
    """One field per key: which prefixes, how they enter the loss, and, declared here, what concerns any run of ours."""

    dump_rows: Whole | None = key(
        None,
        "Samples of a step that `trainer.rollout_data_dir` gets at most, whole prompts of a random choice; null: all.",
        when="Long responses: a token takes about 30 bytes of disk. The step waits for the samples' arrays only; text "
        "and JSON are made beside it (measured: benchmarks/results/dump.md).",
        ge=1,
        advice="use 1 or more samples a step, or null for all.",
    )
    max_lost_share: Number = key(
        0.05,
        "A step that lost a larger share of the samples it asked for, because generation or reward raised or the "
        "reward was not one finite number, ends the run and names the first error; verl drops the samples that raised, "
        "and trains on the rest. A step, or a validation, that lost all of them ends it in any case.",
        when="With rewards from 0 to 1 a step's mean reward is off by 0.05 at most, whichever samples were lost. Raise "
        "it for a grader whose failures have nothing to do with the response (a service that times out); a grader that "
        "fails on some responses should give them a reward instead.",
        ge=0,
        le=1,
        advice="a share lies between 0 (none) and 1 (all).",
    )

    broken_steps: Literal["stop", "warn"] = key(
        "stop",
        "What happens at a step whose loss or gradient is not finite, in which no token has a loss, or after which the "
        "engine still has the weights of an earlier step: the run ends with a sentence, or goes on, tells of each kind "
        "once and counts (`soup/train/broken/*`). verl goes on without a word.",
        when="`warn` for a run that is worth more than a step now and then; such a step trains nothing.",
    )

    max_wait: Number | None = key(
        1800.0,
        "A step, or a validation, in which no sample has come for so many seconds ends the run, and the sentence says "
        "which reward is still being computed; null: wait for ever, as verl does.",
        when="Longer than the longest time that one response takes, with its reward. A reward that asks a server needs "
        "a time limit of its own, far below.",
        gt=0,
        advice="give seconds, or null to wait for ever.",
    )
    sigterm_grace: Number = key(
        0.0,
        "Seconds that SIGTERM leaves a run to end its step and save a checkpoint; 0: it ends at once.",
        when="Under SLURM, with `#SBATCH --signal=B:TERM@600`; see docs/clusters.md.",
        ge=0,
        advice="give seconds, 0 or more.",
    )

    @model_validator(mode="after")
    def _check_loss_of_prefixes(self) -> Self:
        useless = self.prefix_gradient == 0 and self.prefix_length.distribution == "whole"
        self.demand("prefix_gradient", not useless, "samples that are all prefix would teach nothing.")
        shares = self.baseline != "two_level" or self.samples_per_prefix > 1
        why = "compares samples that share a prefix; set algorithm.soup.samples_per_prefix to 2 or more."
        self.demand("baseline", shares, why)
        cancels = self.selection == "steered" and self.baseline == "separate" and self.prefix_gradient > 0
        why = "mixed samples that share the one stored response have advantages that sum to 0 on it; use group, or"
        self.demand("baseline", not cancels, f"{why} algorithm.soup.prefix_gradient=0.")
        return self


def parse_settings(config: DictConfig | None, response_length: int) -> SoupSettings:
    """Read and check `algorithm.soup`.

    Args:
        config: the node `algorithm.soup`, or None if there is none.
        response_length: `data.max_response_length`, in tokens; bounds the prefix.

    Raises:
        SystemExit: an unknown key, a value of the wrong type or outside its bounds; one sentence.
    """
    try:
        is_node = OmegaConf.is_config(config)
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True) if is_node else config
        settings = SoupSettings.model_validate({} if content is None else content)
    except OmegaConfBaseException as error:
        name = (error.full_key or "").removeprefix(SoupSettings.path).strip(".")
        raise refuse(f"{SoupSettings.path}.{name}".strip("."), "?", f"{first_line(error)}; {SEE}") from None
    except ValidationError as error:
        raise _refusal(error.errors()[0]) from None
    settings.fill(response_length)
    return settings


def _refusal(error: Any) -> SystemExit:
    """One of pydantic's errors as a sentence of ours."""
    name, kind = ".".join(map(str, error["loc"])), error["type"]
    field = dict(SoupSettings.every_key()).get(name)
    if kind == "literal_error" and field is not None:
        why = f"choose one of {', '.join(get_args(field.annotation))}."
    elif kind.startswith(("greater_than", "less_than")) and field is not None:
        why = text(field, "advice")
    else:
        why = f"{NEEDED.get(kind.partition('_')[0], error['msg'])}; {SEE}"
    return refuse(f"{SoupSettings.path}.{name}".strip("."), error["input"], why)
