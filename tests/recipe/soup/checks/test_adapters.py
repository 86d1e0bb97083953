"""What `placement=shared` cannot honour is refused by key, value and what to do; what it can is accepted beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from refusals import sentence

from recipe.soup.checks.config import check_config
from recipe.soup.lab.refusals import check_lab_config
from verl_ext.historical_policy.snapshots import ADAPTER_FILES

Compose = Callable[..., DictConfig]
MODEL, SNAPSHOT = "actor_rollout_ref.model", "algorithm.soup.snapshot"
LORA = (f"{MODEL}.lora_rank=8", f"{MODEL}.target_modules=all-linear")
SHARED = ("algorithm=soup", "hardware=cpu", "example=countdown", "algorithm.soup.source=snapshot")
SHARED += (f"{SNAPSHOT}.placement=shared", *LORA)


@pytest.mark.parametrize("policy", ["lagged", "pool", "base"])
def test_unmerged_lora_is_accepted(policy: str, composed: Compose) -> None:
    check_config(composed(*SHARED, f"{SNAPSHOT}.policy={policy}"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{MODEL}.lora_rank=0"], [f"{MODEL}.lora_rank=0: ", "train some"]),
        ([f"{MODEL}.lora.merge=True"], [f"{MODEL}.lora.merge=True: ", "set it to False, or use colocated"]),
        ([f"{MODEL}.lora_adapter_path=other"], [f"{MODEL}.lora_adapter_path=other: ", "merge the adapter"]),
        ([f"{MODEL}.lora.type=dora"], [f"{MODEL}.lora.type=dora: ", "set it to lora"]),
        ([f"+{MODEL}.target_parameters=[a]"], [f"{MODEL}.target_parameters=['a']: ", "leave it null"]),
        (
            ["trainer.v1.trainer_mode=soup_colocate_async"],
            ["trainer.v1.trainer_mode=soup_colocate_async: ", "use soup"],
        ),
        ([f"{SNAPSHOT}.n_gpus=1"], [f"{SNAPSHOT}.n_gpus=1: ", "no second engine"]),
        ([f"{SNAPSHOT}.max_num_seqs=8"], [f"{SNAPSHOT}.max_num_seqs=8: ", "no second engine"]),
        ([f"{SNAPSHOT}.gpu_memory_utilization=0.3"], [f"{SNAPSHOT}.gpu_memory_utilization=0.3: ", "no second engine"]),
        (["algorithm.soup.samples_per_prefix=2"], ["algorithm.soup.samples_per_prefix=2: ", "a prefix of its own"]),
        ([f"{SNAPSHOT}.keep=2", "algorithm.soup.lag=8", f"{SNAPSHOT}.every=4"], [f"{SNAPSHOT}.keep=2: ", "keep 3 or"]),
        ([f"{SNAPSHOT}.policy=best"], ["trainer.test_freq=-1: ", "needs validations"]),
    ],
)
def test_what_cannot_be_shared_is_refused(composed: Compose, overrides: list[str], words: list[str]) -> None:
    config = composed(*SHARED, "trainer.test_freq=-1", *overrides)
    text = sentence(check_config, config)
    assert all(word in text for word in words), text


def test_an_engine_of_its_own_needs_one_snapshot_less(composed: Compose) -> None:
    """It is asked a step ahead, before the current version takes a place."""
    keep = [f"{SNAPSHOT}.keep=3", "algorithm.soup.lag=9", f"{SNAPSHOT}.every=4"]
    assert f"{SNAPSHOT}.keep=3" in sentence(check_config, composed(*SHARED, *keep))
    check_config(composed(*SHARED, *keep, f"{SNAPSHOT}.placement=colocated", f"{MODEL}.lora.merge=True"))


def test_the_lab_has_no_adapters(composed: Compose) -> None:
    config = composed(*SHARED, f"{MODEL}.lora_rank=0")
    assert f"{SNAPSHOT}.placement=shared" in sentence(check_lab_config, config)


# ---------------------------------------------------------------- another run's adapter


def adapter(folder: Path, **changed: Any) -> str:
    settings = {"peft_type": "LORA", "r": 8, "use_dora": False, "modules_to_save": None, **changed}
    (folder / ADAPTER_FILES[0]).write_text(json.dumps(settings))
    (folder / ADAPTER_FILES[1]).touch()
    return f"{SNAPSHOT}.policy={folder}"


def test_a_plain_adapter_of_the_same_base_model_is_accepted(
    composed: Compose, tmp_path: Path, countdown_dir: Path
) -> None:
    check_config(composed(*SHARED, adapter(tmp_path)))
    check_config(composed(*SHARED, adapter(tmp_path, base_model_name_or_path=str(countdown_dir / "base_model"))))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"r": 16}, "its rank is 16"),
        ({"use_dora": True}, "its use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, r"its modules_to_save is \['lm_head'\]"),
        ({"peft_type": "IA3"}, "its peft_type is IA3"),
        ({"base_model_name_or_path": "owner/model"}, "belongs to the base model owner/model"),
    ],
)
def test_another_adapter_is_refused(composed: Compose, tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    config = composed(*SHARED, adapter(tmp_path, **changed))
    with pytest.raises(SystemExit, match=words):
        check_config(config)


def test_a_folder_that_lacks_a_file_is_refused_by_its_name(composed: Compose, tmp_path: Path) -> None:
    override = adapter(tmp_path)
    (tmp_path / ADAPTER_FILES[1]).unlink()
    assert f"{tmp_path / ADAPTER_FILES[1]} is missing" in sentence(check_config, composed(*SHARED, override))
    (tmp_path / ADAPTER_FILES[1]).touch()
    (tmp_path / ADAPTER_FILES[0]).write_text("{")
    assert "is no JSON" in sentence(check_config, composed(*SHARED, override))
