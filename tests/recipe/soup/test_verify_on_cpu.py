"""The check that recomputes old log-probs, by itself; against real runs: real_path/."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipe.soup import verify as module
from recipe.soup.verify import in_batches, verify


def rows(step: int) -> list[dict]:
    """Samples of different lengths whose first two tokens are one version old."""
    return [
        {
            "prompt_ids": [2, 3 + i],
            "response_ids": [4 + i] * (3 + i),
            "policy_versions": [max(step - 2, 0)] * 2 + [step - 1] * (1 + i),
        }
        for i in range(5)
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
    assert len(compared["prefix"].claimed) == 10
    for comparison in compared.values():
        assert max(comparison.claimed) < 1e-5
        assert all(max(differences) > 1e-2 for differences in comparison.others.values())
    arguments = ["--samples", str(samples), "--checkpoints", str(checkpoints), "--base-model", base_model]
    monkeypatch.setattr(sys, "argv", ["verify", *arguments])
    module.main()
    assert "prefix: 10 tokens; largest difference" in capsys.readouterr().out


def test_no_batch_has_more_logits_than_fit() -> None:
    samples = rows(1)
    longest, vocabulary = 9, module.LOGITS_AT_ONCE // 20
    batches = list(in_batches(samples, vocabulary))
    assert [row for batch in batches for row in batch] == samples
    assert all(len(batch) * longest * vocabulary <= module.LOGITS_AT_ONCE for batch in batches)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [len(batch) for batch in in_batches(samples, 10 * module.LOGITS_AT_ONCE)] == [1] * 5
