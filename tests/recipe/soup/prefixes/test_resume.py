"""A run that goes on with other settings: what fits is used, the rest is dropped, shortened or refused, and told."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.soup.bank_origin import NOT_ALWAYS_KNOWN, NOTHING, SOURCE, TOKENIZER
from recipe.soup.prefixes.finished import FinishedSample, fingerprint
from recipe.soup.prefixes.fit import LATE, LONG, OLD, SLOTS
from recipe.soup.prefixes.lookahead import LookaheadSource
from recipe.soup.prefixes.make_source import make_source
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.replay import ReplaySource
from recipe.soup.prefixes.requests import PromptRequests, SampledPrefix
from recipe.soup.prefixes.resume import IN_ORDER, REFUSED, WHOLE, changes, check_bank, resume
from recipe.soup.prefixes.source import BANK_FILE, PrefixSource, RunFacts
from recipe.soup.prefixes.steered import SteeredSource
from recipe.soup.prefixes.steering import Stored
from recipe.soup.settings import SoupSettings
from verl_ext.health import NOTICE, RunEndedError

LAG, N, LAST_STEP = "algorithm.soup.lag", "actor_rollout_ref.rollout.n", 40
LONGEST = "algorithm.soup.prefix_length.max"
PER_STEP, LENGTH = 2, 16


def source_of(
    n: int = 4,
    response_length: int = LENGTH,
    origin: dict[str, Any] | None = None,
    first: int = 0,
    last_step: int = LAST_STEP,
    **soup: Any,
) -> PrefixSource:
    """A source that has fetched the first prompts; its origin has what is given and what it is made of."""
    length = {"distribution": "fixed", "min": 1, "max": 8, **soup.pop("prefix_length", {})}
    settings = SoupSettings.model_validate({"lag": 6, "warm_start": "fill", **soup, "prefix_length": length})
    settings.fill(response_length)
    now = {
        SOURCE: settings.source if settings.mixes else NOTHING,
        N: n,
        LAG: settings.lag,
        LONGEST: settings.prefix_length.max,
        "data.max_response_length": response_length,
        "algorithm.soup.selection": settings.selection,
        "trainer.total_training_steps": last_step,
        **(origin or {}),
    }
    numbers = iter(range(first * PER_STEP, 1000, PER_STEP))

    def fetch() -> tuple[None, list[str], int]:
        start = next(numbers)
        return None, [f"prompt {i}" for i in range(start, start + PER_STEP)], start

    facts = RunFacts(n, response_length, 0, PER_STEP, last_step, 10, now)
    return make_source(settings, facts, fetch, None, "", None)


def step(source: PrefixSource, number: int) -> list[dict[int, Prefix]]:
    """One step of a trainer: the prefixes of its prompts; what is asked for comes back, tokens 0, 1, 2, ..."""
    _, prefixes = source.take(number)
    rows = [PromptRequests() for _ in prefixes]
    source.order(number, rows)
    arrived = []
    for request in [r for row in rows for per_sample in row.requests.values() for r in per_sample]:
        for slot, length in request.lengths.items():
            ids, log_probs = np.arange(length, dtype=np.int32), -np.ones(length, np.float32)
            prefix = Prefix(ids, log_probs, ((number - 1, length),))
            arrived.append(SampledPrefix(request.ordinal, slot, prefix, length + 1, False))
    source.harvest(arrived)
    source.in_flight.clear()
    return prefixes


def left_behind(folder: Path, steps: int = 10, **keys: Any) -> PrefixSource:
    source = source_of(**keys)
    for number in range(1, steps + 1):
        step(source, number)
    source.save(folder)
    return source


def resumed(folder: Path, steps: int = 10, **keys: Any) -> PrefixSource:
    source = source_of(first=steps, **keys)
    resume(source, folder, steps)
    return source


def goes_on(source: PrefixSource, steps: int = 10, more: int = 12) -> list[list[dict[int, Prefix]]]:
    return [step(source, number) for number in range(steps + 1, steps + 1 + more)]


def ages(prefixes: list[list[dict[int, Prefix]]], steps: int = 10) -> list[set[int]]:
    """Of each step's prefixes."""
    return [
        {number - 1 - prefix.newest for slots in of_step for prefix in slots.values()}
        for number, of_step in enumerate(prefixes, start=steps + 1)
    ]


# ---------------------------------------------------------------- nothing has changed


@given(
    lag=st.integers(1, 8),
    steps=st.integers(1, 14),
    share=st.sampled_from([0.1, 0.5, 0.7, 1.0]),
    warm_start=st.sampled_from(["pure", "fill", "ramp"]),
    drawn=st.sampled_from(["fixed", "uniform", "geometric"]),
    shapes=st.sampled_from([{}, {"lag": {"shape": "linear", "end": 2}}, {"mixed_share": {"warmup": 6}}]),
)
def test_what_the_same_settings_made_fits_them(
    tmp_path_factory: pytest.TempPathFactory,
    lag: int,
    steps: int,
    share: float,
    warm_start: str,
    drawn: str,
    shapes: dict[str, Any],
) -> None:
    folder = tmp_path_factory.mktemp("same")
    keys = {"lag": lag, "mixed_share": share, "warm_start": warm_start, "lag_distribution": drawn, "schedules": shapes}
    left_behind(folder, steps, **keys)
    source = resumed(folder, steps, **keys)
    assert not source.adapt(steps, {"algorithm.soup.prefix_length.max"})


def test_nothing_is_said_where_nothing_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left_behind(tmp_path)
    after = resumed(tmp_path)
    assert ages(goes_on(after)) == ages(goes_on(before)) == [{6}] * 12
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- adapted


def test_a_shorter_lag_drops_what_is_older(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = len(left_behind(tmp_path).bank)
    after = goes_on(resumed(tmp_path, lag=2))
    told = capsys.readouterr().out
    assert told.startswith(NOTICE)
    assert told.count("\n") == 1
    assert f"{LAG}=2 (was 6)" in told
    assert f"of its {held} prefixes 0 are used, and dropped are {held} {OLD}." in told
    assert ages(after) == [set(), {1}, *[{2}] * 10]


def test_what_a_step_of_a_drawn_lag_left_is_dropped_where_it_is_older_than_its_prompts_lag(tmp_path: Path) -> None:
    left_behind(tmp_path)
    source = resumed(tmp_path, lag=6, lag_distribution="uniform", origin={"algorithm.soup.lag_distribution": "uniform"})
    assert len(source.bank) == 24  # neither of the two says how its lag is distributed
    dropped = source.adapt(10, {LAG})
    assert 0 < dropped[OLD] < 24


def test_a_run_that_was_shortened_can_be_lengthened_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(tmp_path)
    shorter = resumed(tmp_path, last_step=12)
    assert f"of its 24 prefixes 8 are used, and dropped are 16 {LATE}." in capsys.readouterr().out
    goes_on(shorter, more=1)
    shorter.save(tmp_path)
    longer = resumed(tmp_path, steps=11)
    assert "trainer.total_training_steps=40 (was 12); of its 4 prefixes 4 are used." in capsys.readouterr().out
    assert ages(goes_on(longer, steps=11), steps=11)[:2] == [{6}, {1}]


def test_a_longer_lag_uses_what_is_younger_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(tmp_path, lag=2)
    after = goes_on(resumed(tmp_path, lag=5))
    assert "of its 8 prefixes 8 are used." in capsys.readouterr().out
    # The two steps that had their prefixes, then what is sampled at once, up to the lag.
    assert ages(after) == [{2}, {2}, {2}, {3}, {4}, *[{5}] * 7]


def test_fewer_samples_leave_no_slots_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(tmp_path, n=8)
    source = resumed(tmp_path, n=4)
    assert f"of its 48 prefixes 24 are used, and dropped are 24 {SLOTS}." in capsys.readouterr().out
    assert all(set(slots) == {0, 1} for of_step in goes_on(source) for slots in of_step)


def test_more_samples_are_sampled_for(tmp_path: Path) -> None:
    left_behind(tmp_path, n=4)
    after = goes_on(resumed(tmp_path, n=8))
    assert [set(slots) for slots in after[0]] == [{0, 1}] * 2
    assert all(set(slots) == {0, 1, 2, 3} for of_step in after[1:] for slots in of_step)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_sharing(tmp_path: Path, before: int, after: int) -> None:
    left_behind(tmp_path, samples_per_prefix=before)
    sharing = {"algorithm.soup.samples_per_prefix": after}
    source = resumed(tmp_path, samples_per_prefix=after, origin=sharing)
    source.adapt(10, sharing)
    for of_step in goes_on(source)[1:]:
        for slots in of_step:
            assert set(slots) == {0, 1}
            assert (slots[0] is slots[1]) == (after == 2)


def test_prefixes_that_are_too_long_are_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(tmp_path)
    after = goes_on(resumed(tmp_path, prefix_length={"max": 3}))
    assert f"{LONGEST}=3 (was 8.0)" in capsys.readouterr().out.replace("=3.0 ", "=3 ")
    prefixes = [prefix for of_step in after for slots in of_step for prefix in slots.values()]
    assert all(prefix.token_ids.tolist() == [0, 1, 2] and prefix.version_spans[0][1] == 3 for prefix in prefixes)
    assert ages(after) == [{6}] * 12


def test_a_shorter_response_leaves_something_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(tmp_path)
    source = resumed(tmp_path, response_length=6, prefix_length={"max": 5})
    assert "of its 24 prefixes 24 are used (24 of them shortened)." in capsys.readouterr().out
    assert {len(prefix) for _, _, prefix in source.bank.items()} == {5}


def test_responses_that_were_kept_whole_have_no_beginning_that_is_whole() -> None:
    source = source_of(source="replay", prefix_length={"distribution": "whole"}, response_length=6)
    assert isinstance(source, ReplaySource)
    for slot, length in enumerate((4, 9)):
        ids, log_probs = np.arange(length, dtype=np.int32), np.zeros(length, np.float32)
        source.bank.put(77, slot, Prefix(ids, log_probs, ((1, length),), complete=True))
    assert source.adapt(10, {"data.max_response_length"}) == {LONG: 1}
    assert source.bank.slots(77) == {0}


def test_replay_knows_its_slots_and_lengths_as_well() -> None:
    source = source_of(source="replay", n=4, mixed_share=0.4, prefix_length={"max": 3})
    for slot in range(4):
        source.bank.put(77, slot, Prefix(np.arange(8, dtype=np.int32), np.zeros(8, np.float32), ((1, 8),)))
    # 4 * 0.4 prefixes are one or two.
    assert source.adapt(10, {N, LONGEST}) == {SLOTS: 2, "cut": 2}
    assert [len(prefix) for prefix in source.bank.take(77).values()] == [3, 3]


def test_what_is_stored_for_steering_fits_shorter_responses() -> None:
    steering = {"limit": 0.5, "kept": 1}
    source = source_of(source="replay", selection="steered", prefix_length={"distribution": "uniform", "max": None},
                       response_length=6, steering=steering)  # fmt: skip
    assert isinstance(source, SteeredSource)
    for visit, length in enumerate((4, 5, 9)):
        response = Prefix(np.arange(length, dtype=np.int32), np.zeros(length, np.float32), ((1, length),), True)
        source.steering.prompts[7].stored[1].append(Stored(response, visit, -1))
    source.steering.prompts[7].help = 0.8
    assert source.holds == (3, "stored responses")
    assert source.adapt(10, {"data.max_response_length"}) == {LONG: 1}
    assert [stored.visit for stored in source.steering.prompts[7].stored[1]] == [1]
    assert source.steering.prompts[7].help == 0.5


# ---------------------------------------------------------------- refused


def refusal(folder: Path, now: dict[str, Any]) -> str:
    with pytest.raises(SystemExit) as refused:
        check_bank("trainer.default_local_dir", folder, now)
    said = str(refused.value)
    assert "\n" not in said
    assert said.endswith(".")
    assert "algorithm.soup.resume_bank=fresh" in said
    return said


@pytest.mark.parametrize("key", [*REFUSED, *IN_ORDER])
def test_what_can_no_longer_be_used_is_refused_by_name(tmp_path: Path, key: str) -> None:
    left_behind(tmp_path, origin={key: "old"})
    now = {**source_of().facts.origin, key: "new"}
    said = refusal(tmp_path, now)
    assert said.startswith(f"{key}=new: the prefixes in {tmp_path} were made with old, ")
    # Nobody can go on with a digest, or with the size of a file.
    back = "put back what it was" if key in NOT_ALWAYS_KNOWN else "go on with old"
    assert f"; {back}, or set" in said
    check_bank("", tmp_path, {**now, key: "old"})


@pytest.mark.parametrize("key", IN_ORDER)
def test_replay_finds_its_prompts_wherever_they_are(tmp_path: Path, key: str) -> None:
    source = source_of(source="replay", origin={key: "old"})
    source.save(tmp_path)
    check_bank("", tmp_path, {**source.facts.origin, key: "new"})


@pytest.mark.parametrize(("then", "now", "refused"), [("uniform", "whole", True), ("whole", "uniform", True),
                                                      ("fixed", "uniform", False)])  # fmt: skip
def test_whole_responses_and_prefixes_are_two_things(tmp_path: Path, then: str, now: str, refused: bool) -> None:
    source = left_behind(tmp_path, origin={WHOLE: then})
    changed = {**source.facts.origin, WHOLE: now}
    if refused:
        assert refusal(tmp_path, changed).startswith(f"{WHOLE}={now}: ")
    else:
        check_bank("", tmp_path, changed)


def test_a_torn_bank_an_older_one_and_none(tmp_path: Path) -> None:
    now = dict(left_behind(tmp_path).facts.origin)
    content = (tmp_path / BANK_FILE).read_bytes()
    (tmp_path / BANK_FILE).write_bytes(content[:500])
    assert f"{BANK_FILE} is torn, or no file of arrays; resume another" in refusal(tmp_path, now)
    np.savez(tmp_path / BANK_FILE, source="lookahead")
    assert f"{BANK_FILE} was written before it said what shaped its prefixes" in refusal(tmp_path, now)
    (tmp_path / BANK_FILE).unlink()
    assert f"this checkpoint has no {BANK_FILE}" in refusal(tmp_path, now)


def test_what_lies_beside_the_bank_is_torn_or_lost(tmp_path: Path) -> None:
    now = dict(left_behind(tmp_path).facts.origin)
    (tmp_path / "soup_lengths.npz").write_bytes(b"PK")
    assert "soup_lengths.npz is torn" in refusal(tmp_path, now)
    source = source_of(source="replay", selection="steered", prefix_length={"distribution": "uniform", "max": None})
    source.save(tmp_path)
    check_bank("", tmp_path, source.facts.origin)
    (tmp_path / "soup_steering.npz").unlink()
    assert "so the controllers of selection=steered are lost" in refusal(tmp_path, dict(source.facts.origin))


def test_past_weights_that_are_lost(tmp_path: Path) -> None:
    source = left_behind(tmp_path, origin={SOURCE: "snapshot"})
    assert "past weights are lost" in refusal(tmp_path, dict(source.facts.origin))


@pytest.mark.parametrize("part", ["next_ordinal", "token_ids"])
def test_what_only_the_loading_finds_ends_the_run_with_a_sentence(
    tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    left_behind(tmp_path)
    content = bytearray((tmp_path / BANK_FILE).read_bytes())
    with zipfile.ZipFile(tmp_path / BANK_FILE) as parts:
        where = parts.getinfo(f"{part}.npy")
        content[where.header_offset + where.file_size] ^= 255
    (tmp_path / BANK_FILE).write_bytes(content)
    with pytest.raises(RunEndedError, match=r"cannot be read .*algorithm\.soup\.resume_bank=fresh"):
        resumed(tmp_path)
    assert capsys.readouterr().out.count("\n") == 1


def test_other_prompts_than_those_of_the_bank_end_the_run(tmp_path: Path) -> None:
    left_behind(tmp_path)
    source = source_of(first=3)
    resume(source, tmp_path, 10)
    with pytest.raises(RunEndedError, match=r"is not the one that .* algorithm.soup.resume_bank=fresh"):
        step(source, 11)


# ---------------------------------------------------------------- nothing to go on with


@pytest.mark.parametrize("ruined", [False, True])
def test_fresh_begins_with_an_empty_bank_and_says_so(
    tmp_path: Path, ruined: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    left_behind(tmp_path)
    if ruined:
        (tmp_path / BANK_FILE).write_bytes(b"")
    source = resumed(tmp_path, lag=2, resume_bank="fresh")
    said = capsys.readouterr().out
    assert said.startswith(f"{NOTICE}algorithm.soup.resume_bank=fresh: ")
    assert said.count("\n") == 1
    assert len(source.bank) == 0
    assert ages(goes_on(source)) == [set(), {1}, *[{2}] * 10]
    plans = LookaheadSource(source.settings, source.facts, source._fetch)
    assert source.plan(20, fingerprint("x")) == plans.plan(20, fingerprint("x"))


def test_from_a_run_that_mixed_nothing_anything_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_behind(tmp_path, mixed_share=0.0, n=8)
    for source in (source_of(source="replay"), source_of(lag=2), source_of(n=4)):
        check_bank("", tmp_path, source.facts.origin)
    assert ages(goes_on(resumed(tmp_path, lag=2))) == [set(), {1}, *[{2}] * 10]
    assert capsys.readouterr().out == ""


def test_a_run_that_mixes_nothing_leaves_the_prefixes_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_behind(tmp_path)
    source = resumed(tmp_path, mixed_share=0.0)
    assert "this run mixes nothing, so the prefixes in" in capsys.readouterr().out
    assert not any(any(of_step) for of_step in goes_on(source))
    (tmp_path / BANK_FILE).unlink()  # a checkpoint of plain verl
    resumed(tmp_path, mixed_share=0.0)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- what has changed


def test_only_keys_that_both_know_can_have_changed() -> None:
    assert changes({"gone": 1, "same": [1.5], "number": 1}, {"new": 2, "same": (1.5,), "number": 1.0}) == {}
    assert changes({"a": 1}, {"a": 2}) == {"a": (1, 2)}
    assert changes({SOURCE: NOTHING, "a": 1}, {SOURCE: "replay", "a": 2}) == {}
    for one, other in ((None, "digest 1"), ("digest 1", None)):
        assert changes({TOKENIZER: one}, {TOKENIZER: other}) == {}


def test_prompts_come_again_under_their_fingerprints() -> None:
    """What replay's prefixes are kept under, and what says how long a prompt's responses are."""
    source = source_of(
        source="replay", prefix_length={"distribution": "uniform", "unit": "fraction", "min": 0, "max": 0.5}
    )
    ids = np.arange(10)
    source.keep([FinishedSample(fingerprint("prompt 0"), 0, ids, -np.ones(10), np.full(10, 3), 1.0)] * 4)
    prompt = fingerprint("prompt 0")
    assert source.bank.slots(prompt) == {0, 1}
    assert not source.adapt(1, {LONGEST})
    assert all(len(prefix) <= 5 for prefix in source.bank.take(prompt).values())
