"""Notice that no more samples come, which verl waits for in silence, and say what is waited for."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

ANSWER_SECONDS = 10.0
POOL = "/concurrent/futures/thread.py"
CALLERS = (POOL, "/threading.py", "/reward_loop/reward_manager/", "/trainer/ppo/reward.py")
"""Files through which verl's reward workers call a reward function, in a thread of a pool."""


class StallWatch:
    """Measures how long verl's replay buffer has waited without any sample coming, failing or going out.

    Args:
        seconds: the longest wait.
        stalled: called once it is over, with the step or validation's partition; must raise.
    """

    def __init__(self, seconds: float, stalled: Callable[[str], None]) -> None:
        self._seconds, self._stalled = seconds, stalled
        self._seen: tuple[int, ...] | None = None
        self._since = 0.0

    def watch(self, buffer: Any) -> None:
        """Have each poll of a `ReplayBuffer` looked at; its methods are wrapped in place."""
        wait = buffer._wait_for_next_poll

        def anew(waits: Callable[..., Any]) -> Callable[..., Any]:
            def begin(*args: Any, **kwargs: Any) -> Any:
                self._seen = None
                return waits(*args, **kwargs)

            return begin

        def look_and_wait(partition_id: str, *args: Any) -> Any:
            self.look(partition_id, _counts(buffer, partition_id))
            return wait(partition_id, *args)

        buffer.sample, buffer._wait_for_next_poll = anew(buffer.sample), look_and_wait
        if hasattr(buffer, "wait_for_sampleable"):  # of an asynchronous trainer, also called by itself
            buffer.wait_for_sampleable = anew(buffer.wait_for_sampleable)

    def look(self, partition_id: str, counts: tuple[int, ...]) -> None:
        """Take what is there at a poll."""
        now = time.monotonic()
        if counts != self._seen:
            self._seen, self._since = counts, now
        elif now - self._since > self._seconds:
            self._stalled(partition_id)


def _counts(buffer: Any, partition_id: str) -> tuple[int, ...]:
    prompts = (buffer.pending_keys, buffer.running_keys, buffer.finished_keys, buffer.failure_keys)
    return (len(buffer.partitions[partition_id]), *(len(keys[partition_id]) for keys in prompts))


def busy_places(_: Any) -> list[str]:
    """Return where this process's pool threads are: function, file and line of what they were given to do."""
    frames, places = sys._current_frames(), []
    for thread in threading.enumerate():
        frame, stack = frames.get(thread.ident or 0), []
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
        files = [one.f_code.co_filename for one in stack]
        if not any(POOL in file for file in files) or POOL in files[0]:
            continue  # another thread, or one that waits for work
        given = [one for one in reversed(stack) if not any(part in one.f_code.co_filename for part in CALLERS)]
        place = given[0] if given else stack[0]
        places.append(f"{place.f_code.co_name} ({place.f_code.co_filename}, line {place.f_lineno})")
    return places


def what_grades(workers: list[Any]) -> str:
    """Return what reward workers are doing, in words.

    Args:
        workers: verl's reward workers (Ray actors), each of which grades in threads.
    """
    asked = [worker.__ray_call__.remote(busy_places) for worker in workers]
    answered, silent = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
    found: Counter[str] = Counter()
    for answer in answered:
        try:
            found.update(ray.get(answer))
        except RayError:
            silent.append(answer)
    said = [f"{place}, {number} times" if number > 1 else place for place, number in found.most_common(2)]
    if said:
        return f"A reward is still being computed: {'; '.join(said)}."
    if silent:
        return f"{len(silent)} of {len(asked)} reward workers do not answer: an async reward function blocks them."
    return "No reward is being computed, so it is the generation, a tool, or what an agent loop of your own waits for."
