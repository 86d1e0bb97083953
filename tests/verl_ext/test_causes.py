"""Which words name the cause of a failed run: never advice, and never another error that points to it."""

import inspect
import traceback
from collections.abc import Callable
from pkgutil import resolve_name

import pytest
from ray.exceptions import RayActorError, RayTaskError

from verl_ext.causes import LENGTH, LoggedCause, cause_of, own_words
from verl_ext.health import ENDED

Wrap = Callable[[Exception], BaseException]
NOTHING = "Sync replay buffer selected terminal groups with no materializable trajectories. Enable trainer.v1.sampler."
AGENT_LOG = """ERROR:2026-11-27 20:58:16,214:Error in _run_prompt for uid=1
Traceback (most recent call last):
  File "agent_loop.py", line 7, in _run_agent_loop
    await self._compute_score(outputs)
ray.exceptions.RayTaskError(KeyError): ray::RewardLoopWorker.compute_score() (pid=9, ip=10.0.0.1)
  File "naive.py", line 53, in run_single
    ground_truth = data_item.non_tensor_batch["reward_model"]["ground_truth"]
KeyError: 'ground_truth'
ERROR:2026-11-27 20:58:16,215:Error in _run_prompt for uid=2
Traceback (most recent call last):
ValueError: another one"""
ENGINE_LOG = """INFO 11-27 20:40:10 [core.py:109] Initializing a V1 LLM engine
(EngineCore pid=31) ERROR 11-27 20:40:11 [core.py:1140] EngineCore failed to start.
(EngineCore pid=31) ERROR 11-27 20:40:11 [core.py:1140] Traceback (most recent call last):
(EngineCore pid=31) ERROR 11-27 20:40:11 [core.py:1140]   File "core.py", line 1131, in run_engine_core
(EngineCore pid=31) ERROR 11-27 20:40:11 [core.py:1140] ValueError: No available memory for the cache blocks.
(EngineCore pid=31) Process EngineCore:"""


def as_raised(error: Exception, function: str = "ray::TaskRunnerV1.run()") -> BaseException:
    """As Ray hands an error of another process to the driver."""
    try:
        raise error
    except Exception as raised:
        wrapped = RayTaskError(function, traceback.format_exc(), raised, pid=1, ip="10.0.0.1")
    return wrapped.as_instanceof_cause()


def logged(text: str = "", process: object = 1) -> LoggedCause:
    found = LoggedCause()
    found.take(process, text.splitlines())
    return found


def deep(error: Exception) -> BaseException:
    """A training worker's error, which the trainer's process raises again."""
    inner = as_raised(error, "ray::WorkerDict.actor_rollout_update_actor()")
    assert isinstance(inner, Exception)
    return as_raised(inner)


def as_it_is(error: Exception) -> BaseException:
    """Of the driver itself."""
    return error


@pytest.mark.parametrize("wrap", [as_it_is, as_raised, deep])
def test_an_errors_own_words(wrap: Wrap) -> None:
    assert own_words(wrap(ValueError("too long"))) == "ValueError: too long"
    assert own_words(wrap(KeyError("ground_truth"))) == "KeyError: 'ground_truth'"
    assert own_words(wrap(RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB."))) == (
        "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB."
    )
    assert len(own_words(wrap(ValueError("x" * 9999)))) < LENGTH + 10


def test_an_assertion_without_words_is_named_by_its_line() -> None:
    try:
        raise AssertionError
    except AssertionError as error:
        words = own_words(error)
        across = own_words(RayTaskError("f", traceback.format_exc(), error, pid=1, ip="i").as_instanceof_cause())
    for found in (words, across):
        assert found.startswith("AssertionError in ")
        assert found.endswith(": raise AssertionError")


def test_an_actor_that_died_in_its_start_is_named_by_its_error() -> None:
    died = RayActorError()
    died.error_msg = "The actor died because of an error raised in its creation task, ray::f()\nValueError: no room"
    assert own_words(died) == "ValueError: no room"
    died.error_msg = "The actor died unexpectedly before finishing this task.\n\tclass_name: WorkerDict\n\tpid: 1"
    words = own_words(died)
    assert words.startswith("RayActorError: The actor died unexpectedly")
    assert "WorkerDict" in words


@pytest.mark.parametrize("wrap", [as_it_is, as_raised])
@pytest.mark.parametrize(
    ("error", "log", "cause"),
    [
        (RuntimeError(NOTHING), AGENT_LOG, "KeyError: 'ground_truth'"),
        (RuntimeError(NOTHING), "", f"RuntimeError: {NOTHING}"),
        (
            RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}"),
            ENGINE_LOG,
            "ValueError: No available memory for the cache blocks.",
        ),
        # A sample that was lost earlier is not why a worker failed.
        (ValueError("data size must be divisible"), AGENT_LOG, "ValueError: data size must be divisible"),
        (
            RuntimeError("connection lost"),
            f"{ENGINE_LOG}\nThe vLLM engine died; its own error stands further up. {ENDED}",
            "ValueError: No available memory for the cache blocks. (The vLLM engine died)",
        ),
        (
            RuntimeError(f"The engine died; look there. {ENDED}"),
            f"Step 7 lost 59 of 64 samples. {ENDED}\nThe engine died; look there. {ENDED}",
            f"The engine died; look there. {ENDED}",
        ),
        (RuntimeError("connection lost"), f"(TaskRunner) \nThe engine died. {ENDED}", f"The engine died. {ENDED}"),
    ],
)
def test_the_cause_of_a_run_that_failed(wrap: Wrap, error: Exception, log: str, cause: str) -> None:
    assert cause_of(wrap(error), logged(log)) == cause


def test_a_validation_that_lost_all_samples_has_their_cause() -> None:
    def _validate() -> None:
        raise ValueError("Received an empty list as keys.")

    with pytest.raises(ValueError, match="empty list") as raised:
        _validate()
    assert cause_of(raised.value, logged(AGENT_LOG)) == "KeyError: 'ground_truth'"
    assert cause_of(raised.value, logged()) == "ValueError: Received an empty list as keys."


def test_lines_of_several_processes_do_not_mix() -> None:
    found = LoggedCause()
    lines = [str(line) for line in AGENT_LOG.splitlines()]
    found.take(1, lines[:3])
    found.take(2, ["OSError: of another process"])
    found.take(1, lines[3:])
    assert found.raised == "KeyError: 'ground_truth'"


@pytest.mark.parametrize(
    ("symbol", "words"),
    [
        ("verl.trainer.ppo.v1.agent_loop_tq", "Error in _run_prompt"),
        ("verl.trainer.ppo.v1.replay_buffer.ReplayBuffer.sample", "no materializable trajectories"),
        ("verl.trainer.ppo.v1.trainer_base.PPOTrainer", "def _validate("),
        ("vllm.v1.engine.core", "EngineCore failed to start"),
        ("vllm.v1.engine.utils", "See root cause above"),
        ("verl_ext.health", "died; its own error"),
    ],
)
def test_verl_and_vllm_still_say_so(symbol: str, words: str) -> None:
    assert words in inspect.getsource(resolve_name(symbol))
