"""Merge LoRA adapters into their base model, with plain torch and PEFT: what `verify` compares with."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from verl_ext.historical_policy.snapshots import ADAPTER_FILES, TRAINED_ADAPTERS

ADAPTER = ADAPTER_FILES[0]
"""PEFT writes it into the folder of an adapter."""
WRAPPED = "base_model.model."


def has_adapters(folder: Path) -> bool:
    """Whether these weights, `huggingface` in a checkpoint of verl, are a base model with adapters beside it."""
    return (folder.parent / TRAINED_ADAPTERS).exists()


def merged_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read such weights, and merge: W + (alpha / r) B A for each matrix that has an adapter, else W (LoRA, eq. 3).

    verl saves a module as PEFT wraps it, in names that transformers does not know: it would leave those weights as
    they were initialised, with no more than a warning. Biases are not trained; DoRA has further tensors.

    Raises:
        ValueError: there is a tensor of another kind of adapter.
    """
    meta = json.loads((folder.parent / TRAINED_ADAPTERS).read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    weights, down = {}, ".lora_A.default.weight"
    for name, tensor in tensors.items():
        plain = name.removeprefix(WRAPPED).replace(".base_layer.", ".")
        if ".lora_" not in plain:
            weights[plain] = tensor.float()
        elif not plain.endswith((down, ".lora_B.default.weight")):
            raise ValueError(f"{name} is no plain LoRA matrix")
    for name, tensor in tensors.items():
        if name.endswith(down):
            up = tensors[name.replace("lora_A", "lora_B")].float()
            target = name.removeprefix(WRAPPED).replace(down, ".weight")
            weights[target] = weights[target] + up @ tensor.float() * (meta["lora_alpha"] / meta["r"])
    return weights


def merged(folder: Path) -> PreTrainedModel:
    """Load such weights as one plain model, in float32 on the CPU.

    Raises:
        ValueError: they are not all of the model's, or there are others.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    weights = merged_weights(folder)
    missing, unknown = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)  # saved under one of their names
    if wrong := [*(set(missing) - tied), *unknown]:
        raise ValueError(f"its weights are not those of its config: {wrong[0]}")
    model.tie_weights()
    return model


def with_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge a folder of PEFT's into its base model, which is changed."""
    return PeftModel.from_pretrained(base, folder).merge_and_unload()  # pyright: ignore[reportCallIssue]
