"""`benchmarks.lab_step`: what it calls the best possible, counted anew; and its comparison, which can fail."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.lab_step import Size, against_the_cpu, bounds, rates, size_of
from recipe.soup.lab import forward as forward_module
from recipe.soup.lab.forward import Sample
from recipe.soup.lab.hardware import Hardware
from recipe.soup.lab.sampler import sample
from recipe.soup.lab.update import fields_of_loss, rows_before_update
from recipe.soup.settings import parse_settings

CPU = torch.device("cpu")


def test_the_size_of_a_step() -> None:
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            head_dim=8, vocab_size=20, tie_word_embeddings=True,
        )
    )  # fmt: skip
    a, b = [1, 2, 3], [1, 2, 3, 4]
    samples = [Sample(prompt, [5] * n, [], [], 0.0, 0) for prompt, n in ((a, 2), (a, 3), (b, 1))]
    size = size_of(model, samples, torch.bfloat16)
    attention, mlp, norms = 2 * 24 * 48 + 2 * 24 * 16, 3 * 24 * 32, 2 * 24
    assert size.body == 2 * (attention + mlp + norms)
    assert size.head == 20 * 24
    assert (size.prompts, size.responses, size.columns) == (7, 6, 3)
    # Keys and values of 2 layers x 2 heads x 8 numbers of 2 bytes; a token sees prompt, earlier tokens and itself.
    assert size.kept == 2 * 2 * 2 * 8 * 2 * ((4 + 5) + (4 + 5 + 6) + 5)


def test_the_best_possible() -> None:
    size = Size(body=100, head=20, prompts=7, responses=6, columns=3, kept=64, bytes_each=2)
    reading, arithmetic = bounds(size, 1e12, 10.0), bounds(size, 10.0, 1e12)
    assert reading["generate"] == pytest.approx((3 * 120 * 2 + 64) / 10)
    assert reading["step"] == pytest.approx(reading["generate"])
    assert arithmetic["generate"] == pytest.approx(2 * (7 * 100 + 6 * 120) / 10)
    # Old log-probs take as many products, and the update three times as many.
    assert arithmetic["step"] == pytest.approx(arithmetic["generate"] * 5)


def test_rates_are_those_of_a_machine() -> None:
    multiplications, bandwidth = rates(CPU, torch.float32)
    assert 1e8 < multiplications < 1e15
    assert 1e7 < bandwidth < 1e14


def test_the_comparison_finds_a_wrong_path(composed: Any, countdown_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("example=countdown", "algorithm=grpo")
    model = AutoModelForCausalLM.from_pretrained(countdown_dir / "base_model", dtype=torch.float32)
    prompts = [[5, 18, 7, 18, 9, 14, 4, 4, 17]] * 4 + [[5, 14, 4, 17]] * 4
    answers = sample(model, prompts, [12] * 8, 0, 1.0, 1, torch.Generator().manual_seed(0))
    samples = [
        Sample(prompt, a.token_ids, [0] * len(a.token_ids), a.log_probs, float(i % 2), i // 4)
        for i, (prompt, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    settings = parse_settings(config.algorithm.soup, config.actor_rollout_ref.rollout.response_length)
    fields, _ = fields_of_loss(rows_before_update(model, samples, 1.0, 0), settings, config)
    lab = SimpleNamespace(model=model, hardware=Hardware(CPU, torch.bfloat16, True), config=config, settings=settings)
    loss, gradient = against_the_cpu(lab, samples, fields)
    assert loss < 1e-5
    assert gradient < 1e-3
    one_prompt = lambda rows: ([list(rows[0])], torch.zeros(len(rows), dtype=torch.long))  # noqa: E731
    monkeypatch.setattr(forward_module, "different", one_prompt)
    loss, gradient = against_the_cpu(lab, samples, fields)
    assert gradient > 1e-2
