"""`soup-verl doctor`: a line each, with a mark; 1 as exit code if there is a problem; nothing is started."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig

from recipe.soup.checks.start import AT_START
from recipe.soup.tools.cli import main
from recipe.soup.tools.doctor import disk, environment, machine
from recipe.soup.tools.doctor.disk import checkpoint_bytes
from recipe.soup.tools.doctor.machine import CannotTell
from recipe.soup.tools.doctor.run import INSTEAD, OK, PROBLEM, UNKNOWN, examine
from recipe.soup.tools.doctor.trials import Trials, check_age
from verl_ext.placement import Resources

Compose = Callable[..., DictConfig]
BASE = ("hardware=cpu", "example=countdown")
GB = 10**9
PROMPT = [{"role": "user", "content": "3 5 7=22:"}]
LONG = [{"role": "user", "content": "1 2 3=6: " * 20}]


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", start)
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "TMPDIR", "RAY_TMPDIR", "VERL_USE_EXTERNAL_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def examined(*overrides: str) -> dict[str, tuple[str, str]]:
    return {subject: (mark, words) for mark, subject, words in examine(list(overrides))}


@pytest.mark.parametrize("algorithm", ["soup", "grpo", "verl"])
def test_the_example_has_no_problem(algorithm: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["doctor", f"algorithm={algorithm}", *BASE])
    lines = capsys.readouterr().out.splitlines()
    assert {line[:11].strip() for line in lines} <= {OK, UNKNOWN}  # a busy machine may lack memory
    assert len(lines) > len(AT_START)
    for subject in ("versions", "plugin", *AT_START, "disk", "tokenizer", "training prompts", "reward's scores"):
        assert f"ok           {subject}: " in "\n".join(lines)
    assert not list(tmp_path.iterdir())


def test_problems_are_told_one_by_one_and_decide_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["actor_rollout_ref.rollout.max_num_seqs=0", "reward.custom_reward_function.name=nope"]
    with pytest.raises(SystemExit) as end:
        main(["doctor", "algorithm=soup", *BASE, *overrides])
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "problem      sizes: actor_rollout_ref.rollout.max_num_seqs=0: must be" in said
    assert (
        "problem      reward: reward.custom_reward_function.name=nope: pkg://examples.countdown.reward has no" in said
    )
    assert said.splitlines()[-1].endswith(" problems.")


@pytest.mark.parametrize("override", ["nothing=1", "algorithm=nope", "data.train_files=~/x"])
def test_a_command_that_hydra_refuses_is_one_problem(override: str) -> None:
    [(mark, subject, words)] = examine(["algorithm=soup", override])
    assert (mark, subject) == (PROBLEM, "config")
    assert override.split("=")[-1] in words or "nothing" in words


def test_one_problem_is_told_once_however_many_look_at_it() -> None:
    found = examined("algorithm=soup", *BASE, "data.train_files=/no/rows.parquet")
    # Where verl's own reader comes to it, it has other words.
    assert [subject for subject, (mark, _) in found.items() if mark == PROBLEM] == ["data", "training prompts"]
    assert found["soup"] == found["steps and age"] == (UNKNOWN, "see data, above.")


def test_the_callbacks_of_a_recipe_are_asked() -> None:
    found = examined("algorithm=soup", *BASE, "algorithm.soup.lag=-3")
    mark, words = found["settings"]
    assert mark == PROBLEM
    assert words.startswith("algorithm.soup.lag=-3: ")


def test_a_config_for_gpus_is_examined_without_one(composed: Compose, countdown_dir: Path) -> None:
    found = examined(
        "algorithm=soup",
        f"actor_rollout_ref.model.path={countdown_dir}/base_model",
        f"data.train_files={countdown_dir}/data/train.parquet",
        f"data.val_files={countdown_dir}/data/val.parquet",
        "reward.custom_reward_function.path=pkg://examples.countdown.reward",
        "data.max_prompt_length=16",
        "data.max_response_length=24",
    )
    assert found["versions"][0] == PROBLEM
    assert "torchvision is missing (==0.26.0 is wanted)" in found["versions"][1]
    assert "requirements.txt" in found["versions"][1]
    assert found["CPUs and GPUs"][0] == PROBLEM
    assert found["GPU memory"] == (UNKNOWN, "no GPU on this machine; ask on the one that will run.")
    assert found["reward's scores"][0] == OK


# ---------------------------------------------------------------- environment and machine


def test_the_plugin_must_be_let_in(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.check_plugin(composed()) == "verl_ext is loaded"
    for policy, problem in (("none", True), ("other", True), ("other, verl_ext", False), ("AUTO", False)):
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
        if problem:
            with pytest.raises(SystemExit, match=f"^VERL_USE_EXTERNAL_PLUGINS={policy}: "):
                environment.check_plugin(composed())
        else:
            environment.check_plugin(composed())


def test_versions_are_held_against_the_packages_own_pins(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("algorithm=soup", "hardware=cpu")
    assert "verl 0.9.1" in environment.check_versions(config)
    with monkeypatch.context() as patch:
        patch.setattr(environment, "version", lambda name: {"verl": "0.10.0"}.get(name, "1.0"))
        with pytest.raises(SystemExit, match=r"verl is 0\.10\.0 \(==0\.9\.1 is wanted\).*requirements-cpu\.txt"):
            environment.check_versions(config)


def test_a_cluster_is_asked(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("algorithm=grpo", "trainer.nnodes=2", "+ray_kwargs.ray_init.address=10.0.0.1:6379")
    monkeypatch.setattr(machine, "_of_cluster", lambda _: Resources(256, 16))
    assert "10.0.0.1:6379 has the 57 CPUs and 16 GPUs" in machine.check_resources(config)
    monkeypatch.setattr(machine, "_of_cluster", lambda _: Resources(256, 8))
    with pytest.raises(SystemExit, match=r"the Ray cluster at 10\.0\.0\.1:6379 has 8"):
        machine.check_resources(config)


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [("", True), ("actor_rollout_ref.rollout.gpu_memory_utilization=0.9", False)],
)
def test_vllms_share_and_the_trainer_fit_on_a_gpu(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, overrides: str, fits: bool
) -> None:
    config = composed("algorithm=grpo", "trainer.n_gpus_per_node=1", *overrides.split())
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = 1
    monkeypatch.setattr(machine, "gpu_bytes", lambda: 80e9)
    monkeypatch.setattr(machine, "parameters", lambda _: 1e9)  # 12 GB of weights and optimizer
    if fits:
        assert "0.5 x 80 GB of vLLM + 12.0 GB" in machine.check_gpu_memory(config)
    else:
        with pytest.raises(SystemExit, match=r"gpu_memory_utilization=0\.9: 0\.9 x 80 GB of vLLM \+ 12\.0 GB"):
            machine.check_gpu_memory(config)


def test_checkpoints_must_fit_where_they_are_written(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = f"trainer.default_local_dir={tmp_path}/runs/x"
    config = composed("algorithm=soup", *BASE, place)
    assert checkpoint_bytes(config) == pytest.approx(4_086_532, rel=0.05)  # of a real run's model and optimizer files
    config.actor_rollout_ref.actor.checkpoint.save_contents = ["model", "optimizer", "extra", "hf_model"]
    monkeypatch.setattr(disk, "parameters", lambda _: 1e9)
    for free, words in ((15, "a checkpoint takes about 16 GB"), (63, "the 4 of this run take"), (65, None)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free * GB))  # pyright: ignore[reportAttributeAccessIssue]
        if words:
            with pytest.raises(SystemExit, match=words):
                disk.check_disk(config)
        else:
            assert str(tmp_path) in disk.check_disk(config)
    whole = checkpoint_bytes(config)
    config.actor_rollout_ref.model.lora_rank = 8
    assert whole == pytest.approx(16e9)
    assert checkpoint_bytes(config) == pytest.approx(8e9)  # adapters have moments, and nothing else has
    config.actor_rollout_ref.model.lora_rank = 0
    config.trainer.max_actor_ckpt_to_keep = 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 20 * GB))  # pyright: ignore[reportAttributeAccessIssue]
    disk.check_disk(config)
    assert "no checkpoints" in disk.check_disk(composed("algorithm=soup", *BASE, "trainer.save_freq=-1"))


def test_little_shared_memory_is_told_and_no_problem(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("algorithm=soup", *BASE)
    assert "are free in /dev/shm" in machine.check_shared_memory(config)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 64 * 10**6))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CannotTell, match=r"0\.1 GB free, and Ray's object store wants 1\.0 GB.*--shm-size"):
        machine.check_shared_memory(config)


# ---------------------------------------------------------------- what is tried out


@pytest.fixture
def tried(composed: Compose, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Rows and overrides to what each trial says; what is refused begins with !"""

    def try_out(rows: list[dict[str, Any]], *overrides: str) -> dict[str, str]:
        path = tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        config = composed("algorithm=soup", *BASE, f"data.train_files={path}", *overrides)
        said = {}
        for subject, trial in Trials().all().items():
            try:
                said[subject] = trial(config)
            except SystemExit as refusal:
                said[subject] = f"!{refusal.code}"
            except CannotTell as unknown:
                said[subject] = f"?{unknown}"
        return said

    return try_out


def rows(*prompts: Any, **changes: Any) -> list[dict[str, Any]]:
    truth = {"style": "rule", "ground_truth": {"numbers": [3, 5, 7], "target": 22}}
    return [{"data_source": "countdown", "prompt": prompt, "reward_model": truth, **changes} for prompt in prompts]


def test_lengths_of_real_prompts(tried: Callable[..., dict[str, str]]) -> None:
    mixed = rows(*[PROMPT] * 30, *[LONG] * 2)
    assert tried(rows(PROMPT))["training prompts"] == "of the first 1 rows, prompts have 9 to 9 tokens"
    said = tried(mixed)["training prompts"]
    assert said.startswith("!data.max_prompt_length=16: 2 of 32 training prompts are longer (up to ")
    assert "cut their beginnings off" in said
    assert "verl drops the 2 that are longer" in tried(mixed, "data.filter_overlong_prompts=true")["training prompts"]
    assert "drops them all" in tried(rows(LONG), "data.filter_overlong_prompts=true")["training prompts"]


def test_prompts_that_cannot_be_made(tried: Callable[..., dict[str, str]]) -> None:
    template = "actor_rollout_ref.model.custom_chat_template='{{ raise_exception(\\'no such role\\') }}'"
    said = tried(rows(PROMPT), template)["training prompts"]
    assert said.startswith("!data.train_files=")
    assert "no prompt can be made of its row 0 (TemplateError: no such role)" in said
    assert "cannot be read ('int' object is not iterable)" in tried([{"prompt": 3}])["training prompts"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1.0", "have the reward 1"),
        ("return {'score': float('=' in solution_str), 'why': None}", "have the reward 0"),
        ("return {'reward': 1.0}", "failed on the response '' to row 0 (KeyError: 'score')"),
        ("return None", "the reward None is not one finite number"),
        ("return float('nan')", "the reward nan is not one finite number"),
        ("return ground_truth['missing']", "failed on the response '' to row 0 (KeyError: 'missing')"),
        ("return 1 / len(solution_str)", "failed on the response '' to row 0 (ZeroDivisionError: "),
        ("return extra_info['num_turns']", "have the reward 2"),
        ("import nowhere", "failed on the response '' to row 0 (ModuleNotFoundError: No module named 'nowhere')"),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_reward_is_called_as_verl_calls_it(
    tried: Callable[..., dict[str, str]], tmp_path: Path, kind: str, body: str, words: str
) -> None:
    file = tmp_path / "reward.py"
    file.write_text(f"{kind} compute_score(*, extra_info, ground_truth, solution_str, data_source):\n    {body}\n")
    said = tried(rows(PROMPT), f"reward.custom_reward_function.path={file}")["reward's scores"]
    assert words in said


def test_reward_kwargs_reach_the_function(tried: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info, bonus):\n    return bonus\n"
    )
    path = f"reward.custom_reward_function.path={file}"
    assert "missing a required argument: 'bonus'" in tried(rows(PROMPT), path)["reward's scores"]
    said = tried(rows(PROMPT), path, "+reward.custom_reward_function.reward_kwargs.bonus=3")["reward's scores"]
    assert "have the reward 3" in said


def test_a_reward_that_cannot_be_imported(tried: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("raise RuntimeError('no key')\n")
    said = tried(rows(PROMPT), f"reward.custom_reward_function.path={tmp_path}/reward.py")["reward's scores"]
    assert "cannot be loaded (RuntimeError: no key); mend it" in said


def test_a_tokenizer_that_cannot_end_a_response(
    tried: Callable[..., dict[str, str]], tmp_path: Path, countdown_dir: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(countdown_dir / "base_model", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    said = tried(rows(PROMPT), f"actor_rollout_ref.model.path={folder}")
    assert "has no eos_token, so no response would end" in said["tokenizer"]
    assert said["training prompts"] == "?the tokenizer was not loaded"
    (folder / "tokenizer.json").write_text("{")
    assert (
        "no model can be read from there" in tried(rows(PROMPT), f"actor_rollout_ref.model.path={folder}")["tokenizer"]
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("", "64 rows are 4 steps of 16 prompts; the run has 4, and lag=2"),
        ("algorithm.soup.lag=4", "so no prefix ever gets as old as lag=4"),
        ("algorithm.soup.lag=4 algorithm.soup.warm_start=pure", "algorithm.soup.lag=4: the run has 4 steps"),
        ("algorithm.soup.lag=4 trainer.total_epochs=2", "the run has 8, and lag=4"),
        ("algorithm.soup.lag=2 trainer.total_training_steps=2", "the run has 2 steps"),
        ("algorithm.soup.source=replay", "algorithm.soup.source=replay: 64 rows are 4 steps"),
        ("algorithm.soup.source=replay trainer.total_epochs=2", "the run has 8"),
        ("data.train_max_samples=32", "the run has 2 steps (32 rows are 2 steps"),
        ("algorithm.soup.mixed_share=0 algorithm.soup.lag=99", "the run has 4"),
    ],
)
def test_steps_against_the_age_of_prefixes(composed: Compose, tmp_path: Path, overrides: str, words: str) -> None:
    pd.DataFrame(rows(*[PROMPT] * 64)).to_parquet(tmp_path / "rows.parquet")
    given = [f"data.train_files={tmp_path}/rows.parquet", "algorithm.soup.lag=2", *overrides.split()]
    config = composed("algorithm=soup", *BASE, *given)
    if words.startswith("algorithm."):
        with pytest.raises(SystemExit) as refusal:
            check_age(config)
        assert words in str(refusal.value.code)
    else:
        assert words in check_age(config)


def test_what_a_start_checks_is_examined() -> None:
    assert set(INSTEAD) <= set(AT_START)
