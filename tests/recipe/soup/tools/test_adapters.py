"""Checkpoints of a run that trains adapters, as verl writes them, against PEFT's own merging."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from recipe.soup.tools.adapters import WRAPPED, merged
from recipe.soup.tools.verify import load
from verl_ext.historical_policy.snapshots import TRAINED_ADAPTERS, checkpoint_files


def tiny(tied: bool) -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def checkpoint(folder: Path, tied: bool = False) -> tuple[Path, Path, Path, dict[str, torch.Tensor]]:
    """The base model, PEFT's folder, verl's folder of one model with adapters, and what PEFT makes of it."""
    torch.manual_seed(0)
    base, adapter, actor = folder / "base", folder / "adapter", folder / "actor"
    model = tiny(tied)
    model.save_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    peft.save_pretrained(str(adapter))
    actor.mkdir()
    (actor / TRAINED_ADAPTERS).write_text(json.dumps({"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}))
    model.config.save_pretrained(actor / "huggingface")
    save_file(
        {name: tensor.clone() for name, tensor in peft.state_dict().items()},
        actor / "huggingface" / "model.safetensors",
    )
    plain = peft.merge_and_unload()  # pyright: ignore[reportCallIssue]
    return base, adapter, actor / "huggingface", {name: tensor.clone() for name, tensor in plain.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_verl_is_merged_as_peft_does(tied: bool, tmp_path: Path) -> None:
    base, adapter, folder, expected = checkpoint(tmp_path, tied)
    before = load_file(base / "model.safetensors")
    for model in (load(folder, "cpu", str(base)), load(adapter, "cpu", str(base))):
        found = model.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-6), name
        moved = [name for name in before if not torch.allclose(found[name], before[name], atol=1e-3)]
        assert len(moved) == 2 * 7  # every linear layer but the head


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight", "norm.weight"])
def test_what_is_no_plain_lora_or_not_there_is_refused(name: str, tmp_path: Path) -> None:
    base, _, folder, _ = checkpoint(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(f"{WRAPPED}model.{name}", None)
    if "lora_" in name:
        tensors[f"{WRAPPED}model.{name}"] = torch.zeros(16)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        merged(folder)
    with pytest.raises(SystemExit, match="cannot be loaded by transformers"):
        load(folder, "cpu", str(base))


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_such_a_checkpoint_is_no_snapshot_of_whole_weights(place: str, tmp_path: Path) -> None:
    """vLLM knows none of its names; whichever of the checkpoint's folders is given."""
    _, _, folder, _ = checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds LoRA adapters beside a base model"):
        checkpoint_files(str((folder / place).resolve()))
