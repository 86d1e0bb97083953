"""One update in plain torch: the functions that verl's training worker and our trainer call, on one model."""

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits_v2

from recipe.soup.algorithm.baselines import compare
from recipe.soup.algorithm.batch import TrainRows
from recipe.soup.algorithm.loss_metrics import PREFIX, means_of_loss_sums
from recipe.soup.algorithm.update import loss_fields, ratio_fields
from recipe.soup.settings import SoupSettings
from recipe.soup.verl_adapter.registrations import group_estimate, soup_loss, update_choices, weigh_decoupled
from recipe.soup.verl_adapter.transfer_queue import train_rows


@dataclass(frozen=True)
class Sample:
    """One response; per-token lists are as long as `response_ids`."""

    prompt_ids: list[int]
    response_ids: list[int]
    versions: list[int]
    log_probs: list[float]
    reward: float
    uid: int


def forward(model: Any, samples: list[Sample], temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs and entropy (nats) of what follows each token.

    Returns:
        log-probs and entropies, both (tokens,), over all tokens of prompts and responses one after another, 0 at each
        sample's last token; and the mask (batch, width) that tells which places of a padded batch they are.
    """
    sequences = [torch.tensor(sample.prompt_ids + sample.response_ids) for sample in samples]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits.float() / temperature
    # Not `logprobs_from_logits`, which wants a GPU wherever flash-attn is installed.
    log_probs = logprobs_from_logits_v2(logits, torch.cat([ids[:, 1:], ids[:, :1]], dim=1))
    places = mask.bool()
    inner = torch.cat([places[:, 1:], torch.zeros_like(places[:, :1])], dim=1)
    return (log_probs * inner)[places], (entropy_from_logits(logits) * inner)[places], places


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of any lengths, as verl's fields have them."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def of_responses(values: torch.Tensor, samples: list[Sample]) -> list[torch.Tensor]:
    """Cut what `forward` returns into what belongs to each sample's response."""
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in samples]
    return [row[len(s.prompt_ids) - 1 : -1] for row, s in zip(values.split(lengths), samples, strict=True)]


@torch.no_grad()
def rows_before_update(model: Any, samples: list[Sample], temperature: float, current_version: int) -> TrainRows:
    """Put a batch together under the model that is about to be updated."""
    log_probs, entropy, _ = forward(model, samples, temperature)
    responses = [torch.tensor(sample.response_ids) for sample in samples]
    data = {
        "responses": nested(responses),
        "response_mask": nested([torch.ones_like(response) for response in responses]),
        "policy_versions": nested([torch.tensor(sample.versions) for sample in samples]),
        "rollout_log_probs": nested([torch.tensor(sample.log_probs) for sample in samples]),
        "old_log_probs": nested(of_responses(log_probs, samples)),
        "entropy": nested(of_responses(entropy, samples)),
        "rm_scores": nested([torch.tensor([sample.reward]) for sample in samples]),
        "uid": [sample.uid for sample in samples],
    }
    return train_rows(data, current_version)


def fields_of_loss(
    rows: TrainRows, settings: SoupSettings, config: DictConfig
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Compute what enters the loss: first what verl would do, then what SOUP changes.

    Returns:
        the fields, each (batch, response_length); and which prefix tokens have a gradient, bool of the same shape.
    """
    choices, estimate = update_choices(settings), group_estimate(config.algorithm)
    mask = rows.response_mask.long()
    advantages = compare(rows, "group", estimate)
    fields = ratio_fields(rows, choices) | {"advantages": advantages, "response_mask": mask, "loss_mask": mask}
    weigh_decoupled(config, settings)
    correction = config.algorithm.rollout_correction
    if correction.rollout_is is not None:
        fields["rollout_is_weights"] = compute_rollout_correction_weights(
            fields["old_log_probs"] - rows.behavior_log_probs,
            rows.response_mask,
            correction.rollout_is,
            correction.rollout_is_threshold,
            correction.rollout_is_batch_normalize,
        )[0]
    changed, trained = loss_fields(rows, fields, choices, estimate)
    return fields | changed, trained


class Updater:
    """Mini-batches, epochs, gradient clipping and AdamW as verl's actor has them.

    Args:
        model: changed in place.
        optimizer: of its parameters.
        config: verl's whole config.
        settings: `algorithm.soup`.
    """

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, config: DictConfig, settings: SoupSettings
    ) -> None:
        self._model, self._optimizer, self._settings = model, optimizer, settings
        self._actor: Any = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        self._temperature = config.actor_rollout_ref.rollout.temperature
        self._mini_batch = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n

    def loss(
        self, samples: list[Sample], fields: dict[str, torch.Tensor], rows: slice
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """verl's actor loss on some rows of the batch, as one mini-batch."""
        chosen = samples[rows]
        lengths = [len(sample.response_ids) for sample in chosen]

        log_probs, entropy, _ = forward(self._model, chosen, self._temperature)
        whole = [len(sample.prompt_ids) + len(sample.response_ids) for sample in chosen]
        output = {"log_probs": nested(list(log_probs.split(whole)))}
        if self._actor.entropy_coeff != 0 or self._actor.calculate_entropy:
            output["entropy"] = nested(list(entropy.split(whole)))
        data = TensorDict(
            {
                "prompts": nested([torch.tensor(sample.prompt_ids) for sample in chosen]),
                "responses": nested([torch.tensor(sample.response_ids) for sample in chosen]),
                **{
                    name: nested([row[:length] for row, length in zip(values[rows], lengths, strict=True)])
                    for name, values in fields.items()
                },
            },
            batch_size=len(chosen),
        )
        tokens = int(fields["loss_mask"][rows].sum())
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(chosen))
        return soup_loss(self._actor, output, data, settings=self._settings)

    def update(self, samples: list[Sample], fields: dict[str, torch.Tensor]) -> dict[str, float]:
        """Train on the batch; returns metrics under verl's names."""
        collected: dict[str, list[float]] = {}
        for _ in range(self._actor.ppo_epochs):
            for start in range(0, len(samples), self._mini_batch):
                loss, metrics = self.loss(samples, fields, slice(start, start + self._mini_batch))
                self._optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._actor.optim.clip_grad)
                if torch.isfinite(norm):
                    self._optimizer.step()
                metrics["actor/grad_norm"] = norm.item()
                for key, metric in metrics.items():
                    value = metric.aggregate() if hasattr(metric, "aggregate") else metric
                    collected.setdefault(key, []).append(float(value))
        means = {key: sum(values) / len(values) for key, values in collected.items()}
        sums = {key: means.pop(key) for key in list(means) if key.startswith(PREFIX)}
        return {**means, **(means_of_loss_sums(sums) if sums else {})}
