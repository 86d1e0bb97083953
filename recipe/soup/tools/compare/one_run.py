"""One run of a study: its overrides, its folder, and whether it has come to its end."""

from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from recipe.soup.errors import refuse

GRACE = "algorithm.soup.sigterm_grace"


def seed_overrides(seed: int | str) -> list[str]:
    """Return the overrides that set a seed: of the order of the data, and of sampling."""
    return [f"data.seed={seed}", f"actor_rollout_ref.rollout.seed={seed}"]


def quoted(path: Path) -> str:
    """Write a path as a value that Hydra reads back, whatever characters it has."""
    return QuotedString(str(path), Quote.single).with_quotes()


@dataclass(frozen=True)
class Run:
    """One configuration with one seed.

    Attributes:
        name: name of the configuration.
        chosen: overrides on verl's config that say what is run.
        folder: folder for everything that the run writes.
    """

    name: str
    seed: int
    chosen: list[str]
    folder: Path

    @property
    def overrides(self) -> list[str]:
        """All overrides on verl's config."""
        return self._overrides_in(self.folder)

    def _overrides_in(self, folder: Path) -> list[str]:
        where = [f"trainer.validation_data_dir={quoted(folder / 'validation')}", "trainer.resume_mode=auto"]
        where += [f"trainer.default_local_dir={quoted(folder / 'checkpoints')}"]
        where += [f"trainer.rollout_data_dir={quoted(folder / 'samples')}"]
        return [*self.chosen, *where]

    @property
    def grace(self) -> float:
        """Seconds that the run may take to end after SIGTERM, as its overrides say; 0 if they do not.

        Raises:
            SystemExit: it is not written as a number, as `${...}` is not, which only a composed config resolves.
        """
        given = [text.lstrip("+").partition("=") for text in self.chosen]
        values = ["0", *(value for key, _, value in given if key == GRACE)]
        try:
            return float(values[-1])  # as with Hydra, the last one counts
        except ValueError:
            raise refuse(
                GRACE, values[-1], "a study needs it as a number, to know how long a run may take to end."
            ) from None

    @property
    def metrics(self) -> Path:
        """File that verl's file logger writes."""
        return self.folder / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """Folder of verl's dump of validation samples."""
        return self.folder / "validation"

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run, if it was killed, can go on."""
        return (self.folder / "checkpoints" / "latest_checkpointed_iteration.txt").exists()

    @property
    def _mark(self) -> Path:
        return self.folder / "done"

    @property
    def _settings(self) -> str:
        """The overrides without the folder's path, since a study may be moved."""
        return "\n".join(self._overrides_in(Path("FOLDER")))

    @property
    def is_done(self) -> bool:
        """Whether the run has come to its end with these overrides."""
        return self._mark.exists() and self._mark.read_text(encoding="utf-8") == self._settings

    @property
    def was_another(self) -> bool:
        """Whether a run with other overrides has come to its end in this folder."""
        return self._mark.exists() and not self.is_done

    def mark_done(self) -> None:
        """Remember that the run has come to its end, and with which overrides."""
        self._mark.write_text(self._settings, encoding="utf-8")

    def elsewhere(self, out: Path) -> "Run":
        """Return the same run in another folder of studies."""
        return replace(self, folder=(out / self.name / f"seed_{self.seed}").absolute())
