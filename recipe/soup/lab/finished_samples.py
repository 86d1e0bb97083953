"""The samples of a step in the form in which a source of prefixes keeps them."""

from collections.abc import Sequence

import numpy as np
import torch

from recipe.soup.lab.rollout import Group
from recipe.soup.prefixes.finished import FinishedSample, fingerprint


def finished_samples(
    groups: Sequence[Group],
    behavior: torch.Tensor | None,
    entropy: torch.Tensor | None,
    distributions: Sequence[np.ndarray] | None,
) -> list[FinishedSample]:
    """Bring together what is known of each sample.

    Args:
        behavior: shape (samples, response_length), the behaviour log-probs if they are not the sampler's own.
        entropy: shape (samples, response_length), nats, before the update; None if it was not computed.
        distributions: of each sample as `FinishedSample` has them; None: not asked for.
    """
    samples = [(group.asked, sample) for group in groups for sample in group.samples]
    finished = []
    for row, (asked, sample) in enumerate(samples):
        length = len(sample.response_ids)
        finished.append(
            FinishedSample(
                fingerprint(asked.problem.messages),
                asked.ordinal,
                np.array(sample.response_ids),
                np.array(sample.log_probs) if behavior is None else behavior[row, :length].numpy(),
                np.array(sample.versions),
                sample.reward,
                None if entropy is None else entropy[row, :length].numpy(),
                np.array(sample.prompt_ids),
                None if distributions is None else distributions[row],
            )
        )
    return finished
