"""The metrics of a step of verl's, which may make several updates (`parameter_sync_step`)."""

from transfer_queue import KVBatchMeta

from recipe.soup.algorithm.loss_metrics import means_of_loss_sums
from recipe.soup.algorithm.several_updates import joined, mean_sums, merged
from recipe.soup.verl_adapter.update_stage import UpdateStage


class StepStage(UpdateStage):
    """Merges what a step's updates tell; verl would merge ours by words in their names."""

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        self.collected.told.append({key: float(metrics.pop(key)) for key in list(metrics) if key.startswith("soup/")})
        return batch

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        batch = super().step(metrics, timing_raw)
        told, rows, sums = self.collected.told, self.collected.all_rows, self.collected.loss_sums
        metrics.update(merged(told))
        if len(told) > 1:
            metrics.update(self._measured(joined(rows)))
            metrics.update(means_of_loss_sums(mean_sums(sums)) if sums else {})
        for collected in (told, rows, sums):
            collected.clear()
        return batch
