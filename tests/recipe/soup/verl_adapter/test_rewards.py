"""A reward is one finite number: what is none is a lost sample, before it reaches verl's queue, and says why."""

import asyncio
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transfer_queue as tq
import verl.trainer.ppo.v1.agent_loop_tq as agent_loop_tq
from training_worker import COUNTDOWN, StillWorkers, Store, make_trainer, recorded
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics

from recipe.soup.verl_adapter.mixed_loop import SoupAgentLoopOutput
from recipe.soup.verl_adapter.rewards import graded, measurable, number
from recipe.soup.verl_adapter.trainer import SoupTrainer
from verl_ext.failures import in_a_line
from verl_ext.health import ENDED, RunEndedError

NUMBERS = [1, -1.5, True, np.bool_(True), np.float32(0.5), np.int64(3), np.array(2.0), torch.tensor(0.25)]
NO_NUMBERS = [
    float("nan"), float("inf"), -float("inf"), 1e39, None, (1.0, "why"), [1.0], {"score": 1.0}, "text", "1.0",
    np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), np.float64("nan"), torch.tensor(float("inf")), 1j, Decimal("NaN"),
]  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_stay(value: Any) -> None:
    assert graded(value, lambda: pytest.fail("nothing to say")) == float(value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_finite_number_is_refused_with_its_sample(value: Any) -> None:
    """1e39 is a number, and infinite in verl's float32."""
    with pytest.raises(ValueError, match="is not one finite number") as refusal:
        graded(value, lambda: ("3 5 7=22:", "3*5\n=15" + 1000 * "," + "the end"))
    text = str(refusal.value)
    assert "the reward " + repr(value)[:20] in text
    assert "prompt '3 5 7=22:'" in text
    assert r"response '3*5\n=15,,," in text
    assert text.endswith("the end')")
    assert in_a_line(refusal.value) == f"ValueError: {text}".rstrip(")") + ")"  # it fits into a line that is told
    assert len(text) < 300


def postprocess(reward: Any, info: Any, tokenizer: Any, is_graded: bool = True) -> dict[str, Any]:
    """verl's own way from an agent loop's output to its queue; returns what is stored."""
    stored: list[Any] = []

    async def put(fields: Any, **_: Any) -> None:
        stored.append(fields)

    async def compute_score(outputs: list[Any], kwargs: dict) -> None:
        if is_graded:  # as `AgentLoopWorker._compute_score` does
            outputs[-1].reward_score = reward
            outputs[-1].extra_fields["reward_extra_info"] = info

    async def no_teacher(*_: Any, **__: Any) -> None: ...

    worker = SimpleNamespace(
        _compute_score=compute_score,
        _compute_teacher_logprobs=no_teacher,
        _compute_multi_modal_inputs=lambda *_: {},
        _compute_position_ids=lambda ids, *_: torch.arange(ids.size(1))[None],
    )
    output = SoupAgentLoopOutput(
        prompt_ids=tokenizer.encode("3 5 7=22:"),
        response_ids=tokenizer.encode("3*5=15"),
        response_mask=[1] * len(tokenizer.encode("3*5=15")),
        metrics=AgentLoopMetrics(),
        policy_versions=[0] * len(tokenizer.encode("3*5=15")),
        extra_fields={},
        tokenizer=tokenizer,
    )
    cls: Any = agent_loop_tq.AgentLoopWorkerTQ
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tq, "async_kv_batch_put", put)
        run: Any = cls.__ray_metadata__.modified_class._agent_loop_postprocess
        asyncio.run(run(worker, output, False, uid="u", session_id=0, global_steps=1))
    return stored[0]


@pytest.fixture(scope="module")
def tokenizer(countdown_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(countdown_dir / "base_model")


def test_verls_worker_raises_before_it_stores_such_a_sample(tokenizer: Any) -> None:
    for value in (float("nan"), None, (1.0, "why"), "text"):
        with pytest.raises(ValueError, match=r"not one finite number \(prompt '3 5 7=22:', response '3\*5=15'\)"):
            postprocess(value, {"acc": value}, tokenizer)


def test_a_reward_and_what_it_tells_are_stored_as_plain_values(tokenizer: Any) -> None:
    """Under names that verl's validation leaves free: what is called `reward` there would shift all that follows."""
    stored = postprocess(torch.tensor(0.5), {"score": np.float32(0.5), "reward": 7, "uid": 1}, tokenizer)
    assert stored["rm_scores"][0, -1] == 0.5
    info = stored["extra_fields"][0]["reward_extra_info"]
    assert info == {"score": 0.5, "told_reward": 7, "told_uid": 1}
    assert type(info["score"]) is float


def test_a_sample_that_the_trainer_will_grade_has_no_reward_yet(tokenizer: Any) -> None:
    assert "rm_scores" not in postprocess(None, None, tokenizer, is_graded=False)


def test_the_trainer_refuses_a_batch_whose_rewards_came_another_way(composed: Any, store: Store) -> None:
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=grpo"), StillWorkers(store))
    batch = recorded(store)
    store.rows[batch.keys[3]]["rm_scores"][-1] = torch.nan
    with pytest.raises(RunEndedError) as refusal:
        trainer._compute_old_log_prob(batch, {})
    text = str(refusal.value)
    assert text.startswith("In step 5 1 rewards are not finite; the first is nan (prompt '")
    assert trainer.tokenizer.decode(store.rows[batch.keys[3]]["prompts"]).strip()[:8] in text
    assert text.endswith(ENDED)


def test_what_verls_metrics_can_read_is_told_from_the_rest() -> None:
    columns: dict[str, list[Any]] = {
        "acc": [True, None, np.float64(0.5)],
        "msg": ["a", None, "b"],
        "pred": ["a", 3, None],
        "mixed": [1.0, "text", None],
        "parts": [np.array([1.0, 2.0]), None, None],
        "seen": [{1}, {2}, None],
        "nothing": [None, None, None],
    }
    fit, rest = measurable(columns)
    assert fit == {
        "acc": [1.0, None, 0.5],
        "msg": ["a", None, "b"],
        "pred": ["a", "3", None],
        "nothing": [None, None, None],
    }
    assert rest == ["mixed", "parts", "seen"]
    assert number(np.array([[1.0]])) == 1.0
