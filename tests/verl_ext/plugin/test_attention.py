"""Attention without flash-attn: chosen by itself, said, and refused where the user asked for what is not there."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import DictConfig

from verl_ext.plugin.attention import why_no_flash_attn
from verl_ext.plugin.callbacks import ATTENTION, CheckAttention

Compose = Callable[..., DictConfig]
PACK = "actor_rollout_ref.model.use_remove_padding"
both_twins = pytest.mark.parametrize("algorithm", ["soup", "grpo"])


@pytest.fixture(params=[False, True], ids=["without flash-attn", "with flash-attn"])
def flash_attn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether `import flash_attn` works; None in `sys.modules` makes it fail."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn") if request.param else None)
    why_no_flash_attn.cache_clear()
    yield request.param
    why_no_flash_attn.cache_clear()


without = pytest.mark.parametrize("flash_attn", [False], indirect=True)


@both_twins
def test_verls_model_config_gets_what_this_machine_has(
    algorithm: str, flash_attn: bool, composed: Compose, countdown_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    config = composed(f"algorithm={algorithm}", f"actor_rollout_ref.model.path={countdown_dir}/base_model")
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    assert model.hf_config._attn_implementation == ("flash_attention_2" if flash_attn else "sdpa")
    assert model.use_remove_padding is flash_attn
    assert config.actor_rollout_ref.actor.use_remove_padding is flash_attn
    CheckAttention().on_job_start(config)
    said = capsys.readouterr().out
    assert said.count("\n") == (0 if flash_attn else 1)
    assert flash_attn or "by sdpa, with padding" in said


@pytest.mark.parametrize("added", ["", "++"])
def test_what_the_user_chose_wins(added: str, flash_attn: bool, composed: Compose) -> None:
    model = composed("algorithm=soup", f"{added}{ATTENTION}=eager", f"{PACK}=true").actor_rollout_ref.model
    assert (model.override_config.attn_implementation, model.use_remove_padding) == ("eager", True)
    # Packing follows the attention that was chosen.
    assert composed("algorithm=soup", f"{added}{ATTENTION}=sdpa").actor_rollout_ref.model.use_remove_padding is False


@without
def test_a_flash_attn_that_is_not_there_is_refused(flash_attn: bool, composed: Compose) -> None:
    with pytest.raises(SystemExit, match=r"attn_implementation=flash_attention_2: .*requirements-flash-attn\.txt"):
        CheckAttention().on_job_start(composed("algorithm=soup", f"{ATTENTION}=flash_attention_2"))


@without
@pytest.mark.parametrize("overrides", [[f"{ATTENTION}=sdpa"], ["hardware=cpu"], ["model_engine=megatron"]])
def test_nothing_is_said_where_something_was_chosen(
    overrides: list[str], flash_attn: bool, composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    CheckAttention().on_job_start(composed("algorithm=soup", *overrides))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flash_attn", [True], indirect=True)
def test_one_that_was_built_for_another_torch_counts_as_missing(
    flash_attn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    assert why_no_flash_attn() is None
    why_no_flash_attn.cache_clear()
    monkeypatch.setattr("verl_ext.plugin.attention.importlib.import_module", broken)
    assert why_no_flash_attn() == "undefined symbol: _ZN3c10"
