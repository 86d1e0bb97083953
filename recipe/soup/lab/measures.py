"""What the lab tells of a batch before the update, under the names of the real path."""

from recipe.soup.algorithm.batch import TrainRows
from recipe.soup.algorithm.batch_metrics import NEEDS_FORWARD, drift_metrics, lag_metrics, train_metrics


def measured(batch: TrainRows, by_trainer: bool, mixes_lags: bool, bypasses: bool) -> dict[str, float]:
    """Metrics of the batch.

    Args:
        by_trainer: whether behaviour log-probs are the trainer's, so that drift has no rounding in it.
        mixes_lags: whether prefixes of several ages come together.
        bypasses: verl's `bypass_mode`: no forward pass of the trainer, nothing to compare.
    """
    metrics = train_metrics(batch) | drift_metrics(batch, by_trainer)
    if mixes_lags:
        metrics |= lag_metrics(batch)
    metrics["actor/entropy"] = float(batch.entropy[batch.response_mask].mean())
    if bypasses:
        return {key: value for key, value in metrics.items() if not NEEDS_FORWARD.search(key)}
    return metrics
