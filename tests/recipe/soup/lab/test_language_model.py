"""The lab's path for language models against the toy's, which is the plainest: the same numbers, on every device."""

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from recipe.soup.algorithm.batch_metrics import NEEDS_FORWARD
from recipe.soup.lab import hardware as hardware_module
from recipe.soup.lab.driver import Lab
from recipe.soup.lab.forward import Sample, SharedPrompts, forward, of_responses
from recipe.soup.lab.grouped_attention import grouped_attention
from recipe.soup.lab.hardware import Hardware, hardware
from recipe.soup.lab.recompute import recompute
from recipe.soup.lab.sampler import sample
from recipe.soup.lab.static_sampler import StaticSampler
from recipe.soup.lab.update import Updater, fields_of_loss, rows_before_update
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.settings import parse_settings

ACTOR = "actor_rollout_ref.actor"
PRECISION = "actor_rollout_ref.actor.fsdp_config.mixed_precision"
EOS = 1
PROMPTS = [[5, 18, 7, 18, 9, 14, 4, 4, 17], [5, 14, 4, 17], [11, 18, 3, 18, 3, 14, 6, 17]]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def in_float32(device: str) -> Hardware:
    return Hardware(torch.device(device), torch.float32, shares_prompts=True)


@pytest.fixture
def model(countdown_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(countdown_dir / "base_model", dtype=torch.float32)


def some_samples(model: Any, group: int = 8) -> list[Sample]:
    """Of three prompts of several lengths, one of them twice; some tokens are of an older version."""
    prompts = [prompt for prompt in (*PROMPTS, PROMPTS[0]) for _ in range(group)]
    limits = [1 + number % 20 for number in range(len(prompts))]
    answers = sample(model, prompts, limits, 4, 1.0, EOS, torch.Generator().manual_seed(0))
    rng, samples = random.Random(0), []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = len(answer.token_ids)
        old = rng.randint(0, length) if number % 2 else 0
        behavior = [value + rng.gauss(0, 0.1) * (place < old) for place, value in enumerate(answer.log_probs)]
        versions = [2] * old + [4] * (length - old)
        samples.append(Sample(prompt, answer.token_ids, versions, behavior, rng.random(), number // group))
    return samples


# ---------------------------------------------------------------- log-probs, loss, gradient


@on_every_device
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies_of_responses_are_those_of_a_plain_forward(
    device: str, temperature: float, model: Any
) -> None:
    samples = some_samples(model)
    with torch.no_grad():
        plain = forward(model, samples, temperature)
        shared = SharedPrompts(in_float32(device))(model.to(device), samples, temperature)
    for theirs, ours in zip(plain, shared, strict=True):
        assert ours.shape == theirs.shape
        assert torch.cat(of_responses(ours, samples)).tolist() == pytest.approx(
            torch.cat(of_responses(theirs, samples)).tolist(), abs=3e-5
        )
    ends = torch.tensor([len(s.prompt_ids) + len(s.response_ids) for s in samples]).cumsum(0) - 1
    assert not shared[0][ends].any()


def test_without_entropy_the_log_probs_are_the_same(model: Any) -> None:
    samples = some_samples(model)
    for computes in (forward, SharedPrompts(in_float32("cpu"))):
        both, alone = computes(model, samples, 1.0), computes(model, samples, 1.0, with_entropy=False)
        assert torch.equal(both[0], alone[0])
        assert both[1].any()
        assert not alone[1].any()


def test_responses_of_one_token(model: Any) -> None:
    samples = [Sample(prompt, [EOS], [4], [-1.0], 0.0, 0) for prompt in PROMPTS]
    with torch.no_grad():
        ours, theirs = (computes(model, samples, 1.0)[0] for computes in (SharedPrompts(in_float32("cpu")), forward))
    assert torch.cat(of_responses(ours, samples)).tolist() == pytest.approx(
        torch.cat(of_responses(theirs, samples)).tolist(), abs=1e-5
    )


def loss_and_gradient(
    model: Any, config: DictConfig, samples: list[Sample], given: dict[str, torch.Tensor], computes: Any, whole: bool
) -> tuple[float, torch.Tensor, dict[str, list[float]]]:
    """Of one mini-batch, in one piece or in the micro-batches that the config asks for."""
    settings = parse_settings(config.algorithm.soup, config.actor_rollout_ref.rollout.response_length)
    updater = Updater(model, torch.optim.SGD(model.parameters()), config, settings, computes)
    model.zero_grad()
    mini_batch, total, told = slice(0, len(samples)), 0.0, {}
    pieces = [mini_batch] if whole else list(updater.micro_batches(samples, mini_batch))
    assert whole or len(pieces) > 3
    for rows in pieces:
        loss, metrics = updater.loss(samples, given, rows, mini_batch)
        loss.backward()
        total += float(loss.detach())
        for key, metric in metrics.items():
            told.setdefault(key, []).append(float(metric.aggregate()))
    return total, torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]), told


VARIANTS = {
    "by tokens": ["ppo_max_token_len_per_gpu=100"],
    "by samples": ["use_dynamic_bsz=false", "ppo_micro_batch_size_per_gpu=5"],
    "a mean of means": ["loss_agg_mode=seq-mean-token-mean", "ppo_max_token_len_per_gpu=100"],
    "entropy bonus": ["entropy_coeff=0.01", "ppo_max_token_len_per_gpu=100"],
}


@on_every_device
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_the_plain_path(device: str, variant: str, composed: Any, model: Any) -> None:
    config = composed("example=countdown", "algorithm=soup", *(f"{ACTOR}.{key}" for key in VARIANTS[variant]))
    samples = some_samples(model)
    settings = parse_settings(config.algorithm.soup, config.actor_rollout_ref.rollout.response_length)
    fields, _ = fields_of_loss(rows_before_update(model, samples, 1.0, 4), settings, config)
    # Advantages of a group add up to nothing, and a loss of nothing has no relative error.
    fields["advantages"] = fields["advantages"] + 0.5
    plain = loss_and_gradient(copy.deepcopy(model), config, samples, fields, forward, whole=True)
    shared = SharedPrompts(in_float32(device))
    ours = loss_and_gradient(model.to(device), config, samples, fields, shared, whole=False)
    assert abs(plain[0]) > 0.1
    assert ours[0] == pytest.approx(plain[0], rel=1e-5)
    assert float((ours[1] - plain[1]).norm() / plain[1].norm()) < 1e-3
    assert plain[1].norm() > 0.01
    assert sum(ours[2]["actor/pg_loss"]) == pytest.approx(plain[2]["actor/pg_loss"][0], rel=1e-4)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30),
    limit=st.integers(80, 200),
    start=st.integers(0, 5),
)
def test_micro_batches_are_neighbours_within_the_limit(lengths: list[tuple[int, int]], limit: int, start: int) -> None:
    samples = [Sample([0] * prompt, [0] * response, [], [], 0.0, 0) for prompt, response in lengths]
    updater: Any = SimpleNamespace(_actor=SimpleNamespace(use_dynamic_bsz=True, ppo_max_token_len_per_gpu=limit))
    start = min(start, len(samples) - 1)
    pieces = list(Updater.micro_batches(updater, samples, slice(start, len(samples) + 7)))
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(start, len(samples)))
    sizes = [sum(map(sum, lengths[piece])) for piece in pieces]
    assert max(sizes) <= limit
    # None could have taken the first sample of the next one.
    for size, piece in zip(sizes, pieces[1:], strict=False):
        assert size + sum(lengths[piece.start]) > limit


# ---------------------------------------------------------------- the sampler


@on_every_device
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_those_of_a_plain_forward(device: str, temperature: float, model: Any) -> None:
    prompts, limits = PROMPTS * 30, [24, 5, 1] * 30
    plain = copy.deepcopy(model)
    sampler = StaticSampler(model.to(device), in_float32(device))
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(2):  # on a GPU the second call replays what the first has recorded
        answers = sampler(model, prompts, limits, 3, temperature, EOS, generator)
        samples = [Sample(p, a.token_ids, [], [], 0.0, 0) for p, a in zip(prompts, answers, strict=True)]
        with torch.no_grad():
            log_probs = of_responses(forward(plain, samples, temperature)[0], samples)
        for row, answer, limit in zip(log_probs, answers, limits, strict=True):
            length = len(answer.token_ids)
            assert answer.log_probs == pytest.approx(row.tolist(), abs=5e-5)
            assert EOS not in answer.token_ids[:-1]
            assert length == limit or answer.token_ids[-1] == EOS
            assert answer.extra_fields["global_steps"] == 3
        assert any(answer.token_ids[-1] == EOS for answer in answers)
        # What it samples with next are the weights of an update.
        for mine, its in zip(plain.parameters(), model.parameters(), strict=True):
            with torch.no_grad():
                mine *= 1.05
                its *= 1.05


def test_on_a_cpu_it_samples_what_the_toys_sampler_samples(model: Any) -> None:
    prompts, limits = PROMPTS * 10, [24, 5, 1] * 10
    ours, theirs = (
        sampler(model, prompts, limits, 3, 1.0, EOS, torch.Generator().manual_seed(1))
        for sampler in (StaticSampler(model, in_float32("cpu")), sample)
    )
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in theirs]


@on_every_device
def test_sampled_tokens_follow_the_models_distribution(device: str, model: Any) -> None:
    """Second tokens after one prompt, against their probabilities: chi-square, a bound that fails once in 10,000."""
    n, first = 4000, 5
    with torch.no_grad():
        expected = model(torch.tensor([[*PROMPTS[0], first]])).logits[0, -1].softmax(-1).double().numpy()
    sampler = StaticSampler(model.to(device), in_float32(device))
    generator = torch.Generator(device).manual_seed(1)
    answers = sampler(model, [[*PROMPTS[0], first]] * n, [1] * n, 0, 1.0, EOS, generator)
    counts, expected = np.bincount([a.token_ids[0] for a in answers], minlength=len(expected)), expected * n
    large = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[large].sum()
    freedom = large.sum() - 1
    assert statistic < freedom + 3.72 * np.sqrt(2 * freedom) + 8


@on_every_device
def test_heads_that_share_keys_attend_as_if_each_had_its_own(device: str) -> None:
    """Against attention written out, head by head, in float64."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, heads, width, 8) for heads, width in ((6, 1), (2, 11), (2, 11)))
    mask = torch.rand(5, 1, 1, 11) < 0.7
    mask[..., 0] = True
    arguments: Any = [tensor.to(device) for tensor in (query, key, value, mask)]
    ours, _ = grouped_attention(SimpleNamespace(num_key_value_groups=3), *arguments, scaling=0.3)
    for row in range(5):
        for head in range(6):
            seen = mask[row, 0, 0]
            scores = key[row, head // 3].double() @ query[row, head, 0].double() * 0.3
            weights = scores.masked_fill(~seen, -torch.inf).softmax(0)
            expected = weights @ value[row, head // 3].double()
            assert ours[row, 0, head].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_model_with_shared_keys_samples_from_its_own_distribution() -> None:
    """The toy has a key for each head."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 20}
    heads: Any = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    grouped: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    with torch.no_grad():  # far from uniform, so that a wrong head shows
        for parameter in grouped.parameters():
            parameter *= 8
    prompts, limits = PROMPTS * 5, [12] * 15
    plain = copy.deepcopy(grouped)
    answers = StaticSampler(grouped, in_float32("cpu"))(
        grouped, prompts, limits, 0, 1.0, EOS, torch.Generator().manual_seed(0)
    )
    assert grouped.config._attn_implementation != plain.config._attn_implementation
    samples = [Sample(p, a.token_ids, [], [], 0.0, 0) for p, a in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        log_probs = of_responses(forward(plain, samples, 1.0)[0], samples)
        shared = of_responses(SharedPrompts(in_float32("cpu"))(grouped, samples, 1.0)[0], samples)
    for answer, row, same in zip(answers, log_probs, shared, strict=True):
        assert answer.log_probs == pytest.approx(row.tolist(), abs=1e-4)
        assert same.tolist() == pytest.approx(row.tolist(), abs=1e-4)


def test_frequencies_of_positions_are_not_rounded(model: Any) -> None:
    """A model that is cast as a whole computes other angles for late positions."""
    sampler = StaticSampler(model, Hardware(torch.device("cpu"), torch.bfloat16, shares_prompts=True))
    twin = sampler._current(model)
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for ours, theirs in zip(twin.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_with_a_window_is_refused(model: Any) -> None:
    model.config.sliding_window = 8
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    with pytest.raises(SystemExit, match=r"actor_rollout_ref.model.path=.*attend to all tokens"):
        StaticSampler(model, in_float32("cpu"))


# ---------------------------------------------------------------- whole runs


SMALL = (
    "example=countdown",
    "algorithm=soup",
    "data.train_batch_size=4",
    "data.val_max_samples=8",
    "trainer.total_training_steps=6",
    f"{ACTOR}.optim.lr=1e-3",
    f"{ACTOR}.ppo_mini_batch_size=2",
    f"{ACTOR}.ppo_max_token_len_per_gpu=128",
)


@pytest.fixture
def as_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_module, "TOYS_VOCABULARY", 0)


@pytest.mark.usefixtures("as_a_language_model")
def test_in_float32_a_run_is_the_toys(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of SOUP and a validation: what was sampled is the same, and numbers differ by rounding."""
    runs = []
    for toys in (0, 1024):
        monkeypatch.setattr(hardware_module, "TOYS_VOCABULARY", toys)
        lab = Lab(composed(*SMALL, "precision=fp32", "algorithm.soup.lag=1", "trainer.device=cpu"))
        assert lab.hardware.shares_prompts == (toys == 0)
        steps = [lab.step(step) for step in (1, 2, 3)]
        runs.append([*steps, lab.validation(lab.model, 3)])
    for ours, theirs in zip(*runs, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if "timing" not in key:
                assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=2e-4), key


SOURCES = {
    "lookahead": ["algorithm.soup.lag=2", "algorithm.soup.warm_start=pure"],
    "snapshot": ["algorithm.soup.source=snapshot", "algorithm.soup.snapshot.every=1", "algorithm.soup.lag=2"],
    "base": ["algorithm.soup.source=snapshot", "algorithm.soup.snapshot.policy=base"],
    "replay": ["algorithm.soup.source=replay", "data.train_max_samples=8"],
    "steered": ["algorithm.soup.source=replay", "algorithm.soup.selection=steered", "data.train_max_samples=8"],
    "verified": ["algorithm.soup.source=replay", "algorithm.soup.selection=verified", "data.train_max_samples=8",
                 "trainer.total_epochs=9"],
}  # fmt: skip


@pytest.mark.usefixtures("as_a_language_model")
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_runs_in_bfloat16(source: str, composed: Any) -> None:
    """With weights in float32. The trainer tells behaviour log-probs, so that a ratio is age and not rounding."""
    lab = Lab(composed(*SMALL, *SOURCES[source]))
    assert lab.hardware.dtype == torch.bfloat16
    versions, seen, update = [copy.deepcopy(lab.model)], [], lab.updater.update
    # The lab's own updater, which notes what it is given; a type checker forbids putting a function over a method.
    lab.updater.update = lambda samples, fields: seen.append((samples, fields)) or update(samples, fields)  # type: ignore[method-assign]
    metrics = []
    for step in range(1, 7):
        metrics.append(lab.step(step))
        versions.append(copy.deepcopy(lab.model))
    assert {parameter.dtype for parameter in lab.model.parameters()} == {torch.float32}
    begins = "soup/verified/accepted_share" if source == "verified" else "soup/train/mixed/share"
    assert metrics[-1][begins] > 0
    assert all(set(m) == set(metrics[0]) for m in metrics)
    # As on the real path: wherever the trainer tells the log-probs, how far the sampler was off is told as well.
    names = {name for name in metrics[-1] if name.startswith("soup/prefix/engine_mismatch/")}
    by_trainer = lab.settings.behavior_log_probs == "trainer"
    assert names == ({f"soup/prefix/engine_mismatch/{what}" for what in ("mean", "max")} if by_trainer else set())
    if source == "lookahead":
        assert 0 < metrics[0]["soup/prefix/engine_mismatch/mean"] < metrics[0]["soup/prefix/engine_mismatch/max"] < 0.5
    if source not in ("lookahead", "replay"):
        return
    computes = SharedPrompts(lab.hardware)
    for step, (samples, fields) in enumerate(seen, start=1):
        for version in {version for s in samples for version in s.versions}:
            off = {}
            for other in (version, version - 1 if version else step):
                with torch.no_grad():
                    log_probs = of_responses(computes(versions[other], samples, 1.0)[0], samples)
                differences = [
                    (fields["old_log_probs"][row, : len(values)] - values)[
                        torch.tensor(samples[row].versions) == version
                    ]
                    for row, values in enumerate(log_probs)
                ]
                off[other == version] = float(torch.cat(differences).abs().mean())
            assert off[True] < 5e-3  # the batch that they were computed in was another
            assert off[False] > 5 * off[True]


def test_recomputed_prefixes_keep_their_tokens_and_their_order(composed: Any, model: Any) -> None:
    config = composed("example=countdown", "algorithm=soup", f"{ACTOR}.ppo_max_token_len_per_gpu=40")
    settings = parse_settings(config.algorithm.soup, config.actor_rollout_ref.rollout.response_length)
    updater = Updater(model, torch.optim.SGD(model.parameters()), config, settings)
    samples = some_samples(model)
    seeds = []
    for number, s in enumerate(samples):
        ids = s.response_ids if number % 5 else []
        prefix = Prefix.from_sampled(ids, [0.0] * len(ids), [(4, len(ids))], len(ids), "keep")
        seeds.append(SampledPrefix(number, 0, prefix, len(ids), False, prompt_ids=s.prompt_ids))
    with torch.no_grad():
        expected = of_responses(forward(model, samples, 1.0)[0], samples)
    recomputed, mismatch = recompute(seeds, updater)
    for number, (before, after) in enumerate(zip(seeds, recomputed, strict=True)):
        assert after.ordinal == number
        assert after.prefix.token_ids.tolist() == before.prefix.token_ids.tolist()
        wanted = expected[number].tolist() if number % 5 else []
        assert after.prefix.log_probs.tolist() == pytest.approx(wanted, abs=1e-5)
    # The seeds say 0 of every token.
    off = [-value for number in range(len(seeds)) if number % 5 for value in expected[number].tolist()]
    assert mismatch == pytest.approx(off, abs=1e-5)
    assert recompute([seeds[0]], updater) == ([seeds[0]], [])


@pytest.mark.parametrize("toy", [True, False])
def test_with_bypass_mode_old_log_probs_are_the_samplers(
    toy: bool, composed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl's key: a forward pass less, and no metrics that would compare with it."""
    monkeypatch.setattr(hardware_module, "TOYS_VOCABULARY", 1024 if toy else 0)
    bypass = "algorithm.rollout_correction.bypass_mode=true"
    lab, other = (Lab(composed(*SMALL, "algorithm.soup.lag=1", *more)) for more in ([bypass], []))
    seen, update = [], lab.updater.update
    # The lab's own updater, which notes what it is given; a type checker forbids putting a function over a method.
    lab.updater.update = lambda samples, fields: seen.append((samples, fields)) or update(samples, fields)  # type: ignore[method-assign]
    monkeypatch.setattr(lab.updater, "forward_all", None)
    for step in (1, 2, 3):
        metrics, others = lab.step(step), other.step(step)
        samples, fields = seen[-1]
        for row, values in enumerate(samples):
            assert fields["old_log_probs"][row, : len(values.log_probs)].tolist() == pytest.approx(values.log_probs)
        left_out = {key for key in others if key not in metrics}
        assert set(metrics) <= set(others)
        assert "actor/entropy" in left_out
        assert all(NEEDS_FORWARD.search(key) for key in left_out)
        assert metrics["actor/grad_norm"] > 0
        if step == 1:  # the same samples; in bfloat16 the sampler's log-probs are others than the trainer's
            assert metrics["actor/grad_norm"] == pytest.approx(others["actor/grad_norm"], rel=1e-3 if toy else 0.1)


@pytest.mark.usefixtures("as_a_language_model")
def test_a_killed_run_goes_on_with_the_same_numbers(composed: Any, tmp_path: Path) -> None:
    kept = [f"trainer.default_local_dir={tmp_path}", "trainer.resume_mode=auto", "algorithm.soup.lag=1"]
    lab = Lab(composed(*SMALL, *kept))
    for step in (1, 2):
        lab.step(step)
    lab._save(2)
    went_on = Lab(composed(*SMALL, *kept))
    assert went_on.first_step == 3
    whole, resumed = ({k: v for k, v in run.step(3).items() if "timing" not in k} for run in (lab, went_on))
    assert whole == resumed


@pytest.mark.usefixtures("as_a_language_model")
def test_a_checkpoint_of_another_kind_of_device_is_refused(composed: Any, tmp_path: Path) -> None:
    kept = [f"trainer.default_local_dir={tmp_path}", "trainer.resume_mode=auto"]
    lab: Any = Lab(composed(*SMALL, *kept))
    lab.generator = SimpleNamespace(get_state=lambda: torch.zeros(16, dtype=torch.uint8))  # a GPU's
    lab._save(2)
    with pytest.raises(SystemExit, match=r"trainer.device=cpu: the checkpoint was written on a device of another kind"):
        Lab(composed(*SMALL, *kept))


# ---------------------------------------------------------------- what is chosen


def test_the_choice(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = composed("example=countdown", "algorithm=grpo")
    on_cpu = composed("example=countdown", "algorithm=grpo", "hardware=cpu")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for there, config, vocabulary, chosen in (
        (False, plain, 20, Hardware(cpu, torch.float32, False)),
        (False, plain, 49152, Hardware(cpu, torch.bfloat16, True)),
        (True, plain, 20, Hardware(gpu, torch.bfloat16, True)),
        (True, on_cpu, 20, Hardware(cpu, torch.float32, False)),
        (True, on_cpu, 49152, Hardware(cpu, torch.float32, True)),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert hardware(config, vocabulary) == chosen


def test_float16_is_refused(composed: Any) -> None:
    config = composed("example=countdown", "algorithm=grpo", f"+{PRECISION}.param_dtype=fp16")
    with pytest.raises(SystemExit, match=r"param_dtype=float16: the lab computes in bfloat16 or float32"):
        hardware(config, 49152)
