"""`soup-verl eval` without vLLM: samples on disk, majority votes, checkpoints, the table; and once with it."""

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.countdown.reward import compute_score
from recipe.soup.records.majority import majority_at_k
from recipe.soup.records.problems import Problem
from recipe.soup.tools import cli
from recipe.soup.tools.evaluate import engine as engine_module
from recipe.soup.tools.evaluate.checkpoint import loadable, weights_fingerprint
from recipe.soup.tools.evaluate.run import folder_of
from recipe.soup.tools.evaluate.samples import add_problem, facts, open_samples
from recipe.soup.tools.evaluate.table import measures

COUNTDOWN = Path(__file__).parents[4] / "examples/countdown"
VALIDATION = COUNTDOWN / "data/val.parquet"
REWARD = ["--reward", "pkg://examples.countdown.reward", "--max-tokens", "24"]


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["soup", "eval", *argv])
    cli.main()


class ScriptedEngine:
    """Answers every problem with its number of right samples, and stops after `kill_after` problems."""

    asked: list[int]
    kill_after = 10**9

    def __init__(self, *args: Any) -> None:
        type(self).asked = []

    def sample(self, prompts: list[tuple[int, list[int]]]) -> Any:
        for done, (number, ids) in enumerate(prompts):
            assert all(isinstance(token, int) for token in ids)
            if done == self.kill_after:
                raise KeyboardInterrupt
            self.asked.append(number)
            yield (
                number,
                [
                    SimpleNamespace(text=f"{number}:{i}", token_ids=[1] * 5, finish_reason="length" if i else "stop")
                    for i in range(4)
                ],
            )

    def close(self) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A reward that calls sample i of problem p right iff i < p % 5, and an engine that says which is which."""
    monkeypatch.setattr(engine_module, "Engine", ScriptedEngine)
    monkeypatch.setattr(ScriptedEngine, "kill_after", 10**9)
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    problem, i = map(int, solution_str.split(':'))\n"
        "    right = i < problem % 5\n"
        "    return {'score': float(right), 'acc': float(right), 'pred': 'right' if right else f'wrong{i}'}\n"
    )
    return reward


def test_a_killed_evaluation_goes_on(scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [str(COUNTDOWN / "base_model"), str(VALIDATION), "--samples", "4", "--limit", "10"]
    argv += ["--reward", str(scripted), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(ScriptedEngine, "kill_after", 6)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *argv)
    path = tmp_path / "out/val.jsonl"
    assert not path.exists()  # nothing is graded before everything is sampled
    sampled = tmp_path / "out/val.samples.jsonl"
    sampled.write_text(sampled.read_text()[:-10])  # the kill came while the last line was written
    monkeypatch.setattr(ScriptedEngine, "kill_after", 10**9)
    run(monkeypatch, *argv)
    assert ScriptedEngine.asked == [5, 6, 7, 8, 9]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((row["problem"], row["output"]) for row in rows) == [
        (p, f"{p}:{i}") for p in range(10) for i in range(4)
    ]
    report = (tmp_path / "out/report.md").read_text()
    # Problems have 0, 1, 2, 3 and 4 right samples of 4, twice each.
    cells = [cell.strip() for cell in report.splitlines()[4].split("|")[1:-1]]
    assert cells[:3] == ["val", "10", "40"]
    for cell, k in zip(cells[3:6], (1, 2, 4), strict=True):
        wrong = [len(list(combinations(range(4 - right), k))) for right in range(5)]
        everything = len(list(combinations(range(4), k)))
        assert float(cell.split(" ")[0]) == pytest.approx(1 - np.mean(wrong) / everything, abs=1e-3)
    assert cells[7].startswith("0.650")  # maj@4: 0, then 1 of 4 ties with three wrong answers, then unique
    assert cells[8:] == ["5", "75.0%"]
    ScriptedEngine.asked = []
    monkeypatch.setattr(engine_module, "Engine", None)
    run(monkeypatch, *argv)  # a third time: everything is there, nothing is loaded
    run(monkeypatch, *argv[:-6], "--limit", "3", *argv[-4:])
    assert "| val | 3 | 12 |" in (tmp_path / "out/report.md").read_text()
    run(monkeypatch, *argv)
    scripted.write_text(scripted.read_text().replace("problem % 5", "0"))
    with pytest.raises(SystemExit, match=r"reward_source=.* was begun with .*; give --regrade"):
        run(monkeypatch, *argv)
    run(monkeypatch, *argv, "--regrade")  # no engine is there, so nothing is sampled
    assert {json.loads(line)["acc"] for line in path.read_text().splitlines()} == {0.0}
    assert (tmp_path / "out/pass_at_k.png").stat().st_size > 1000


def problem(text: str, answer: str = "1") -> Problem:
    row = {"data_source": "x", "reward_model": {"ground_truth": answer}}
    return Problem([{"role": "user", "content": text}], row)


def row(number: int, of: Problem, output: str = "") -> dict[str, Any]:
    return {"problem": number, **facts(of), "output": output}


def test_other_settings_and_other_problems_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    open_samples(path, {"temperature": 1.0}, 2, [])
    assert open_samples(path, {"temperature": 0.7}, 2, []) == {}  # nothing was sampled yet, or it was deleted
    open_samples(path, {"temperature": 1.0}, 2, [])
    path.touch()
    with pytest.raises(SystemExit, match=r"temperature=0.5: .* was begun with 1.0; give another --out"):
        open_samples(path, {"temperature": 0.5}, 2, [])
    add_problem(path, [row(0, problem("a"))] * 2)
    assert list(open_samples(path, {}, 2, [problem("a")])) == [0]
    for other in (problem("b"), problem("a", "2")):
        with pytest.raises(SystemExit, match="problem 0 was another one then"):
            open_samples(path, {}, 2, [other])


def test_half_problems_are_dropped_and_nothing_else(tmp_path: Path) -> None:
    path, problems = tmp_path / "x.jsonl", [problem("a"), problem("b")]
    rows = [row(0, problems[0], "ä\u2028b"), {**row(0, problems[0]), "acc": np.float32(1)}]
    add_problem(path, rows)
    add_problem(path, [row(1, problems[1])])
    with path.open("a") as file:
        file.write('{"problem": 1, "inp')
    for _ in range(2):
        found = open_samples(path, {}, 2, problems)
        assert found == {0: [rows[0], {**rows[1], "acc": 1.0}]}
        assert len(path.read_text().split("\n")) == 3
    assert open_samples(path, {}, 2, []) == {}  # --limit 0 would lose nothing
    assert list(open_samples(path, {}, 2, problems)) == [0]


def test_samples_of_neighbouring_seeds_have_nothing_in_common() -> None:
    n = 1024
    firsts = sorted(engine_module.first_seed(seed, number) for seed in range(3) for number in range(300))
    assert min(np.diff(firsts)) > n


def test_two_datasets_of_one_name(scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "val.parquet"
    copy.write_bytes(VALIDATION.read_bytes())
    with pytest.raises(SystemExit, match="a second dataset called val"):
        run(monkeypatch, str(COUNTDOWN / "base_model"), str(VALIDATION), str(copy), "--reward", str(scripted))


def test_twins_have_folders_of_their_own() -> None:
    assert folder_of("runs/countdown/soup/checkpoints/global_step_80") == Path(
        "runs/eval/countdown-soup-global_step_80"
    )
    assert folder_of("/model") == Path("runs/eval/model")
    assert folder_of("Qwen/Qwen3-1.7B") == Path("runs/eval/Qwen-Qwen3-1.7B")


@given(st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=6), st.data())
def test_majority_against_all_choices(answers: list[str], data: Any) -> None:
    """Draws against the mean over every subset, in which ties are shared out."""
    k = data.draw(st.integers(1, len(answers)))
    correct = [answer == "a" for answer in answers]
    shares = []
    for chosen in combinations(answers, k):
        votes = {answer: chosen.count(answer) for answer in chosen if answer}
        best = [answer for answer, count in votes.items() if count == max(votes.values())]
        shares.append(("a" in best) / len(best) if best else 0.0)
    estimate = majority_at_k(answers, correct, k, np.random.default_rng(1))
    assert estimate == pytest.approx(np.mean(shares), abs=1e-12 if k == len(answers) else 0.2)


def test_measures_by_hand() -> None:
    # A reward without an answer gives None, which has no vote.
    frame = pd.DataFrame(
        {
            "problem": [0, 0, 1, 1, 2, 2],
            "acc": [1.0, 0, 0, 0, 1, 1],
            "pred": ["7", "8", "", "3", None, None],
            "tokens": 1,
        }
    )
    found = measures(frame)
    assert {name: values.tolist() for name, values in found.items()} == {
        "pass@1": [0.5, 0.0, 1.0],
        "pass@2": [1.0, 0.0, 1.0],
        "maj@2": [0.5, 0.0, 0.0],
    }


def test_which_folder_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loadable("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for missing in ("runs/a/b", "./x", str(tmp_path / "none")):
        with pytest.raises(SystemExit, match="no such folder"):
            loadable(missing)
    actor = tmp_path / "global_step_3/actor"
    (actor / "huggingface").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds neither"):
        loadable(str(actor.parent))
    (actor / "model_world_size_1_rank_0.pt").touch()

    def merge(command: list[str], check: bool) -> None:
        assert command[-4:] == ["--local_dir", str(actor), "--target_dir", str(actor / "merged.part")]
        (actor / "merged.part").mkdir()
        (actor / "merged.part/model.safetensors").touch()
        if interrupted:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", merge)
    interrupted = True
    with pytest.raises(SystemExit, match="could not merge"):
        loadable(str(actor.parent))
    interrupted = False
    assert loadable(str(actor.parent)) == str(actor / "merged")  # what the first attempt left is not loaded
    monkeypatch.setattr(subprocess, "run", None)
    assert loadable(str(actor)) == str(actor / "merged")
    before = weights_fingerprint(str(actor.parent))
    (actor / "huggingface/model.safetensors").touch()
    assert loadable(str(actor.parent)) == str(actor / "huggingface")
    assert weights_fingerprint(str(actor.parent)) != before
    # Another run wrote its shards here; what belongs to the first run is no longer loaded.
    os.utime(actor / "model_world_size_1_rank_0.pt", (2e9, 2e9))
    monkeypatch.setattr(subprocess, "run", merge)
    os.utime(actor / "merged/model.safetensors", (1e9, 1e9))
    assert loadable(str(actor.parent)) == str(actor / "merged")
    assert (actor / "merged/model.safetensors").stat().st_mtime > 1e9 + 1  # merged anew
    (actor / "lora_train_meta.json").touch()
    with pytest.raises(SystemExit, match="LoRA adapter"):
        loadable(str(actor.parent))


@pytest.mark.real_run
def test_greedy_with_vllm_is_greedy_with_transformers(tmp_path: Path) -> None:
    """The command as a user types it, then the most probable answers by plain transformers."""
    command = [sys.executable, "-m", "recipe.soup.tools.cli", "eval", str(COUNTDOWN / "base_model")]
    command += [str(VALIDATION), *REWARD, "--limit", "6", "--out", str(tmp_path)]
    subprocess.run([*command, "--samples", "1", "--temperature", "0"], check=True, timeout=240)
    rows = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(COUNTDOWN / "base_model")
    model: Any = AutoModelForCausalLM.from_pretrained(COUNTDOWN / "base_model")
    assert sorted(row["problem"] for row in rows) == list(range(6))
    problems = pd.read_parquet(VALIDATION).head(6).to_dict("records")
    for row, problem in zip(sorted(rows, key=lambda row: row["problem"]), problems, strict=True):
        assert row["input"] == problem["prompt"][0]["content"]
        ids = tokenizer(row["input"], return_tensors="pt")["input_ids"]
        output = model.generate(ids, attention_mask=ids > -1, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
        assert row["output"] == tokenizer.decode(output, skip_special_tokens=True)
        assert row["tokens"] == len(output)
        assert row["score"] == compute_score("countdown", row["output"], problem["reward_model"]["ground_truth"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing.parquet"], "data=nothing.parquet: no such .parquet, .json, .jsonl file, and none of math500"),
        (["data.prompt_key=prompt"], "data=data.prompt_key=prompt: no dataset among them"),
        (["VAL", "trainer.logger=file"], "data=trainer.logger=file: neither a dataset nor a key under data., reward."),
        (["VAL", "data.prompt=x"], r"data.prompt=x: .*data.prompt"),
        (["VAL", "data.prompt_key=question"], r"data.val_files=.*cannot be read \('question'\)"),
        (["VAL", "--temperature", "0"], "--samples=16: at temperature 0 all samples are equal"),
        (["VAL", "--temperature", "nan"], "--temperature=nan: give 0 or more"),
        (["VAL", "--samples", "0"], "--samples=0: give 1 or more"),
        (["VAL", "--max-tokens", "-1"], "--max-tokens=-1: give 1 or more"),
        (["VAL", "--gpus", "0"], "--gpus=0: give 1 or more"),
        (["VAL", "--top-p", "0"], "--top-p=0.0: give a number above 0"),
        (["VAL", "--limit", "0"], "--limit=0: no problem would be left"),
        (["VAL", "--reward", "pkg://no.such.module"], "pkg://no.such.module:compute_score: cannot be loaded"),
    ],
)
def test_refusals_come_before_vllm_loads(argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "Engine", None)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, str(COUNTDOWN / "base_model"), *(str(VALIDATION) if part == "VAL" else part for part in argv))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_model": None}, "data=.*: a row lacks reward_model.ground_truth"),
        ({"prompt": "3 5 7=22:"}, "a prompt is no list of messages"),
        ("empty", "has no rows|cannot be read"),
    ],
)
def test_data_that_cannot_be_asked_or_graded(
    change: Any, message: str, scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pd.read_parquet(VALIDATION).head(3).to_dict("records")
    kept = [] if change == "empty" else [{**row, **change} for row in rows]
    pd.DataFrame(kept, columns=list(rows[0])).to_parquet(tmp_path / "odd.parquet")
    monkeypatch.setattr(engine_module, "Engine", None)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, str(COUNTDOWN / "base_model"), str(tmp_path / "odd.parquet"), "--reward", str(scripted))


ODD = "import numpy as np\ndef compute_score(solution_str, **rest):\n    return {}\n"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("np.bool_(True)", {"score": 1.0, "acc": 1.0}),
        ("{'score': 0.5, 'parts': np.array([1.0, 2.0])}", {"score": 0.5, "acc": 0.5, "parts": [1.0, 2.0]}),
        ("{'score': 1.0, 'seen': {2, 1}, 'why': None}", {"seen": "{1, 2}", "why": None}),
        ("{'score': 1, 'problem': 99, 'output': 'x', 'tokens': 'abc'}", {"told_problem": 99, "told_tokens": "abc"}),
    ],
)
def test_whatever_a_reward_tells_is_written(
    value: str, told: dict[str, Any], scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.write_text(ODD.replace("{}", value, 1))
    argv = [str(COUNTDOWN / "base_model"), str(VALIDATION), "--samples", "4", "--limit", "2"]
    run(monkeypatch, *argv, "--reward", str(scripted), "--out", str(tmp_path / "out"))
    rows = [json.loads(line) for line in (tmp_path / "out/val.jsonl").read_text().splitlines()]
    assert [(row["problem"], row["output"], row["tokens"]) for row in rows] == [
        (p, f"{p}:{i}", 5) for p in range(2) for i in range(4)
    ]
    assert all(row.items() >= told.items() for row in rows)


def test_a_reward_that_fails_loses_no_sample(scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = scripted.read_text()
    scripted.write_text(good.replace("    right", "    assert problem != 1, 'not this one'\n    right"))
    argv = [str(COUNTDOWN / "base_model"), str(VALIDATION), "--samples", "4", "--limit", "3"]
    argv += ["--reward", str(scripted), "--out", str(tmp_path / "out")]
    with pytest.raises(
        SystemExit, match=r"the reward failed on 4 samples, first on '1:0' \(problem 1\): AssertionError: not this one"
    ):
        run(monkeypatch, *argv)
    assert len((tmp_path / "out/val.samples.jsonl").read_text().splitlines()) == 12
    assert not (tmp_path / "out/report.md").exists()  # a table without them would be of other problems
    scripted.write_text(good)
    monkeypatch.setattr(engine_module, "Engine", None)
    run(monkeypatch, *argv, "--regrade")
    assert "| val | 3 | 12 |" in (tmp_path / "out/report.md").read_text()


def test_a_refused_regrade_costs_no_grade_and_an_older_evaluation_no_sample(
    scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(COUNTDOWN / "base_model"), str(VALIDATION), "--samples", "4", "--limit", "3"]
    argv += ["--reward", str(scripted), "--out", str(tmp_path / "out")]
    run(monkeypatch, *argv)
    graded, samples = tmp_path / "out/val.jsonl", tmp_path / "out/val.samples.jsonl"
    before, sampled = graded.read_text(), samples.read_text()
    monkeypatch.setattr(engine_module, "Engine", None)
    with pytest.raises(SystemExit, match=r"temperature=0.5: .* was begun with 1.0"):
        run(monkeypatch, *argv, "--temperature", "0.5", "--regrade")
    assert graded.read_text() == before
    samples.unlink()
    samples.with_suffix(".settings.json").unlink()
    run(monkeypatch, *argv, "--regrade")
    assert (graded.read_text(), samples.read_text()) == (before, sampled)


def test_prompts_without_room_are_told(
    scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.write_text("def compute_score(**given): return 0.0\n")
    monkeypatch.setattr(
        ScriptedEngine, "sample", lambda self, prompts: ((i, [engine_module.NoRoom()] * 4) for i, _ in prompts)
    )
    argv = [str(COUNTDOWN / "base_model"), str(VALIDATION), "--samples", "4", "--limit", "2"]
    run(monkeypatch, *argv, "--reward", str(scripted), "--out", str(tmp_path / "out"))
    assert "val: 2 prompts fill the model's context, so their answers are empty, and wrong." in capsys.readouterr().out


def test_prompts_are_built_as_in_training(scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[Any]] = {}

    def sample(self: Any, prompts: list[tuple[int, list[int]]]) -> Any:
        asked[name] = prompts
        yield from original(self, prompts)

    original = ScriptedEngine.sample
    monkeypatch.setattr(ScriptedEngine, "sample", sample)
    argv = [str(COUNTDOWN / "base_model"), str(VALIDATION), "--samples", "4", "--limit", "1", "--reward", str(scripted)]
    template = "actor_rollout_ref.model.custom_chat_template='{% if thinks %}2 {% endif %}{{ messages[0].content }}'"
    for name, overrides in {
        "plain": (template,),
        "thinking": (template, "+data.apply_chat_template_kwargs.thinks=true"),
    }.items():
        run(monkeypatch, *argv[:2], *overrides, *argv[2:], "--out", str(tmp_path / name))
    [(_, plain)], [(_, thinking)] = asked["plain"], asked["thinking"]
    assert thinking[-len(plain) :] == plain
    assert len(thinking) > len(plain)
