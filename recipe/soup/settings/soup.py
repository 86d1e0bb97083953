"""All keys under `algorithm.soup`, and how a config becomes settings."""

from operator import attrgetter
from typing import Any, Self, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError, model_validator

from recipe.soup.errors import first_line, refuse
from recipe.soup.settings.group import text
from recipe.soup.settings.loss import TAKES_NO_RATIO, LossSettings
from recipe.soup.settings.prefixes import PrefixSettings
from recipe.soup.settings.run import RunSettings

SEE = "see `algorithm.soup` in recipe/soup/README.md."
NO_HISTORY: dict[str, tuple[Any, str]] = {
    "ratio": ("behavior", "behavior"),
    "prefix_clip.low": (None, "null"),
    "prefix_clip.high": (None, "null"),
    "prefix_gradient": (1, "1"),
    "second_moment": (None, "null"),
    "stale_negatives.low": (None, "null"),
    "stale_negatives.high": (None, "null"),
    "loss_tokens": ("all", "all"),
    "continuation_weight": ("none", "none"),
    "baseline": ("group", "group"),
}
"""What keys that concern historical tokens must be where there are none."""
NEEDED = {
    "int": "must be a whole number",
    "float": "must be a number",
    "string": "must be a name or a path",
    "model": "is a group of keys, not a value",
    "extra": "is no key",
}
"""What a value of the wrong type is told, by how the names of pydantic's errors begin."""


class SoupSettings(RunSettings, LossSettings, PrefixSettings):
    """One field per key: what concerns any run, which prefixes, and how they enter the loss; and the rules between."""

    @model_validator(mode="after")
    def _check_demonstrations(self) -> Self:
        gate, whole = self.demonstrations.gate, self.prefix_length.distribution == "whole"
        if self.source != "dataset":
            self.demand("ratio", self.ratio != "nll", "imitates demonstrations; use it with source=dataset.")
            why = "chooses among demonstrations; use it with source=dataset."
            self.demand("demonstrations.gate", gate == "always", why)
            return self
        unknown = "no policy is known for the tokens of source=dataset; use"
        self.demand("ratio", self.ratio in TAKES_NO_RATIO, f"{unknown} {', '.join(TAKES_NO_RATIO)}.")
        self.demand("second_moment", self.second_moment is None, f"{unknown} null.")
        self.demand("max_age", self.max_age is None, f"{unknown} null.")
        self.demand("behavior_log_probs", self.behavior_log_probs != "trainer", f"{unknown} auto.")
        self.demand("selection", self.selection == "random", "source=dataset draws among demonstrations; use random.")
        alone = gate != "successes" or (self.ratio == "nll" and whole)
        why = "demonstrations that stand alone have nothing to be compared with; use it with ratio=nll and"
        self.demand("demonstrations.gate", alone, f"{why} prefix_length.distribution=whole.")
        return self

    @model_validator(mode="after")
    def _check_steered(self) -> Self:
        if self.selection != "steered":
            return self
        outcome = "it needs responses whose reward is known; use source=replay."
        self.demand("selection", self.source == "replay", outcome)
        decides = "selection=steered decides each length (algorithm.soup.steering); use"
        self.demand("prefix_length.distribution", self.prefix_length.distribution == "uniform", f"{decides} uniform.")
        self.demand("prefix_length.unit", self.prefix_length.unit == "tokens", f"{decides} tokens.")
        moves = self.schedules.prefix_length.moves
        self.demand("schedules.prefix_length.shape", not moves, "use steering.withdraw with selection=steered.")
        self.demand("samples_per_prefix", self.samples_per_prefix == 1, "selection=steered shares no prefixes; use 1.")
        self.demand("on_eos", self.on_eos == "keep", "a steered prefix never ends its response; use keep.")
        return self

    @model_validator(mode="after")
    def _check_verified(self) -> Self:
        if self.selection != "verified":
            return self
        self.demand("selection", self.source == "replay", "it verifies whole old responses; use source=replay.")
        decides = "with selection=verified the current policy decides each length; use"
        self.demand("prefix_length.distribution", self.prefix_length.distribution == "uniform", f"{decides} uniform.")
        self.demand("prefix_length.unit", self.prefix_length.unit == "tokens", f"{decides} tokens.")
        moves = self.schedules.prefix_length
        self.demand("schedules.prefix_length.shape", not moves.moves, f"{decides} constant, without a warmup.")
        alone = "with selection=verified each sample has a response of its own; use 1."
        self.demand("samples_per_prefix", self.samples_per_prefix == 1, alone)
        self.demand("on_eos", self.on_eos == "keep", "a response that is accepted whole is complete; use keep.")
        for name, (fits, value) in NO_HISTORY.items():
            why = f"verified tokens count as the current policy's, so there is no history for it; use {value}."
            self.demand(name, attrgetter(name)(self) == fits, why)
        exact = self.verification.rejected == "sampled" or self.verification.leniency == 1
        why = "a token that leniency keeps has no residual distribution; use sampled, or leniency=1."
        self.verification.demand("rejected", exact, why)
        return self

    @model_validator(mode="after")
    def _check_loss_of_prefixes(self) -> Self:
        useless = self.prefix_gradient == 0 and self.prefix_length.distribution == "whole"
        self.demand("prefix_gradient", not useless, "samples that are all prefix would teach nothing.")
        behind = self.continuation_weight == "none" or self.prefix_length.distribution != "whole"
        self.demand("continuation_weight", behind, "nothing comes after a prefix that is a whole response; use none.")
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
