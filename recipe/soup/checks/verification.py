"""Refuse what `selection=verified` cannot honour, at start."""

from omegaconf import DictConfig

from recipe.soup.checks.rules import Rule, check_rules
from recipe.soup.errors import refuse
from recipe.soup.names import AGENT_NAME, TRAINER_MODE
from recipe.soup.run_settings import run_settings

RULES: tuple[Rule, ...] = (
    (
        "trainer.v1.trainer_mode",
        (TRAINER_MODE,),
        "old responses are verified between two steps, and here samples are under way when the weights change",
    ),
    (
        "actor_rollout_ref.rollout.agent.default_agent_loop",
        (AGENT_NAME,),
        "a tool's answers between the turns cannot be verified",
    ),
    (
        "algorithm.rollout_correction.bypass_mode",
        (False,),
        "the trainer scores old responses, and the engine's log-probs are no measure for its own",
    ),
)


def check_verification(config: DictConfig) -> None:
    """Check what `selection=verified` needs of the composed config, in either driver.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    check_rules(config, RULES, ", or use another algorithm.soup.selection")


def check_lab_only(config: DictConfig) -> None:
    """Refuse what only the lab can do.

    Raises:
        SystemExit: exact replacement of rejected tokens.
    """
    settings = run_settings(config)
    if settings.verifies and settings.verification.rejected == "residual":
        why = "needs the whole distribution that each old token came from, and only the lab has it; set it to sampled"
        raise refuse("algorithm.soup.verification.rejected", "residual", f"{why}.")
