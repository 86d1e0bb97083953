"""Which source a run gets, and the one that a run without mixing gets."""

from typing import Any

import pytest

from recipe.soup.prefixes.lookahead import LookaheadSource
from recipe.soup.prefixes.make_source import NoPrefixes, make_source
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.replay import ReplaySource
from recipe.soup.prefixes.requests import PromptRequests
from recipe.soup.prefixes.source import PrefixSource
from recipe.soup.settings import PrefixLengthSettings, SoupSettings


def made(**settings: Any) -> PrefixSource:
    fetched = iter(range(0, 100, 2))

    def fetch() -> tuple[None, list[str], int]:
        first = next(fetched)
        return None, [f"prompt {first}", f"prompt {first + 1}"], first

    length = PrefixLengthSettings(min=1, max=2)
    return make_source(
        SoupSettings(prefix_length=length, **settings), RunFacts(4, 24, 0, 2, 10), fetch, None, "base", None
    )


@pytest.mark.parametrize(("source", "kind"), [("lookahead", LookaheadSource), ("replay", ReplaySource)])
def test_the_settings_name_it(source: str, kind: type) -> None:
    assert type(made(source=source)) is kind
    assert type(made(source=source, mixed_share=0.0)) is NoPrefixes


def test_without_mixing_prompts_come_in_order_and_nothing_is_requested() -> None:
    source = made(mixed_share=0.0)
    for step in (1, 2, 3):
        chunk, prefixes = source.take(step)
        assert chunk.messages == [f"prompt {2 * step - 2}", f"prompt {2 * step - 1}"]
        assert prefixes == [{}, {}]
        rows = [PromptRequests(), PromptRequests()]
        source.order(step, rows)
        assert rows == [PromptRequests(), PromptRequests()]
    assert not any(source.metrics().values())
