"""The check that recomputes old log-probs, by itself; against real runs: real_path/."""

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipe.soup.tools import cli
from recipe.soup.tools import verify as module
from recipe.soup.tools.exactness import ENOUGH, Bounds, Comparison, Place, broken
from recipe.soup.tools.verify import in_batches, read_samples, verify


def rows(step: int, count: int = 30) -> list[dict]:
    """Samples of different lengths whose first two tokens are one version old."""
    return [
        {
            "prompt_ids": [2, 3 + i % 5],
            "response_ids": [4 + i % 5] * (3 + i % 5),
            "policy_versions": [max(step - 2, 0)] * 2 + [step - 1] * (1 + i % 5),
        }
        for i in range(count)
    ]


@pytest.fixture
def run(countdown_dir: Path, tmp_path: Path) -> Path:
    """Two steps of samples and version 1, with old log-probs computed a row at a time, in float64."""
    folders = {0: countdown_dir / "base_model", 1: tmp_path / "checkpoints/global_step_1/actor/huggingface"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folders[1])
    models = {v: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for v, folder in folders.items()}
    (tmp_path / "samples").mkdir()
    for step in (1, 2):
        lines = rows(step)
        for row in lines:
            ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
            with torch.no_grad():
                by_version = {v: m(input_ids=ids).logits[0, 1:-1].log_softmax(-1) for v, m in models.items()}
            row["old_log_probs"] = [
                float(by_version[version][t, token])
                for t, (token, version) in enumerate(zip(row["response_ids"], row["policy_versions"], strict=True))
            ]
        (tmp_path / f"samples/{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tmp_path


def main(run: Path, countdown_dir: Path, *arguments: str) -> str:
    """What the command says of broken bounds; "" if it ends with 0."""
    where = ["--samples", str(run / "samples"), "--checkpoints", str(run / "checkpoints")]
    try:
        cli.main(["verify", *where, "--base-model", f"{countdown_dir}/base_model", *arguments])
    except SystemExit as end:
        return str(end.code)  # a sentence: Python then exits with 1
    return ""


def change(run: Path, step: int, line: int, **fields: object) -> None:
    path = run / f"samples/{step}.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[line - 1].update(fields)
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))


@pytest.mark.parametrize("at_once", [2**28, 1])
def test_in_any_batches(
    at_once: int,
    run: Path,
    countdown_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    samples, checkpoints, base_model = run / "samples", run / "checkpoints", str(countdown_dir / "base_model")
    compared = verify(samples, checkpoints, base_model)
    assert len(compared["prefix"].claimed) == 60
    assert not list(broken(compared, Bounds()))
    assert main(run, countdown_dir) == ""
    printed = capsys.readouterr().out
    assert "prefix: 60 tokens; largest difference" in printed
    assert printed.endswith("exact: all bounds are kept\n")


@pytest.mark.parametrize(
    ("off", "says"), [(3e-3, "2.9e-03 over --largest 5e-05"), (float("nan"), "nan over --largest")]
)
def test_one_wrong_token_is_found(off: float, says: str, run: Path, countdown_dir: Path) -> None:
    logged = read_samples(run / "samples")[2][2]["old_log_probs"]
    logged[3] += off
    change(run, 2, 3, old_log_probs=logged)
    said = main(run, countdown_dir)
    assert said.startswith("continuation: ")
    assert says in said
    assert "token 4 of the sample in line 3 of 2.jsonl" in said
    assert "prefix" not in said
    if off == off:
        assert "over --mean 2e-06" in said
        assert main(run, countdown_dir, "--largest", "4e-3", "--mean", "2e-4") == ""


def test_what_tools_wrote_is_skipped(run: Path, countdown_dir: Path) -> None:
    """No policy sampled it, so its old log-prob is nobody's; a NaN there would break all bounds."""
    row = read_samples(run / "samples")[2][2]
    versions, logged = row["policy_versions"], row["old_log_probs"]
    versions[3], logged[3] = -2, float("nan")
    change(run, 2, 3, policy_versions=versions, old_log_probs=logged)
    compared = verify(run / "samples", run / "checkpoints", str(countdown_dir / "base_model"))
    tokens = sum(len(row["response_ids"]) for rows in read_samples(run / "samples").values() for row in rows)
    assert sum(len(comparison.claimed) for comparison in compared.values()) == tokens - 1
    others = [values for comparison in compared.values() for values in comparison.others.values()]
    assert all(math.isfinite(value) for values in others for value in values)
    assert main(run, countdown_dir) == ""


def test_versions_that_are_not_apart_are_no_proof(run: Path, countdown_dir: Path) -> None:
    """Weights that never change: the claimed version passes, and so does any other."""
    version_1 = run / "checkpoints/global_step_1/actor/huggingface"
    shutil.rmtree(version_1)
    shutil.copytree(countdown_dir / "base_model", version_1)
    shutil.copy(run / "samples/1.jsonl", run / "samples/2.jsonl")
    said = main(run, countdown_dir, "--expect", "continuation")
    assert "short of --apart 0.01" in said
    assert main(run, countdown_dir, "--expect", "continuation", "--apart", "0") == ""


def test_what_could_not_be_checked_does_not_pass(run: Path, countdown_dir: Path) -> None:
    (run / "samples/2.jsonl").unlink()
    assert main(run, countdown_dir).startswith("prefix: no tokens, so nothing is proved")
    assert main(run, countdown_dir, "--expect", "continuation") == ""
    shutil.rmtree(run / "checkpoints")
    said = main(run, countdown_dir, "--expect", "continuation")
    assert said.startswith("continuation: no other version to compare with")
    assert main(run, countdown_dir, "--expect", "continuation", "--apart", "0") == ""


def compare(tokens: int, furthest: float) -> Comparison:
    """So many tokens that are exact, and as many of the version before, of which the last is furthest away."""
    others = {-1: [0.0] * (tokens - 1) + [furthest], 1: [0.5] * ENOUGH}
    return Comparison([0.0] * ENOUGH, [Place(1, 1, 1)] * ENOUGH, defaultdict(list, others))


def test_a_few_tokens_that_any_version_gives_are_no_fault() -> None:
    said = [list(broken({"prefix": compare(tokens, 1e-3)}, Bounds())) for tokens in (ENOUGH - 1, ENOUGH)]
    assert said[0] == []
    assert "the version -1 from the claimed one" in said[1][0]


def test_a_few_tokens_alone_prove_nothing() -> None:
    few = Comparison([0.0] * 9, [Place(1, 1, 1)] * 9, defaultdict(list, {-1: [0.5] * 9}))
    [said] = broken({"prefix": few}, Bounds())
    assert said.startswith("prefix: 9 tokens to compare with")


def test_no_batch_has_more_logits_than_fit() -> None:
    samples = rows(1, count=5)
    longest, vocabulary = 9, module.LOGITS_AT_ONCE // 20
    batches = list(in_batches(samples, vocabulary))
    assert [row for batch in batches for row in batch] == samples
    assert all(len(batch) * longest * vocabulary <= module.LOGITS_AT_ONCE for batch in batches)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [len(batch) for batch in in_batches(samples, 10 * module.LOGITS_AT_ONCE)] == [1] * 5
