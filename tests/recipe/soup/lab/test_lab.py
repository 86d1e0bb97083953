"""The lab is the real path's mathematics: same loss, same gradient, same bookkeeping."""

import contextlib
import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig
from training_worker import COUNTDOWN, STEP, Store, WorkerGroup, as_demonstrations, make_trainer, recorded
from transformers import AutoModelForCausalLM

from examples.countdown.build_data import to_row
from examples.countdown.task import random_problem, solutions
from recipe.soup.lab.checkpoint import checkpoint_to_resume
from recipe.soup.lab.driver import Lab
from recipe.soup.lab.forward import Sample, forward, of_responses
from recipe.soup.lab.sampler import sample
from recipe.soup.lab.update import Updater, fields_of_loss, rows_before_update
from recipe.soup.records.earlier_runs import hold
from recipe.soup.records.metrics_file import read_metrics
from recipe.soup.settings import parse_settings
from recipe.soup.verl_adapter.trainer import SoupTrainer
from verl_ext.health import NOTICE, RunEndedError

ACTOR = "actor_rollout_ref.actor"
SMALL = (
    "data.train_batch_size=4",
    "data.val_max_samples=8",
    "trainer.total_training_steps=6",
    f"{ACTOR}.optim.lr=1e-3",
)
EOS = 1


def example(composed: Any, *overrides: str) -> DictConfig:
    return composed("example=countdown", "algorithm=soup", *SMALL, f"{ACTOR}.ppo_mini_batch_size=2", *overrides)


# ---------------------------------------------------------------- one batch through verl's worker, and through the lab


RIVALS = ("gspo", "sapo", "cispo", "clip_cov", "dppo_tv", "dppo_kl")
"""Losses of verl's that `recipe/soup/checks/losses.py` lets through, but for `kl_cov`: it adds |log ratio|, whose
gradient at a ratio of 1 is the sign of the rounding."""
VARIANTS = {
    "behavior": [],
    "shaped": ["algorithm.soup.ratio=shaped"],
    "decoupled": ["algorithm.soup.ratio=decoupled"],
    "masked": ["algorithm.soup.prefix_gradient=0.3", "algorithm.soup.loss_tokens=trained"],
    "budget": ["algorithm.soup.second_moment=0.005", "algorithm.soup.prefix_clip.high=inf"],
    "behind": ["algorithm.soup.continuation_weight=window", "algorithm.soup.continuation_window.high=inf"],
    "whole": ["algorithm.soup.continuation_weight=whole"],
    "negatives": ["algorithm.soup.stale_negatives.low=0.9", "algorithm.soup.loss_tokens=trained"],
    "running product": [f"{ACTOR}.policy_loss.loss_mode=ctpo"],
    "separate": ["algorithm.soup.baseline=separate", "algorithm.adv_estimator=rloo"],
    "pass@k": ["algorithm.adv_estimator=pass_at_k"],
    **{name: [f"{ACTOR}.policy_loss.loss_mode={name}"] for name in RIVALS},
    "entropy": [f"{ACTOR}.entropy_coeff=0.01", f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"],
    "imitation": [
        "algorithm.soup.source=dataset",
        "algorithm.soup.ratio=nll",
        "algorithm.soup.nll_coefficient=0.1",
        "algorithm.soup.demonstrations.gate=unsolved",
    ],
    "luffy": ["algorithm.soup.source=dataset", "algorithm.soup.ratio=luffy", "algorithm.soup.prefix_gradient=0.5"],
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("variant", VARIANTS)
def test_lab_and_verl_give_the_same_loss_and_gradient(variant: str, composed: Any, store: Store) -> None:
    one_mini_batch = f"{ACTOR}.ppo_mini_batch_size=8"
    config = composed(*COUNTDOWN, "algorithm=soup", one_mini_batch, *VARIANTS[variant])
    torch.manual_seed(0)
    lab_config = copy.deepcopy(config)
    group = WorkerGroup(config, store)
    trainer = make_trainer(SoupTrainer, config, group)
    batch = recorded(store)
    if config.algorithm.soup.source == "dataset":
        as_demonstrations(store)
    trainer._install_loss()
    metrics: dict = {}
    batch = trainer._compute_advantage(trainer._compute_old_log_prob(batch, metrics), metrics)
    trainer._update_actor(batch, metrics)
    optimizer = group.worker.actor.engine.optimizer
    # Adam's first moment after one step.
    states = [optimizer.state[parameter]["exp_avg"] for parameter in optimizer.param_groups[0]["params"]]
    theirs = torch.cat([state.full_tensor().flatten() for state in states]) / (1 - 0.9)

    samples = [
        Sample(
            row["prompts"].tolist(),
            row["responses"].tolist(),
            row["policy_versions"].tolist(),
            row["rollout_log_probs"].tolist(),
            float(row["rm_scores"].sum()),
            row["uid"],
        )
        for row in (store.rows[key] for key in batch.keys)
    ]
    model = AutoModelForCausalLM.from_pretrained(config.actor_rollout_ref.model.path, dtype=torch.float32)
    settings = parse_settings(config.algorithm.soup, config.actor_rollout_ref.rollout.response_length)
    rows = rows_before_update(model, samples, 1.0, STEP - 1)
    fields, _ = fields_of_loss(rows, settings, lab_config)
    updater = Updater(model, torch.optim.SGD(model.parameters()), lab_config, settings)
    loss, ours = updater.loss(samples, fields, slice(None))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert gradient.norm() > 0.01
    assert torch.allclose(gradient, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    assert float(ours["actor/pg_loss"].aggregate()) == pytest.approx(float(metrics["actor/pg_loss"]), abs=1e-6)


# ---------------------------------------------------------------- the sampler


@pytest.fixture(scope="module")
def model(countdown_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(countdown_dir / "base_model", dtype=torch.float32)


PROMPTS = [[5, 18, 7, 18, 9, 14, 4, 4, 17], [5, 14, 4, 17], [11, 18, 3, 18, 3, 14, 6, 17]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_those_of_a_plain_forward(model: torch.nn.Module, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    limits = [24, 5, 1] * 10
    answers = sample(model, PROMPTS * 10, limits, 3, temperature, EOS, generator)
    samples = [
        Sample(prompt, a.token_ids, [3] * len(a.token_ids), a.log_probs, 0.0, 0)
        for prompt, a in zip(PROMPTS * 10, answers, strict=True)
    ]
    with torch.no_grad():
        log_probs = of_responses(forward(model, samples, temperature)[0], samples)
    for row, answer, limit in zip(log_probs, answers, limits, strict=True):
        length = len(answer.token_ids)
        assert answer.log_probs == pytest.approx(row[:length].tolist(), abs=3e-5)  # padded on the other side
        assert 1 <= length <= limit
        assert EOS not in answer.token_ids[:-1]
        assert length == limit or answer.token_ids[-1] == EOS
        assert answer.extra_fields["global_steps"] == 3
    assert any(answer.token_ids[-1] == EOS for answer in answers)


def test_sampled_tokens_follow_the_models_distribution(model: torch.nn.Module) -> None:
    """First tokens after one prompt, against their probabilities: chi-square, a bound that fails once in 10,000."""
    n = 4000
    answers = sample(model, [PROMPTS[0]] * n, [1] * n, 0, 1.0, EOS, torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1).double().numpy() * n
    counts = np.bincount([answer.token_ids[0] for answer in answers], minlength=len(expected))
    large = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[large].sum()
    freedom = large.sum() - 1
    assert statistic < freedom + 3.72 * np.sqrt(2 * freedom) + 8


# ---------------------------------------------------------------- whole steps


def test_prefixes_are_samples_of_the_version_that_they_claim(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(example(composed, "algorithm.soup.lag=2", "algorithm.soup.warm_start=pure"))
    versions, seen = [copy.deepcopy(lab.model)], []
    update = lab.updater.update

    def record(samples: list[Sample], fields: dict[str, torch.Tensor]) -> dict[str, float]:
        seen.append((samples, fields))
        return update(samples, fields)

    monkeypatch.setattr(lab.updater, "update", record)
    for step in range(1, 7):
        lab.step(step)
        versions.append(copy.deepcopy(lab.model))
    for step, (samples, fields) in enumerate(seen, start=1):
        claimed = {version for s in samples for version in s.versions}
        assert claimed == ({step - 3, step - 1} if step > 2 else {step - 1})
        for version in claimed:
            with torch.no_grad():
                log_probs = of_responses(forward(versions[version], samples, 1.0)[0], samples)
                other = of_responses(forward(versions[version - 1 if version else step], samples, 1.0)[0], samples)
            for row, values in enumerate(samples):
                at = torch.tensor(values.versions) == version
                old = fields["old_log_probs"][row, : len(at)][at]
                assert torch.allclose(old, log_probs[row][at], atol=1e-5)
            assert not torch.allclose(torch.cat(log_probs), torch.cat(other), atol=1e-2)


SOURCES = {
    "snapshot": ["algorithm.soup.source=snapshot", "algorithm.soup.snapshot.every=1", "algorithm.soup.lag=2"],
    "base": ["algorithm.soup.source=snapshot", "algorithm.soup.snapshot.policy=base"],
    "replay": ["algorithm.soup.source=replay", "data.train_max_samples=8", "algorithm.soup.prefix_length.unit=fraction",
               "algorithm.soup.prefix_length.min=0.1", "algorithm.soup.prefix_length.max=0.5"],
    "steered": ["algorithm.soup.source=replay", "algorithm.soup.selection=steered", "data.train_max_samples=8"],
    "candidates": ["algorithm.soup.selection=entropic", "algorithm.soup.candidates=2", "algorithm.soup.lag=2",
                   "algorithm.soup.samples_per_prefix=2", "algorithm.soup.baseline=two_level"],
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_runs(source: str, composed: Any) -> None:
    lab = Lab(example(composed, *SOURCES[source]))
    metrics = [lab.step(step) for step in range(1, 7)]
    assert metrics[-1]["soup/train/mixed/share"] == 0.5 or source == "steered"  # as far as outcomes are stored
    assert metrics[-1]["soup/train/mixed/share"] > 0
    assert metrics[-1]["soup/train/prefix/kl_k3_at_start"] > 0
    assert all(set(m) == set(metrics[0]) for m in metrics)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen problems, three of them without a demonstration."""
    rng = random.Random(0)
    problems = [problem for problem in (random_problem(rng) for _ in range(64)) if len(solutions(problem)) > 1][:16]
    rows = [to_row(problem, i, solutions(problem)[: 2 * (i > 2)]) for i, problem in enumerate(problems)]
    path = tmp_path_factory.mktemp("demonstrations") / "train.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


DEMONSTRATED = {
    "luffy": ["ratio=luffy", "mixed_share=0.125", "prefix_length.distribution=whole"],
    "prefixes": ["ratio=detached", "prefix_gradient=0.2", "prefix_length.unit=fraction", "prefix_length.min=0.1",
                 "prefix_length.max=0.9", "baseline=separate"],
    "context": ["ratio=nll", "prefix_gradient=0", "samples_per_prefix=2"],
    "unsolved": ["ratio=nll", "nll_coefficient=0.1", "demonstrations.gate=unsolved"],
    "successes": ["ratio=nll", "prefix_length.distribution=whole", "demonstrations.gate=successes"],
}  # fmt: skip


@pytest.mark.parametrize("variant", DEMONSTRATED)
def test_demonstrations_in_the_lab(variant: str, composed: Any, demonstrations: Path) -> None:
    overrides = [f"algorithm.soup.{override}" for override in ("source=dataset", *DEMONSTRATED[variant])]
    lab = Lab(example(composed, f"data.train_files={demonstrations}", "trainer.total_epochs=2", *overrides))
    metrics = [lab.step(step) for step in range(1, 5)]  # once over the data
    whole = "prefix_length.distribution=whole" in DEMONSTRATED[variant]
    per_prompt = {"luffy": 1, "successes": 2}.get(variant, 4)
    name = "soup/train/demonstration"
    assert sum(m[f"{name}/samples"] for m in metrics) == 13 * per_prompt
    assert sum(m["soup/demonstrations/prompts_without"] for m in metrics) == 3
    for m in metrics:
        assert set(m) == set(metrics[0])
        assert m["soup/train/prefix/tokens"] == 0
        assert m["soup/train/continuation/engine_mismatch/max"] < 1e-4
        assert (m["soup/loss/prefix/tokens"] > 0) == (m[f"{name}/gate_open"] > 0)
        assert m["actor/grad_norm"] > 0
        assert (m[f"{name}/left_out"] > 0) <= (variant in ("unsolved", "successes"))
        if whole:
            assert m[f"{name}/reward"] == 1
            assert m["soup/train/mixed/without_continuation"] == m[f"{name}/samples"]
    assert (sum(m[f"{name}/left_out"] for m in metrics) > 0) == (variant in ("unsolved", "successes"))


def test_imitation_makes_demonstrations_likelier(composed: Any, demonstrations: Path) -> None:
    """SFT in this trainer: demonstrations alone, whatever the policy solves."""
    overrides = ["source=dataset", "ratio=nll", "prefix_length.distribution=whole", "demonstrations.gate=successes"]
    overrides = [f"algorithm.soup.{override}" for override in (*overrides, "demonstrations.gate_successes=8")]
    shown = [f"data.train_files={demonstrations}", "trainer.total_epochs=5", f"{ACTOR}.optim.lr=3e-4"]
    lab = Lab(example(composed, *shown, *overrides))
    told = [lab.step(step)["soup/train/demonstration/nll"] for step in range(1, 17)]  # four times over the data
    assert sum(told[12:]) < 0.9 * sum(told[:4])


def test_runs_with_the_same_seed_are_equal_and_with_another_they_are_not(composed: Any) -> None:
    runs = []
    for seed in (1, 1, 2):
        lab = Lab(example(composed, f"data.seed={seed}", "algorithm.soup.lag=1"))
        runs.append([lab.step(step) for step in (1, 2, 3)])
    timeless = [[{k: v for k, v in m.items() if not k.startswith("timing")} for m in run] for run in runs]
    assert timeless[0] == timeless[1] != timeless[2]


def test_what_only_the_real_path_can_do_is_refused(composed: Any) -> None:
    with pytest.raises(SystemExit, match=r"actor_rollout_ref.actor.use_kl_loss=True: only the real path"):
        Lab(example(composed, f"{ACTOR}.use_kl_loss=true"))
    with pytest.raises(SystemExit, match=r"algorithm.soup.sigterm_grace=60.0: only the real path"):
        Lab(example(composed, "algorithm.soup.sigterm_grace=60.0"))


def refusal_of(folder: Path, environ: dict[str, str], *overrides: str) -> str:
    """What `python -m recipe.soup.lab` says last, having ended by itself with an error."""
    command = [sys.executable, "-m", "recipe.soup.lab", "example=countdown", *SMALL, *overrides]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr[-3000:]
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        ("algorithm.rollout_correction.rollout_is=group", "algorithm.rollout_correction.rollout_is=group: choose one"),
        (f"{ACTOR}.ppo_mini_batch_size=3", f"{ACTOR}.ppo_mini_batch_size=3: verl would fill"),
        (
            f"{ACTOR}.use_dynamic_bsz=false",
            f"{ACTOR}.ppo_micro_batch_size_per_gpu=None: with use_dynamic_bsz=False it says",
        ),
        (
            f"{ACTOR}.ppo_max_token_len_per_gpu=null",
            f"{ACTOR}.ppo_max_token_len_per_gpu=None: with use_dynamic_bsz=True",
        ),
    ],
)
def test_what_the_real_path_refuses_of_a_step_the_lab_refuses(
    refused: str, sentence: str, tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    small = [] if "mini_batch" in refused else [f"{ACTOR}.ppo_mini_batch_size=2"]
    last = refusal_of(tmp_path, clean_environ, "algorithm=grpo", "actor_rollout_ref.rollout.n=32", *small, refused)
    assert last.startswith(sentence), last


def test_two_runs_of_one_name_at_a_time_are_refused(tmp_path: Path, clean_environ: dict[str, str]) -> None:
    """The second waits for as long as a run that was killed may take to end, and says what to do."""
    command = [sys.executable, "-m", "recipe.soup.lab", "example=countdown", "algorithm=grpo"]
    command += [f"{ACTOR}.ppo_mini_batch_size=2", "data.train_batch_size=4", "trainer.total_training_steps=100000"]
    with (tmp_path / "first.txt").open("w") as log:
        first = subprocess.Popen(command, cwd=tmp_path, env=clean_environ, stdout=log, stderr=subprocess.STDOUT)
    try:
        checkpoints = tmp_path / "runs" / "countdown" / "grpo-lab" / "checkpoints"
        deadline = time.monotonic() + 120
        while "computes on" not in (tmp_path / "first.txt").read_text() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert first.poll() is None, (tmp_path / "first.txt").read_text()
        with pytest.raises(BlockingIOError):
            hold(checkpoints)
        last = refusal_of(tmp_path, clean_environ, "algorithm=grpo", f"{ACTOR}.ppo_mini_batch_size=2")
        assert "another run writes there at this moment; give this one a trainer.experiment_name" in last
    finally:
        first.kill()
        first.wait()
    released = hold(checkpoints)
    assert released is not None
    os.close(released)


def test_the_command_writes_what_a_run_of_verl_writes(tmp_path: Path, clean_environ: dict[str, str]) -> None:
    command = [sys.executable, "-m", "recipe.soup.lab", "example=countdown", "algorithm=grpo", *SMALL]
    command += [f"{ACTOR}.ppo_mini_batch_size=2", "trainer.test_freq=6"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "runs" / "countdown" / "grpo-lab.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    for line in (lines[0], lines[-1]):
        metrics = line["data"]
        assert metrics["soup/val/countdown/pass@1"] == pytest.approx(metrics["val-core/countdown/acc/mean@16"])
        assert (
            metrics["soup/val/countdown/pass@1"]
            <= metrics["soup/val/countdown/pass@4"]
            <= metrics["soup/val/countdown/pass@16"]
        )


def test_what_verl_takes_the_lab_takes(
    composed: Any, tmp_path: Path, countdown_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One logger's name, no seed, lines of JSON under other names, a reward in another order, two data sources."""
    monkeypatch.chdir(tmp_path)
    rows = pd.read_parquet(countdown_dir / "data/val.parquet").head(16).to_dict("records")
    renamed = [{**row, "data_source": "ab"[i % 2], "question": row.pop("prompt")} for i, row in enumerate(rows)]
    pd.DataFrame(renamed).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    (tmp_path / "reward.py").write_text(
        "def compute_score(ground_truth, solution_str, weight, **rest):\n"
        "    assert rest['extra_info'] is not None\n"
        "    return {'score': weight * (1.0 if solution_str[:1] == '3' else -1.0), 'acc': 0.25}\n"
    )
    config = example(
        composed,
        "trainer.logger=file",
        "data.seed=null",
        f"data.train_files={tmp_path}/rows.jsonl",
        f"data.val_files={tmp_path}/rows.jsonl",
        "data.prompt_key=question",
        f"reward.custom_reward_function.path={tmp_path}/reward.py",
        "+reward.custom_reward_function.reward_kwargs.weight=2",
        "trainer.total_training_steps=2",
    )
    config.trainer.test_freq = 2
    Lab(config).fit()
    [path] = tmp_path.rglob("soup.jsonl")
    metrics = read_metrics(path)
    assert sorted(metrics) == [0, 1, 2]
    assert -2 <= metrics[1]["critic/score/mean"] <= 2
    for source in "ab":
        assert metrics[2][f"val-core/{source}/acc/mean@16"] == 0.25
        assert metrics[2][f"soup/val/{source}/pass@16"] == 1


def test_no_steps_are_no_steps(composed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in verl, which validates and ends."""
    monkeypatch.chdir(tmp_path)
    lab = Lab(example(composed, "trainer.total_training_steps=0", "trainer.logger=[]"))
    monkeypatch.setattr(Lab, "step", None)
    assert lab.last_step == 0
    lab.fit()


# ---------------------------------------------------------------- what goes wrong


SHARE_THAT_FAILS = 6
FAILS = {
    "raises": "1 / 0",
    "is not finite": "float('nan')",
    "overflows": "1e39",
    "is none": "None",
    "is a tuple": "(score, 'why')",
    "is a text": "'text'",
}


def failing_reward(folder: Path, failure: str, share: int = SHARE_THAT_FAILS) -> str:
    """A reward function that fails on one response in `share`; returns the override that names it."""
    path = folder / "reward.py"
    lines = [
        "import zlib",
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):",
        "    score = float('+' in solution_str)",
        f"    return {failure} if zlib.crc32(solution_str.encode()) % {share} == 0 else score",
    ]
    path.write_text("\n".join(lines))
    return f"reward.custom_reward_function.path={path}"


@pytest.mark.parametrize("failure", FAILS)
def test_a_sample_whose_reward_fails_is_lost_as_on_the_real_path(
    failure: str, composed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = failing_reward(tmp_path, FAILS[failure])
    kept = [f"trainer.validation_data_dir={tmp_path}/val", "algorithm.soup.lag=1"]
    lab = Lab(example(composed, reward, "algorithm.soup.max_lost_share=0.9", *kept))
    lost = 0.0
    for step in (1, 2, 3):
        metrics = lab.step(step)
        asked, arrived, trained, share = (
            metrics[f"soup/train/samples/{name}"] for name in ("asked", "arrived", "trained", "lost_share")
        )
        assert asked == 4 * lab.config.actor_rollout_ref.rollout.n
        assert arrived == trained == asked * (1 - share)
        assert metrics["soup/train/broken/no_tokens"] == metrics["soup/train/broken/no_update"] == 0
        assert 0 <= metrics["critic/score/mean"] <= 1
        lost += asked - arrived
    assert lost > 0
    metrics = lab.validation(lab.model, 3)
    asked, arrived = metrics["soup/val/samples/asked"], metrics["soup/val/samples/arrived"]
    assert asked == 8 * lab.config.actor_rollout_ref.rollout.val_kwargs.n > arrived > 0
    assert metrics["soup/val/samples/lost_share"] == pytest.approx(1 - arrived / asked)
    assert len((tmp_path / "val" / "3.jsonl").read_text().splitlines()) == arrived
    told = capsys.readouterr().out
    assert told.count(NOTICE) == 1
    assert " samples; the first error was " in told


def test_a_lost_sample_takes_the_prefixes_that_it_brings_with_it(composed: Any, tmp_path: Path) -> None:
    """Samples carry them on the real path, too."""
    reward, rest = failing_reward(tmp_path, "1 / 0", share=2), ["algorithm.soup.max_lost_share=0.9"]
    metrics = Lab(example(composed, reward, *rest, "algorithm.soup.lag=1")).step(1)
    assert 0 < metrics["soup/cost/seeds_lost"] < metrics["soup/cost/seed_requests"]


@pytest.mark.parametrize(("share", "sentence"), [
    (SHARE_THAT_FAILS, "more than algorithm.soup.max_lost_share=0.05 allows"), (1, "The first error was"),
])  # fmt: skip
def test_too_many_lost_samples_end_the_lab_in_one_sentence(
    share: int, sentence: str, tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    reward = failing_reward(tmp_path, "float('nan')", share)
    command = [sys.executable, "-m", "recipe.soup.lab", "example=countdown", "algorithm=grpo", *SMALL, reward]
    command += ["trainer.val_before_train=false", f"{ACTOR}.ppo_mini_batch_size=2"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert sentence in done.stdout
    assert "the reward nan is not one finite number" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_validation_of_which_nothing_is_left_ends_the_lab(composed: Any, tmp_path: Path) -> None:
    lab = Lab(example(composed, failing_reward(tmp_path, "1 / 0", share=1), "algorithm.soup.max_lost_share=1"))
    with pytest.raises(RunEndedError, match=r"The validation after step 2 lost all of its samples.*ZeroDivisionError"):
        lab.validation(lab.model, 2)


@pytest.mark.parametrize("answer", ["stop", "warn"])
def test_an_update_that_is_not_finite_is_found(
    answer: str, composed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(example(composed, "algorithm.soup.lag=1", f"algorithm.soup.broken_steps={answer}"))
    lab.step(1)
    before = [parameter.clone() for parameter in lab.model.parameters()]
    whole = lab.updater.loss

    def not_a_number(*args: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        loss, metrics = whole(*args)
        return loss * torch.nan, metrics

    monkeypatch.setattr(lab.updater, "loss", not_a_number)
    if answer == "stop":
        with pytest.raises(RunEndedError, match=r"In step 2 the weights were not updated.*actor/grad_norm=nan"):
            lab.step(2)
    else:
        assert lab.step(2)["soup/train/broken/no_update"] == 1
        assert f"{NOTICE}In step 2 the weights" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(before, lab.model.parameters(), strict=True))


# ---------------------------------------------------------------- checkpoints


RESUMED = {
    "lookahead": ["algorithm.soup.lag=3"],
    "snapshot": SOURCES["snapshot"],
    "pool": ["algorithm.soup.source=snapshot", "algorithm.soup.snapshot.policy=pool", "algorithm.soup.snapshot.every=1",
             "algorithm.soup.lag=3"],
    "best": ["algorithm.soup.source=snapshot", "algorithm.soup.snapshot.policy=best"],
    "replay": SOURCES["replay"],
    "steered": SOURCES["steered"],
    "filtered": ["algorithm.filter_groups.enable=true", "data.gen_batch_size=1", "algorithm.soup.lag=2"],
    "candidates": SOURCES["candidates"],
    "grpo": ["algorithm.soup.mixed_share=0"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "killed_after"), [*((source, 4) for source in RESUMED), ("lookahead", 3), ("lookahead", 5)]
)
def test_a_killed_run_goes_on_with_the_same_numbers(
    source: str, killed_after: int, composed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the step of a checkpoint, or from a step behind it, whose numbers are made again."""

    def run(name: str) -> tuple[dict[int, dict[str, float]], Lab]:
        log = tmp_path / f"{name}.jsonl"
        monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(log))
        kept = [f"trainer.default_local_dir={tmp_path}/{name}", "trainer.save_freq=3", "trainer.resume_mode=auto"]
        # Eight problems come again, so that the order of a later epoch is met as well.
        kept += ["trainer.logger=[file]", "data.train_max_samples=8", "trainer.total_epochs=9", "trainer.test_freq=2"]
        kept += ["actor_rollout_ref.rollout.n=4", "data.val_max_samples=2"]
        lab = Lab(example(composed, *kept, *RESUMED[source]))
        step = lab.step

        def until_killed(number: int) -> dict[str, float]:
            if name == "killed" and number > killed_after and lab.first_step == 1:
                raise KeyboardInterrupt
            return step(number)

        monkeypatch.setattr(lab, "step", until_killed)
        with contextlib.suppress(KeyboardInterrupt):
            lab.fit()
        return read_metrics(log), lab

    whole, uninterrupted = run("whole")
    run("killed")
    joined, resumed = run("killed")
    assert resumed.first_step == 4
    assert set(joined) == set(whole) == set(range(7))
    for step in whole:
        timeless = [
            {k: v for k, v in metrics[step].items() if "timing" not in k and "waited" not in k}
            for metrics in (whole, joined)
        ]
        assert timeless[0] == timeless[1], step
    for ours, theirs in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_newest_checkpoint_is_a_whole_one(composed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it writes the second one: the first is still there, and taken."""
    kept = [f"trainer.default_local_dir={tmp_path}", "trainer.save_freq=2", "trainer.max_actor_ckpt_to_keep=1"]
    overrides = [
        "algorithm.soup.lag=1",
        "trainer.logger=[]",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        *kept,
    ]
    lab = Lab(example(composed, *overrides))
    save = lab.source.save

    def die(folder: Path) -> None:
        if "4" in folder.name:
            raise KeyboardInterrupt
        save(folder)

    monkeypatch.setattr(lab.source, "save", die)
    with pytest.raises(KeyboardInterrupt):
        lab.fit()
    assert Lab(example(composed, *overrides, "trainer.resume_mode=auto")).first_step == 3
    Lab(example(composed, *overrides, "trainer.resume_mode=auto")).fit()
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == ["global_step_6"]


def test_a_run_that_starts_anew_keeps_its_own_checkpoint(composed: Any, tmp_path: Path) -> None:
    """In a folder with a later one, of a run that was there before."""
    kept = [f"trainer.default_local_dir={tmp_path}", "trainer.save_freq=2", "trainer.max_actor_ckpt_to_keep=1"]
    config = example(composed, "algorithm.soup.lag=1", *kept)
    lab = Lab(config)
    for step in (150, 2, 4):
        lab._save(step)
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == ["global_step_150", "global_step_4"]
    config.trainer.resume_mode = "auto"
    assert checkpoint_to_resume(config) == tmp_path / "global_step_4"


@pytest.mark.parametrize("key", ["+min_p=0.1", "+repetition_penalty=1.1", "top_p=0.9"])
def test_truncated_sampling_is_refused_whatever_the_algorithm(key: str, composed: Any) -> None:
    key, add = key.removeprefix("+"), "+" * key.startswith("+")
    with pytest.raises(SystemExit, match=f"rollout.{key}: only the real path"):
        Lab(composed("example=countdown", "algorithm=grpo", *SMALL, f"{add}actor_rollout_ref.rollout.{key}"))


def test_a_checkpoint_of_another_driver_is_refused(composed: Any, tmp_path: Path) -> None:
    (tmp_path / "global_step_2" / "actor").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    where = [f"trainer.default_local_dir={tmp_path}", "trainer.resume_mode=auto"]
    with pytest.raises(SystemExit, match=r"trainer.default_local_dir=.*global_step_2: has no lab.pt"):
        Lab(example(composed, *where))


def test_validation_of_a_checkpoint_alone(composed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final weights on other problems, and nothing is trained."""
    log = tmp_path / "metrics.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(log))
    kept = [
        f"trainer.default_local_dir={tmp_path}",
        "trainer.save_freq=6",
        "trainer.logger=[file]",
        "trainer.test_freq=6",
    ]
    Lab(example(composed, *kept)).fit()
    trained = read_metrics(log)
    assert set(trained) == set(range(7))
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "final.jsonl"))
    final = Lab(
        example(composed, *kept, "trainer.resume_mode=auto", "trainer.val_only=true", "data.val_max_samples=16")
    )
    before = [parameter.clone() for parameter in final.model.parameters()]
    final.fit()
    again = read_metrics(tmp_path / "final.jsonl")
    assert set(again) == {6}
    assert "critic/score/mean" not in again[6]
    assert all(torch.equal(a, b) for a, b in zip(before, final.model.parameters(), strict=True))
    assert read_metrics(log) == trained
