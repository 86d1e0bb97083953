"""One update in plain torch: the functions that verl's training worker and our trainer call, on one model."""

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import Metric

from recipe.soup.algorithm.baselines import compare
from recipe.soup.algorithm.batch import TrainRows
from recipe.soup.algorithm.loss_metrics import PREFIX, means_of_loss_sums
from recipe.soup.algorithm.update import loss_fields, ratio_fields
from recipe.soup.lab.forward import Forward, Sample, forward, of_responses
from recipe.soup.settings import SoupSettings
from recipe.soup.verl_adapter.registrations import group_estimate, soup_loss, update_choices, weigh_decoupled
from recipe.soup.verl_adapter.transfer_queue import train_rows


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of any lengths, as verl's fields have them."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@torch.no_grad()
def rows_before_update(
    model: Any,
    samples: list[Sample],
    temperature: float,
    current_version: int,
    updater: "Updater | None" = None,
    bypass: bool = False,
) -> TrainRows:
    """Put a batch together under the model that is about to be updated.

    Args:
        updater: computes in its own way, and in its own micro-batches; None: plainly, all at once.
        bypass: nothing is computed; old log-probs are those of the sampler, and no entropies are known.
    """
    behavior = [torch.tensor(sample.log_probs) for sample in samples]
    if bypass:
        known = {"old_log_probs": nested(behavior)}
    else:
        parts = forward(model, samples, temperature) if updater is None else updater.forward_all(samples)
        names = ("old_log_probs", "entropy")
        known = {name: nested(of_responses(part, samples)) for name, part in zip(names, parts, strict=True)}
    responses = [torch.tensor(sample.response_ids) for sample in samples]
    data = {
        "responses": nested(responses),
        "response_mask": nested([torch.ones_like(response) for response in responses]),
        "policy_versions": nested([torch.tensor(sample.versions) for sample in samples]),
        "rollout_log_probs": nested(behavior),
        **known,
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
    if correction.rollout_is is not None and not correction.bypass_mode:
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
        forward: how log-probs are computed.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        config: DictConfig,
        settings: SoupSettings,
        forward: Forward = forward,
    ) -> None:
        self._model, self._optimizer, self._settings, self._forward = model, optimizer, settings, forward
        self._actor: Any = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        self._with_entropy = self._actor.entropy_coeff != 0 or self._actor.calculate_entropy
        self._temperature = config.actor_rollout_ref.rollout.temperature
        self._mini_batch = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n

    def micro_batches(self, samples: list[Sample], rows: slice) -> Iterator[slice]:
        """Cut a mini-batch into neighbours that fit verl's limit: of tokens (`use_dynamic_bsz`), or of samples."""
        start = stop = rows.start
        tokens, by_tokens = 0, self._actor.use_dynamic_bsz
        limit = self._actor.ppo_max_token_len_per_gpu if by_tokens else self._actor.ppo_micro_batch_size_per_gpu
        for sample in samples[rows]:
            size = len(sample.prompt_ids) + len(sample.response_ids) if by_tokens else 1
            if tokens and tokens + size > limit:
                yield slice(start, stop)
                start, tokens = stop, 0
            stop, tokens = stop + 1, tokens + size
        yield slice(start, stop)

    @torch.no_grad()
    def forward_all(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the whole batch, without a gradient; see `forward`."""
        parts = [
            self._forward(self._model, samples[rows], self._temperature)
            for rows in self.micro_batches(samples, slice(0, len(samples)))
        ]
        log_probs, entropies = zip(*parts, strict=True)
        return torch.cat(log_probs), torch.cat(entropies)

    def loss(
        self, samples: list[Sample], fields: dict[str, torch.Tensor], rows: slice, mini_batch: slice | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """verl's actor loss on some rows of the batch.

        Args:
            mini_batch: of which `rows` are a part; the losses of all its parts add up to its own. None: they are all.
        """
        mini_batch = mini_batch or rows
        chosen = samples[rows]
        lengths = [len(sample.response_ids) for sample in chosen]

        log_probs, entropy = self._forward(self._model, chosen, self._temperature, self._with_entropy)
        whole = [len(sample.prompt_ids) + len(sample.response_ids) for sample in chosen]
        output = {"log_probs": nested(list(log_probs.split(whole)))}
        if self._with_entropy:
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
        tokens = int(fields["loss_mask"][mini_batch].sum())
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(samples[mini_batch]))
        return soup_loss(self._actor, output, data, settings=self._settings)

    def update(self, samples: list[Sample], fields: dict[str, torch.Tensor]) -> dict[str, float]:
        """Train on the batch; returns metrics under verl's names."""
        collected: dict[str, list[float]] = {}
        for _ in range(self._actor.ppo_epochs):
            for start in range(0, len(samples), self._mini_batch):
                mini_batch = slice(start, start + self._mini_batch)
                metrics: dict[str, Any] = {}
                self._optimizer.zero_grad()
                for rows in self.micro_batches(samples, mini_batch):
                    loss, told = self.loss(samples, fields, rows, mini_batch)
                    loss.backward()
                    for key, metric in told.items():
                        metrics.setdefault(key, metric.init_list()).extend(metric)
                norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._actor.optim.clip_grad)
                if torch.isfinite(norm):
                    self._optimizer.step()
                metrics["actor/grad_norm"] = Metric("mean", norm.item())
                for key, metric in metrics.items():
                    collected.setdefault(key, []).append(float(metric.aggregate()))
        means = {key: sum(values) / len(values) for key, values in collected.items()}
        sums = {key: means.pop(key) for key in list(means) if key.startswith(PREFIX)}
        return {**means, **(means_of_loss_sums(sums) if sums else {})}
