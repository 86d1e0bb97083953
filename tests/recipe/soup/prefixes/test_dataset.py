"""Which demonstrations a prompt's samples get, and how much of them."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from recipe.soup.prefixes.dataset import DatasetSource
from recipe.soup.prefixes.demonstrations import Demonstrations
from recipe.soup.prefixes.make_source import make_source
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.requests import PromptRequests
from recipe.soup.settings import PrefixLengthSettings, SoupSettings
from recipe.soup.settings.schedules import Schedules, ScheduleSettings
from verl_ext.health import RunEndedError

SAMPLES, RESPONSE_LENGTH, PROMPTS = 8, 12, 2
WHOLE = PrefixLengthSettings(distribution="whole")


class Tokenizer:
    """A character is a token; 0 ends."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(map(ord, text))


def source(cells: list[Any], length: PrefixLengthSettings = WHOLE, **settings: Any) -> DatasetSource:
    """Prompts in order, two a step; the cells come again and again."""
    fetched = iter(range(0, 1000, PROMPTS))

    def fetch() -> tuple[list[dict[str, Any]], list[str], int]:
        first = next(fetched)
        rows = [{"target": cells[(first + i) % len(cells)]} for i in range(PROMPTS)]
        return rows, [f"prompt {first + i}" for i in range(PROMPTS)], first

    soup = SoupSettings(source="dataset", ratio="luffy", prefix_length=length, **settings)
    soup.fill(RESPONSE_LENGTH)
    facts = RunFacts(SAMPLES, RESPONSE_LENGTH, 0, PROMPTS, 100)
    read = Demonstrations(soup.demonstrations, Tokenizer(), lambda batch: batch)
    made = make_source(soup, facts, fetch, None, "base", None, read)
    return cast(DatasetSource, made)


def texts(slots: dict[int, Prefix]) -> list[str]:
    return ["".join(map(chr, prefix.token_ids)) for prefix in slots.values()]


def test_whole_demonstrations_are_complete_samples_each_once_at_most() -> None:
    made = source([["abc", "de"]], mixed_share=0.5)
    assert type(made) is DatasetSource
    for step in range(1, 20):
        chunk, prefixes = made.take(step)
        made.order(step, [PromptRequests() for _ in chunk.messages])
        for slots in prefixes:
            assert list(slots) == [0, 1]
            assert sorted(texts(slots)) == ["abc\0", "de\0"]
            assert all(prefix.complete and set(prefix.versions) == {-2} for prefix in slots.values())
    assert made.metrics()["soup/demonstrations/prompts_without"] == 0
    assert made.metrics()["soup/cost/seed_requests"] == 0


def test_which_of_several_is_drawn_anew_at_each_visit() -> None:
    made = source([["abc", "de", "f"]], mixed_share=0.125)
    drawn = [texts(slots) for step in range(1, 40) for slots in made.take(step)[1]]
    assert {text for [text] in drawn} == {"abc\0", "de\0", "f\0"}


def test_whole_ones_that_are_too_long_and_prompts_without_any_are_counted() -> None:
    made = source(["x" * RESPONSE_LENGTH, ["x" * (RESPONSE_LENGTH - 1), None]], mixed_share=0.125)
    _, prefixes = made.take(1)
    assert [list(slots) for slots in prefixes] == [[], [0]]
    told = made.metrics()
    assert (told["soup/demonstrations/prompts_without"], told["soup/demonstrations/too_long"]) == (1, 1)
    assert made.metrics()["soup/demonstrations/too_long"] == 0


def test_prefixes_share_demonstrations_where_there_are_fewer_and_are_never_all_of_a_response() -> None:
    length = PrefixLengthSettings(min=2, max=11)
    made = source(["x" * 30], length, mixed_share=0.5)
    seen = set()
    for step in range(1, 60):
        for slots in made.take(step)[1]:
            assert list(slots) == [0, 1, 2, 3]
            assert not any(prefix.complete for prefix in slots.values())
            seen |= {len(prefix) for prefix in slots.values()}
    assert seen == set(range(2, 12))


@pytest.mark.parametrize("characters", [3, 7])
def test_a_fraction_is_one_of_the_demonstration(characters: int) -> None:
    """With its end token it has one token more."""
    length = PrefixLengthSettings(distribution="fixed", unit="fraction", max=0.5)
    made = source(["x" * characters], length, mixed_share=0.25)
    assert not made.wants_responses
    lengths = {len(prefix) for step in (1, 2, 3) for slots in made.take(step)[1] for prefix in slots.values()}
    assert lengths == {(characters + 1) // 2}


def test_a_prefix_that_reaches_the_end_is_kept_or_loses_its_end() -> None:
    length = PrefixLengthSettings(distribution="fixed", max=11)
    kept = source(["abc"], length, mixed_share=0.125).take(1)[1][0][0]
    cut = source(["abc"], length, mixed_share=0.125, on_eos="cut").take(1)[1][0][0]
    assert (len(kept), kept.complete, len(cut), cut.complete) == (4, True, 3, False)


def test_the_share_may_move() -> None:
    falling = ScheduleSettings(shape="linear", end=0, steps=10)
    made = source([["a", "b", "c", "d"]], mixed_share=0.5, schedules=Schedules(mixed_share=falling))
    counts = [sum(map(len, made.take(step)[1])) for step in range(1, 13)]
    assert counts[0] == 8
    assert counts[-3:] == [0, 0, 0]


def test_samples_may_share_a_prefix() -> None:
    length = PrefixLengthSettings(min=1, max=5)
    made = source(["abcdefghij"], length, mixed_share=1, samples_per_prefix=4)
    for slots in made.take(1)[1]:
        assert list(slots) == list(range(8))
        assert len({id(prefix) for prefix in slots.values()}) == 2


def test_a_resumed_run_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    whole = source([["abc", "de", "f"]], mixed_share=0.25)
    first = [whole.take(step)[1] for step in range(1, 5)]
    whole.save(tmp_path)
    after = [list(map(texts, whole.take(step)[1])) for step in (5, 6)]
    again = source([["abc", "de", "f"]], mixed_share=0.25)
    again.load(tmp_path)
    assert (
        [list(map(texts, again.take(step)[1])) for step in (5, 6)] == after != [list(map(texts, s)) for s in first[:2]]
    )
    assert len(again.bank) == 0


def test_a_first_step_without_any_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    made = source([None])
    for step in (1, 2):
        assert made.take(step)[1] == [{}, {}]
    assert capsys.readouterr().out.count("no prompt that was fetched for step 1 has a demonstration that fits") == 1


def test_a_cell_of_another_kind_ends_the_run_with_a_sentence() -> None:
    with pytest.raises(RunEndedError, match=r"demonstrations.column=target: a demonstration is a text.*not 3; mend"):
        source([3]).take(1)


def test_log_probs_are_numbers_that_nobody_reads() -> None:
    [prefix] = source(["abc"], mixed_share=0.125).take(1)[1][0].values()
    assert np.array_equal(prefix.log_probs, np.zeros(4, dtype=np.float32))
