"""A study's configurations are looked at before the first run starts."""

import shlex
from pathlib import Path

import pytest

from recipe.soup.bank_origin import bank_origin
from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.prefixes.source import BANK_FILE
from recipe.soup.tools.compare.check import check_runs
from recipe.soup.tools.compare.execute import COMMAND_FILE, command, goes_on
from recipe.soup.tools.compare.study import Study
from recipe.soup.verl_adapter.compose import composed


def study(driver: str, countdown_dir: Path, **runs: list[str]) -> Study:
    data = [f"data.{key}_files={countdown_dir}/data/{key}.parquet" for key in ("train", "val")]
    common = ["example=countdown", "hardware=cpu", f"actor_rollout_ref.model.path={countdown_dir}/base_model", *data]
    content = {"driver": driver, "baseline": "grpo", "seeds": [0, 1], "common": common, "runs": runs}
    return Study.model_validate(content)


@pytest.mark.parametrize("driver", ["lab", "main_ppo"])
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm=soup", "algorithm.soup.lag=-1"], "algorithm.soup.lag=-1"),
        (["algorithm=soup", "algorithm.soup.lags=1"], "algorithm.soup.lags"),
        (["algorithm=soup", "actor_rollout_ref.rollout.n=0"], "actor_rollout_ref.rollout.n=0: must be"),
        (["algorithm=grpo", "data.train_files=/no/rows.parquet"], "data.train_files=/no/rows.parquet: no such file"),
        (["algorithm=nothing"], "algorithm=nothing"),
    ],
)
def test_a_wrong_configuration_is_named_before_anything_runs(
    driver: str, overrides: list[str], words: str, countdown_dir: Path, tmp_path: Path
) -> None:
    chosen = study(driver, countdown_dir, grpo=["algorithm=grpo"], wrong=overrides)
    with pytest.raises(SystemExit) as refusal:
        check_runs(chosen, tmp_path, None)
    assert str(refusal.value.code).startswith("wrong: ")
    assert words in str(refusal.value.code)


def test_what_is_done_is_not_looked_at(countdown_dir: Path, tmp_path: Path) -> None:
    chosen = study("lab", countdown_dir, grpo=["algorithm=grpo"], gone=["algorithm=grpo", "data.val_files=/gone.jsonl"])
    for run in chosen.in_folder(tmp_path):
        if run.name == "gone":
            run.folder.mkdir(parents=True)
            run.mark_done()
    check_runs(chosen, tmp_path, None)


def test_a_run_that_was_killed_with_other_settings_is_in_nobodys_way(countdown_dir: Path, tmp_path: Path) -> None:
    """It will be deleted, and its prefixes are nothing that the new one would go on with."""
    soup = ["algorithm=soup", "algorithm.soup.lag=2"]
    before = study("lab", countdown_dir, grpo=["algorithm=grpo"], soup=soup)
    for run in before.in_folder(tmp_path):
        folder = run.folder / "checkpoints" / "global_step_4"
        (folder / "actor").mkdir(parents=True)
        (folder.parent / "latest_checkpointed_iteration.txt").write_text("4")
        (run.folder / COMMAND_FILE).write_text(shlex.join(command(run, "lab")))
        PrefixBank().save(folder / BANK_FILE, bank_origin(composed(run.overrides)), 64, {})
        assert goes_on(run, command(run, "lab"))
    check_runs(before, tmp_path, None)
    hotter = "actor_rollout_ref.rollout.temperature=0.7"
    after = study("lab", countdown_dir, grpo=["algorithm=grpo"], soup=[*soup, hotter])
    check_runs(after, tmp_path, None)
    for run in after.in_folder(tmp_path):
        assert goes_on(run, command(run, "lab")) == (run.name == "grpo")
        (run.folder / COMMAND_FILE).write_text("python -m 'torn")
        assert not goes_on(run, command(run, "lab"))
