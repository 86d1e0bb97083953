"""What cannot run is refused at start in a sentence, whatever the algorithm; and what runs is not."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from refusals import sentence

from recipe.soup.checks.callbacks import RefuseWhatCannotRun
from recipe.soup.checks.config import check_config
from recipe.soup.checks.correction import REJECTIONS
from recipe.soup.checks.model import check_folder
from recipe.soup.checks.outputs import TRACKERS
from recipe.soup.checks.reward import known_sources
from recipe.soup.checks.start import AT_START, check_start
from recipe.soup.checks.tables import read_table
from recipe.soup.settings import parse_settings
from recipe.soup.verl_adapter.run_facts import run_facts

Compose = Callable[..., DictConfig]
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
CORRECTION = "algorithm.rollout_correction"
SECONDS = 2.0
"""All checks of a start, once their modules are imported."""


def row(**changes: Any) -> dict[str, Any]:
    """A row in verl's columns; a value of None drops its column."""
    whole = {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": "3 5 7=22:"}],
        "reward_model": {"style": "rule", "ground_truth": {"numbers": [3, 5, 7], "target": 22}},
        "extra_info": {"index": 0},
    }
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, countdown_dir: Path) -> Path:
    """Small datasets and models, each with something missing."""
    folder = tmp_path_factory.mktemp("cases")
    rows = {
        "good": [row()] * 64,
        "ten": [row()] * 10,
        "no_prompt": [{**row(prompt=None), "question": "3 5 7=22:"}] * 64,
        "no_reward_model": [row(reward_model=None)] * 64,
        "no_truth": [row(reward_model={"style": "rule"})] * 64,
        "text_truth": [row(reward_model="22")] * 64,
        "no_source": [row(data_source=None)] * 64,
        "known_source": [row(data_source="openai/gsm8k")] * 64,
        "two_sources": [row(), row(data_source="aime24")] * 32,
        "no_extra": [row(extra_info=None)] * 64,
        "text_prompt": [row(prompt="3 5 7=22:")] * 64,
    }
    for name, written in rows.items():
        pd.DataFrame(written).to_parquet(folder / f"{name}.parquet")
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in written))
    pd.DataFrame([*rows["good"][:63], {**row(), "prompt": None}]).to_parquet(folder / "null_prompt.parquet")
    pd.DataFrame(rows["good"][:0], columns=list(row())).to_parquet(folder / "zero.parquet")
    (folder / "good.json").write_text(json.dumps(rows["good"]))
    (folder / "empty.jsonl").write_text("")
    (folder / "rows.csv").write_text("prompt\nx\n")
    (folder / "reward.py").write_text("from math import *\n")
    (folder / "broken.py").write_text("def compute_score(:\n")
    for name in ("whole", "no_template", "hollow", "unreadable"):
        shutil.copytree(countdown_dir / "base_model", folder / name)
    (folder / "no_template/chat_template.jinja").unlink()
    (folder / "hollow/model.safetensors").unlink()
    (folder / "unreadable/config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "global_step_4").mkdir()
    return folder


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "TMPDIR", "RAY_TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def check(config: DictConfig) -> None:
    """All that the callbacks of a run with `algorithm=soup` check before Ray starts."""
    check_start(config)
    parse_settings(config.algorithm.soup, config.actor_rollout_ref.rollout.response_length)
    check_config(config)


COLUMN = "data.train_files={out}/"
PATH = f"{MODEL}.path={{out}}"
REWARD = "reward.custom_reward_function"
REFUSED = [
    # Datasets.
    ("data.train_batch_size=8192", "data.train_batch_size=8192: data.train_files has 4096 rows, which fill no batch"),
    ("data.train_max_samples=12", "data.train_batch_size=16: data.train_max_samples=12 leaves 12 rows"),
    (f"{COLUMN}ten.parquet", "data.train_batch_size=16: data.train_files has 10 rows"),
    *((f"{COLUMN}no_prompt.{kind}", "data.prompt_key=prompt: {out}/no_prompt.") for kind in ("parquet", "jsonl")),
    *((f"{COLUMN}no_reward_model.{kind}", "has no `ground_truth` in a column") for kind in ("parquet", "jsonl")),
    *((f"{COLUMN}no_truth.{kind}", "has no `ground_truth` in a column") for kind in ("parquet", "jsonl")),
    *((f"{COLUMN}text_truth.{kind}", "`reward_model` is no mapping") for kind in ("parquet", "jsonl")),
    *((f"{COLUMN}no_source.{kind}", "has no column `data_source`") for kind in ("parquet", "jsonl")),
    *((f"{COLUMN}text_prompt.{kind}", "is no list of messages") for kind in ("parquet", "jsonl")),
    (f"{COLUMN}null_prompt.parquet", "`prompt` is empty in some row"),
    (f"{COLUMN}zero.parquet", "has no rows"),
    (f"{COLUMN}empty.jsonl", "has no rows"),
    (f"{COLUMN}rows.csv", "cannot be read as csv (verl reads .parquet, .json, .jsonl)"),
    ("data.train_files={out}", "cannot be read as a dataset"),
    ("data.val_files={out}/no_source.parquet", "has no column `data_source`"),
    ("data.val_files={out}/zero.parquet", "has no rows"),
    ("data.val_files=null", "data.val_files=None: verl reads both sets"),
    ("data.val_files=[]", "data.val_files=[]: verl reads both sets"),
    ("data.train_files='~/nothing.parquet'", "nothing.parquet: no such file"),
    ("data.prompt_key=question", "data.prompt_key=question: "),
    # The model.
    (f"{PATH}/no_template", "no chat template"),
    (f"{PATH}/hollow", "a config.json but no weights"),
    (f"{PATH}/unreadable", "its config.json cannot be read"),
    (PATH, "has no config.json"),
    (f"{PATH}/whole/config.json", "is a file; give its folder"),
    (f"{MODEL}.path=runs/of/mine", "no such folder in "),
    (f"{MODEL}.path=/no/such/model", "no such folder"),
    (f"{ROLLOUT}.max_model_len=100000", "max_position_embeddings"),
    (f"data.max_response_length=100000 {ROLLOUT}.max_model_len=null", "so responses would be cut short"),
    (f"{MODEL}.use_fused_kernels=true", f"{MODEL}.use_fused_kernels=True: this model has a head of its own"),
    # The reward.
    (f"{REWARD}.path=/nope.py", f"{REWARD}.path=/nope.py: no such file"),
    (f"{REWARD}.path=pkg://nowhere.reward", "no such module"),
    (f"{REWARD}.path={{out}}/broken.py", "is no Python that can be read"),
    (f"{REWARD}.name=nope", f"{REWARD}.name=nope: pkg://examples.countdown.reward has no such function (it has comp"),
    (f"{REWARD}.name=null", f"{REWARD}.name=None: "),
    (f"{REWARD}.path=null", "verl has no reward function for data_source=countdown"),
    # Lengths and batches.
    (f"{ROLLOUT}.max_model_len=20", "use 40 or more"),
    ("data.max_response_length=64", f"{ROLLOUT}.max_model_len=64: "),
    (f"{ACTOR}.ppo_mini_batch_size=32", "a divisor of data.train_batch_size=16"),
    (f"{ACTOR}.ppo_mini_batch_size=5", "a divisor of data.train_batch_size=16"),
    ("data.gen_batch_size=32", "data.gen_batch_size=32: "),
    # Numbers.
    ("trainer.total_training_steps=0", "verl would train no step"),
    ("trainer.total_training_steps=-1", "verl would train no step"),
    ("trainer.total_epochs=0", "verl would train no step"),
    *(
        (f"{key}={value}", f"{key}={value}: must be a whole number of 1 or more.")
        for key in (
            f"{ROLLOUT}.n",
            f"{ROLLOUT}.max_num_seqs",
            f"{ROLLOUT}.tensor_model_parallel_size",
            f"{ROLLOUT}.agent.num_workers",
            f"{ACTOR}.ppo_mini_batch_size",
            f"{ACTOR}.ppo_epochs",
            "data.train_batch_size",
            "trainer.n_gpus_per_node",
            "trainer.nnodes",
            "reward.num_workers",
        )
        for value in ("0", "-8", "many", "2.5")
    ),
    *(
        (f"{key}=null", f"{key}=None: must be a whole number of 1 or more.")
        for key in (
            f"{ROLLOUT}.n",
            f"{ROLLOUT}.prompt_length",
            f"{ROLLOUT}.pipeline_model_parallel_size",
            f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size",
        )
    ),
    ("data.gen_batch_size=many", "data.gen_batch_size=many: must be a whole number of 1 or more."),
    ("trainer.total_epochs=null", "trainer.total_epochs=None: must be a whole number."),
    ("trainer.total_training_steps=2.5", "trainer.total_training_steps=2.5: must be a whole number."),
    (f"{ACTOR}.ppo_max_token_len_per_gpu=null", f"{ACTOR}.ppo_max_token_len_per_gpu=None: a sequence may have"),
    ("trainer.default_local_dir=10", "trainer.default_local_dir=10: is no path; give a folder."),
    ("trainer.rollout_data_dir=[1]", "trainer.rollout_data_dir=[1]: is no path; give a folder, or null."),
    (f"{ROLLOUT}.temperature=nan", f"{ROLLOUT}.temperature=nan: "),
    (f"{ROLLOUT}.temperature=inf", f"{ROLLOUT}.temperature=inf: "),
    (f"{ROLLOUT}.val_kwargs.n=0", f"{ROLLOUT}.val_kwargs.n=0: "),
    (f"{ROLLOUT}.val_kwargs.temperature=-1", f"{ROLLOUT}.val_kwargs.temperature=-1: "),
    (f"{ROLLOUT}.val_kwargs.top_p=0", f"{ROLLOUT}.val_kwargs.top_p=0: "),
    (f"{ROLLOUT}.val_kwargs.top_k=-5", f"{ROLLOUT}.val_kwargs.top_k=-5: "),
    (f"{ROLLOUT}.gpu_memory_utilization=1.5", f"{ROLLOUT}.gpu_memory_utilization=1.5: "),
    (f"{ACTOR}.optim.lr=-1e-6", f"{ACTOR}.optim.lr=-1e-06: "),
    (f"{ACTOR}.optim.lr=nan", f"{ACTOR}.optim.lr=nan: "),
    (f"{ROLLOUT}.seed=null", f"{ROLLOUT}.seed=None: "),
    (f"{ROLLOUT}.seed=-1", f"{ROLLOUT}.seed=-1: "),
    (f"{ROLLOUT}.seed=0.5", f"{ROLLOUT}.seed=0.5: "),
    # Rollout correction.
    (f"{CORRECTION}.rollout_rs=token_k1", f"{CORRECTION}.rollout_rs_threshold=None: "),
    (f"{CORRECTION}.rollout_rs=token {CORRECTION}.rollout_rs_threshold=2", f"{CORRECTION}.rollout_rs=token: "),
    (f"{CORRECTION}.rollout_rs=token_k2 {CORRECTION}.rollout_rs_threshold='0.5_2'", "a number above 0 is wanted"),
    (f"{CORRECTION}.rollout_is=group", f"{CORRECTION}.rollout_is=group: "),
    (f"{CORRECTION}.rollout_is=token {CORRECTION}.rollout_is_threshold=0", "above 0"),
    # What the run writes.
    ("trainer.logger=wandb", "wandb has no key here"),
    ("trainer.logger=[console,wandb]", "trainer.logger=wandb: "),
    ("trainer.logger=[console,mlflow]", "mlflow is not installed here"),
    ("trainer.logger=[csv]", "verl has no such tracker"),
    ("trainer.save_freq=1 trainer.default_local_dir=/proc/x", "trainer.default_local_dir=/proc/x: nothing can be"),
    ("trainer.save_freq=-1 algorithm.soup.sigterm_grace=60", "algorithm.soup.sigterm_grace=60: saves a checkpoint"),
    ("trainer.rollout_data_dir=/proc/x", "trainer.rollout_data_dir=/proc/x: nothing can be"),
    ("trainer.validation_data_dir=/proc/x", "trainer.validation_data_dir=/proc/x: nothing can be"),
    ("trainer.resume_mode=resume_path", "trainer.resume_from_path=None: "),
    ("trainer.resume_mode=resume_path trainer.resume_from_path={out}/global_step_8", "no such folder"),
    ("trainer.resume_mode=resume_path trainer.resume_from_path={out}/global_step_4/", "without a / behind it"),
    ("trainer.resume_mode=resume_path trainer.resume_from_path={out}/good", "global_step_N"),
    ("trainer.resume_mode=latest", "trainer.resume_mode=latest: "),
    # The machine.
    ("ray_kwargs.ray_init.num_cpus=4", "verl reserves 5 CPUs in all, but this machine has 4"),
    ("trainer.n_gpus_per_node=4", "trainer.n_gpus_per_node=4: a run of 4 GPUs in all, but this machine has 2"),
    # SOUP's own.
    (f"{MODEL}.lora_rank=8 algorithm.soup.source=snapshot", f"{MODEL}.lora.merge=False: "),
    ("algorithm.soup.lag=1e3", "algorithm.soup.lag=1000.0: must be a whole number"),
    ("algorithm.soup.lag=2.5", "algorithm.soup.lag=2.5: must be a whole number"),
    ("algorithm.soup.mixed_share=nan", "between 0 and 1"),
    ("algorithm.soup.prefix_length.max=1000", "algorithm.soup.prefix_length.max=1000"),
    ("algorithm.soup.samples_per_prefix=3", "use a divisor of it"),
    (f"{ACTOR}.policy_loss.loss_mode=gpg", "loss_mode=gpg: "),
]
ACCEPTED = [
    "",
    "data.train_batch_size=8",
    "trainer.total_training_steps=null",
    "trainer.rollout_data_dir=null",
    f"{ROLLOUT}.max_num_seqs=null",
    f"{ROLLOUT}.n=3",
    "data.max_prompt_length=4",  # verl cuts the beginnings of longer ones off, and says so in its log
    *(f"{COLUMN}{name}" for name in ("good.parquet", "good.jsonl", "good.json", "no_extra.parquet")),
    f"{COLUMN}null_prompt.parquet data.filter_overlong_prompts=true",
    f"{COLUMN}text_prompt.parquet +data.custom_cls.path=mine.py",
    f"{COLUMN}no_truth.parquet reward.reward_manager.source=importlib",
    f"{COLUMN}known_source.parquet {REWARD}.path=null",
    f"{COLUMN}two_sources.parquet {REWARD}.path=null",  # the samples of one are lost, which is counted
    f"{COLUMN}good.parquet data.train_batch_size=64 {ACTOR}.ppo_mini_batch_size=64",
    f"{REWARD}.path={{out}}/reward.py {REWARD}.name=whatever",  # what it imports is only known when it runs
    f"{PATH}/whole",
    f"{PATH}/no_template {MODEL}.custom_chat_template=x",
    f"{PATH}/no_template {MODEL}.tokenizer_path={{out}}/whole",
    f"{MODEL}.use_fused_kernels=true {ACTOR}.strategy=fsdp",
    f"{MODEL}.use_fused_kernels=true +{MODEL}.override_config.tie_word_embeddings=true",
    "trainer.total_training_steps=0 trainer.val_only=true",
    f"{ROLLOUT}.val_kwargs.n=0 trainer.val_before_train=false trainer.test_freq=-1",
    f"{CORRECTION}.rollout_is=token",
    f"{CORRECTION}.rollout_is=sequence {CORRECTION}.rollout_is_threshold='0.5_2'",
    f"{CORRECTION}.rollout_rs=token_k1 {CORRECTION}.rollout_rs_threshold=2.0",
    f"{CORRECTION}.rollout_rs='token_k1,seq_mean_k3' {CORRECTION}.rollout_rs_threshold='0.5_2,3'",
    f"{CORRECTION}.bypass_mode=true",
    f"algorithm.soup.ratio=decoupled {CORRECTION}.rollout_is=sequence",
    "algorithm.filter_groups.enable=true",
    "algorithm.filter_groups.enable=true data.gen_batch_size=32",
    "trainer.logger=console",
    "trainer.save_freq=-1 trainer.default_local_dir=/proc/x",
    "ray_kwargs.ray_init.num_cpus=5",
    "trainer.n_gpus_per_node=2",
    f"{ACTOR}.optim.lr=0",
]


def composed_with(composed: Compose, out: Path, algorithm: str, overrides: str) -> DictConfig:
    given = [override.format(out=out) for override in overrides.split()]
    return composed(f"algorithm={algorithm}", "hardware=cpu", "example=countdown", *given)


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_refused(composed: Compose, out: Path, overrides: str, words: str) -> None:
    text = sentence(check, composed_with(composed, out, "soup", overrides))
    assert words.format(out=out) in text


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(composed: Compose, out: Path, overrides: str) -> None:
    check(composed_with(composed, out, "soup", overrides))


@pytest.mark.parametrize("algorithm", ["grpo", "verl"])
@pytest.mark.parametrize(("overrides", "words"), [case for case in REFUSED if "soup" not in case[0] + case[1]])
def test_refused_without_soup(composed: Compose, out: Path, algorithm: str, overrides: str, words: str) -> None:
    if "loss_mode" not in overrides:
        text = sentence(check_start, composed_with(composed, out, algorithm, overrides))
        assert words.format(out=out) in text


def test_a_start_is_checked_in_a_moment(composed: Compose, out: Path) -> None:
    config = composed_with(composed, out, "soup", "")
    began = time.perf_counter()
    check(config)
    assert time.perf_counter() - began < SECONDS


def test_trackers_that_can_log_are_accepted(composed: Compose, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed_with(composed, out, "grpo", "trainer.logger=[wandb]")
    for name, value in (("WANDB_API_KEY", "x"), ("WANDB_MODE", "offline"), ("WANDB_BASE_URL", "http://ours")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_start(config)
    config.ray_kwargs.ray_init.runtime_env.env_vars = {"WANDB_MODE": "offline"}
    check_start(config)
    config.ray_kwargs.ray_init.runtime_env.env_vars = {}
    (Path.home() / ".netrc").write_text("machine ours login user password x\n")
    check_start(config)


def test_rows_of_a_large_json_are_not_counted(composed: Compose, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.soup.checks.tables.COUNTED_BYTES", 1000)
    for kind in ("json", "jsonl"):
        path = out / f"good.{kind}"
        table = read_table("data.train_files", path)
        assert (table.rows, table.columns["prompt"]) == (None, "messages")
        check_start(composed_with(composed, out, "soup", f"data.train_files={path} data.train_batch_size=512"))


@pytest.mark.parametrize(("group", "refuses"), [("soup", True), ("grpo", True), ("verl", True), (None, False)])
def test_it_is_asked_with_each_algorithm_and_not_without(group: str | None, refuses: bool) -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [f"algorithm={group}"] if group else [], return_hydra_config=True)
    targets = [callback["_target_"] for callback in config.hydra.callbacks.values()]
    assert (f"{RefuseWhatCannotRun.__module__}.{RefuseWhatCannotRun.__name__}" in targets) == refuses


def test_a_check_that_breaks_stops_the_run(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise KeyError("missing")

    monkeypatch.setitem(AT_START, "sizes", broken)
    with pytest.raises(SystemExit, match=r"KeyError.*bug of ours"):
        RefuseWhatCannotRun().on_job_start(composed("algorithm=grpo"))


@pytest.mark.parametrize(("folder", "words"), [("hollow", "no weights"), ("no_template", "no chat template")])
def test_a_model_that_is_only_sampled(out: Path, folder: str, words: str) -> None:
    check_folder("model", str(out / "whole"), template=True)
    check_folder("model", "nobody/nothing", template=True)
    with pytest.raises(SystemExit, match=rf"^model={out / folder}: .*{words}"):
        check_folder("model", str(out / folder), template=True)


@pytest.mark.parametrize(("steps", "last"), [(0, 0), (None, 256), (80, 80), (9999, 256)])
def test_no_step_is_none(composed: Compose, steps: int | None, last: int) -> None:
    config = composed("algorithm=soup", "hardware=cpu", "example=countdown")
    config.trainer.total_training_steps = steps
    assert run_facts(config, 4096, 0).last_step == last


def test_verl_knows_the_same_names(out: Path) -> None:
    correction = resolve_name("verl.trainer.ppo.rollout_corr_helper.SUPPORTED_ROLLOUT_RS_OPTIONS")
    assert set(REJECTIONS) == correction
    trackers = resolve_name("verl.utils.tracking.Tracking").supported_backend
    assert set(TRACKERS) == {*trackers, "tracking"}
    score = resolve_name("verl.utils.reward_score.default_compute_score")
    known = known_sources()
    assert known is not None
    assert {"openai/gsm8k", "math_dapo", "hiyouga/geometry3k", "searchR1_nq"} <= known[0]
    assert known[1] == {"aime"}
    with pytest.raises(NotImplementedError):
        score("countdown", "", "")


def test_kinds_of_columns_whose_keys_are_in_the_rows(composed: Compose, tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    for prompt in (
        pa.list_(message),
        pa.large_list(message),
        pa.list_(message, 1),
        pa.list_(pa.map_("string", "string")),
    ):
        kinds = {
            "prompt": prompt,
            "reward_model": pa.map_("string", "string"),
            "data_source": pa.dictionary("int8", "string"),
        }
        messages = row()["prompt"] if not pa.types.is_map(prompt.value_type) else [list(row()["prompt"][0].items())]
        values = {"prompt": messages, "reward_model": [("ground_truth", "22")], "data_source": "x"}
        table = pa.table({name: pa.array([values[name]] * 16, kind) for name, kind in kinds.items()})
        parquet.write_table(table, tmp_path / "rows.parquet")
        check_start(composed_with(composed, tmp_path, "soup", "data.train_files={out}/rows.parquet"))
