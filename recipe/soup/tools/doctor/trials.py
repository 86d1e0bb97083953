"""What `soup-verl doctor` tries out: the model's tokenizer, prompts of real rows, the reward."""

from collections.abc import Callable
from dataclasses import dataclass, field

from omegaconf import DictConfig

from recipe.soup.checks.rows import files, local_files, needs_truth
from recipe.soup.checks.tables import read_table
from recipe.soup.errors import refuse
from recipe.soup.names import TRAINER_MODES
from recipe.soup.settings import SoupSettings, parse_settings
from recipe.soup.tools.doctor.machine import CannotTell
from recipe.soup.verl_adapter.problems import Prompts
from recipe.soup.verl_adapter.run_facts import run_facts
from recipe.soup.verl_adapter.trial import Tried, load_prompts, try_prompts, try_reward

SETS = {"train": "training", "val": "validation"}
GRADED = 4
"""Of each set so many problems have responses graded."""


@dataclass
class Trials:
    """Tries one thing after the other; a later one needs what an earlier one loaded."""

    loaded: Prompts | None = None
    tried: dict[str, Tried] = field(default_factory=dict)

    def all(self) -> dict[str, Callable[[DictConfig], str]]:
        """Return each by its subject, in their order."""
        return {
            "tokenizer": self.tokenizer,
            "training prompts": lambda config: self.prompts(config, "train"),
            "validation prompts": lambda config: self.prompts(config, "val"),
            "reward's scores": self.reward,
            "steps and age": check_age,
        }

    def tokenizer(self, config: DictConfig) -> str:
        """Load it. Raises a SystemExit if it cannot be."""
        self.loaded = load_prompts(config)
        tokenizer = self.loaded.tokenizer
        return f"a response ends with {tokenizer.eos_token}, padding is {tokenizer.pad_token}"

    def prompts(self, config: DictConfig, name: str) -> str:
        """Make prompts of the first rows, and look at their lengths.

        Raises:
            SystemExit: they cannot be made, or are longer than a prompt may be.
            CannotTell: there is no tokenizer, or the files are elsewhere.
        """
        if self.loaded is None:
            raise CannotTell("the tokenizer was not loaded")
        if any("://" in file for file in files(config.data[f"{name}_files"])):
            raise CannotTell(f"data.{name}_files is not on this machine")
        tried = self.tried[name] = try_prompts(config, self.loaded, name)
        most, key = config.data.max_prompt_length, "data.max_prompt_length"
        long = sum(length > most for length in tried.lengths)
        what = (
            f"of the first {len(tried.lengths)} rows, prompts have {min(tried.lengths)} to {max(tried.lengths)} tokens"
        )
        if not long:
            return what
        share = f"{long} of {len(tried.lengths)} {SETS[name]} prompts are longer (up to {max(tried.lengths)} tokens)"
        if not config.data.get("filter_overlong_prompts"):
            cure = f"raise it to {max(tried.lengths)}, or drop them by data.filter_overlong_prompts=true"
            raise refuse(key, most, f"{share}, and verl would cut their beginnings off; {cure}.")
        if long == len(tried.lengths):
            raise refuse(key, most, f"{share}, and verl drops them all; raise it.")
        return f"{what}, and verl drops the {long} that are longer than {key}={most}"

    def reward(self, config: DictConfig) -> str:
        """Grade two responses to some rows of each set. Raises a SystemExit if they cannot be."""
        if not self.tried:
            raise CannotTell("there were no prompts to answer")
        if config.reward.reward_model.enable or not needs_truth(config):
            raise CannotTell("a reward model or a manager of your own grades")
        problems = [problem for tried in self.tried.values() for problem in tried.problems[:GRADED]]
        scores = try_reward(config, problems)
        given = ", ".join(f"{value:g}" for value in sorted(set(scores)))
        return f"empty responses and the ground truths' own texts, for {len(problems)} rows, have the reward {given}"


def check_age(config: DictConfig) -> str:
    """Compare the run's steps with what SOUP needs before a prefix is as old as is asked for.

    Raises:
        SystemExit: no prefix would ever be.
        CannotTell: the number of rows is not known.
    """
    tables = [read_table(key, path) for key, path in local_files(config, "train_files")]
    rows = sum(table.rows or 0 for table in tables)
    if not tables or any(table.rows is None for table in tables):
        raise CannotTell("the rows of data.train_files are not counted")
    at_most, prompts = config.data.get("train_max_samples", -1), config.data.train_batch_size
    used = min(rows, at_most) if at_most > 0 else rows
    facts = run_facts(config, used // prompts * prompts, seed=0)
    epoch = f"{used} rows are {used // prompts} steps of {prompts} prompts"
    settings = _mixing(config)
    if settings is None:
        return f"{epoch}; the run has {facts.last_step}"
    filters = config.algorithm.filter_groups is not None and config.algorithm.filter_groups.enable
    if settings.source == "replay" and facts.last_step <= used // prompts and not filters:
        why = f"{epoch}, and a run of {facts.last_step} sees no prompt twice, so there is nothing to replay"
        raise refuse("algorithm.soup.source", "replay", f"{why}; train for several epochs, or use lookahead.")
    if settings.source == "replay" or settings.lag < facts.last_step:
        return f"{epoch}; the run has {facts.last_step}, and lag={settings.lag}"
    why = f"the run has {facts.last_step} steps ({epoch}), so no prefix ever gets as old"
    if settings.warm_start == "pure":
        cure = "nothing is mixed then (warm_start=pure); use a smaller one, or train longer."
        raise refuse("algorithm.soup.lag", settings.lag, f"{why}, and {cure}")
    return f"{why} as lag={settings.lag}"


def _mixing(config: DictConfig) -> SoupSettings | None:
    if config.trainer.v1.trainer_mode not in TRAINER_MODES or "soup" not in config.algorithm:
        return None
    settings = parse_settings(config.algorithm.soup, config.actor_rollout_ref.rollout.response_length)
    return settings if settings.mixes else None
