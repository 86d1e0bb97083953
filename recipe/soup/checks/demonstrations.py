"""Refuse what `source=dataset` cannot honour, at start: tokens of which no policy is known."""

from omegaconf import DictConfig

from recipe.soup.checks.rows import local_files, own_dataset
from recipe.soup.checks.rules import Rule, check_rules
from recipe.soup.checks.tables import MAP, read_table
from recipe.soup.errors import refuse
from recipe.soup.names import AGENT_NAME, TRAINER_MODE
from recipe.soup.settings import SoupSettings

COLUMN = "algorithm.soup.demonstrations.column"
LOOP = "actor_rollout_ref.rollout.agent.default_agent_loop"
CORRECTION = "algorithm.rollout_correction"
WEIGHTS = "would weigh demonstrations by the log-probs of whoever wrote them, which nobody knows"
RULES: tuple[Rule, ...] = (
    (LOOP, (AGENT_NAME,), "demonstrations have not been tried with tools yet"),
    ("trainer.v1.trainer_mode", (TRAINER_MODE,), "ratios for demonstrations would also change interrupted responses"),
    (f"{CORRECTION}.bypass_mode", (False,), "the trainer's log-probs are the only ones of a demonstration"),
    (f"{CORRECTION}.rollout_is", (None,), WEIGHTS),
    (f"{CORRECTION}.rollout_rs", (None,), WEIGHTS.replace("weigh", "reject")),
)


def check_demonstrations(config: DictConfig, settings: SoupSettings) -> None:
    """Check what `source=dataset` needs of the composed config and the data.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    check_rules(config, RULES, ", or use another source")
    if own_dataset(config):
        return
    column = settings.demonstrations.column
    outer = column.partition(".")[0]
    for key, path in local_files(config, "train_files"):
        columns = read_table(key, path).columns
        if outer not in columns or (column.count(".") == 1 and columns[outer] != MAP and column not in columns):
            there = ", ".join(name for name in columns if "." not in name)
            raise refuse(COLUMN, column, f"{path} has no such column (it has {there}); name the one that has them.")
