"""Look at every configuration of a study before the first of its runs starts."""

from pathlib import Path

from recipe.soup.checks.config import check_config
from recipe.soup.checks.start import AT_START, IN_ANY_DRIVER
from recipe.soup.checks.verification import check_lab_only
from recipe.soup.tools.compare.execute import command, goes_on
from recipe.soup.tools.compare.kept_runs import is_recorded
from recipe.soup.tools.compare.study import Study
from recipe.soup.verl_adapter.compose import composed


def check_runs(study: Study, out: Path, records: Path | None) -> None:
    """Check each configuration that is still to run, as a run of its own would be checked when it starts.

    Raises:
        SystemExit: the configuration's name, and what it was told.
    """
    to_run = {run.name: run for run in study.in_folder(out) if not run.is_done and not is_recorded(run, records)}
    for name, run in to_run.items():
        try:
            # A run that was killed with other settings leaves nothing that this one would go on with.
            anew = [] if goes_on(run, command(run, study.driver)) else ["trainer.resume_mode=disable"]
            config = composed([*run.overrides, *anew])
            for check in (AT_START if study.driver == "main_ppo" else IN_ANY_DRIVER).values():
                check(config)
            if config.actor_rollout_ref.actor.policy_loss.loss_mode == "soup":
                check_config(config)
                if study.driver == "main_ppo":
                    check_lab_only(config)
        except SystemExit as refusal:
            raise SystemExit(f"{name}: {refusal.code}") from None
