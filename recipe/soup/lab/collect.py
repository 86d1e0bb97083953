"""A step's groups: prompts with their prefixes from the source, rolled out, and refilled where groups are filtered."""

from omegaconf import DictConfig

from recipe.soup.lab.filter_groups import Filtered, filled, filters
from recipe.soup.lab.rollout import Asked, Group, Rollout
from recipe.soup.prefixes.requests import PromptRequests, SampledPrefix
from recipe.soup.prefixes.source import PrefixSource
from recipe.soup.verl_adapter.missing_samples import MissingSamples


def next_prompts(source: PrefixSource, step: int, count: int) -> list[Asked]:
    """Take the prompts that come next, each with its prefixes."""
    asked: list[Asked] = []
    while len(asked) < count:
        chunk, prefixes = source.take(step)
        ordinals = range(chunk.first_ordinal, chunk.first_ordinal + chunk.size)
        for problem, ordinal, slots in zip(chunk.batch, ordinals, prefixes, strict=True):
            asked.append(Asked(problem, ordinal, PromptRequests(prefixes=slots)))
    return asked


def collect(
    step: int, config: DictConfig, source: PrefixSource, rollout: Rollout, missing: MissingSamples
) -> tuple[Filtered, list[SampledPrefix]]:
    """Roll out a step's groups, with refills if it filters, and what they bring for later steps.

    Args:
        config: verl's whole config.
        missing: counts the samples that are lost.
    """
    batch = next_prompts(source, step, config.data.train_batch_size)
    source.order(step, [asked.requests for asked in batch])
    groups, seeds = rollout.groups(batch, step - 1, missing)
    if not filters(config):
        return Filtered(groups), seeds

    def refill(count: int) -> list[Group]:
        more, brought = rollout.groups(next_prompts(source, step, count), step - 1, missing)
        seeds.extend(brought)
        return more

    return filled(groups, config, refill), seeds
