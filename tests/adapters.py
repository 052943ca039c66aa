"""Tiny LoRA adapters over the decoders of `decoders.py`, in peft's layout, built without torch.

What peft gives for them lies in `fixtures/folders/expected.npz` (see `folders.expected`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decoders
import numpy as np

Fields = dict[str, Any]


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: its decoder, whose names it carries ("causal", "base" or "classifier"), adapter_config.json."""

    variant: str
    names: str
    config: Fields


Q_AND_V: Fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "plain": Adapter("llama", "causal", Q_AND_V),
    "bare_rslora": Adapter("llama", "base", Q_AND_V | {"use_rslora": True, "target_modules": "all-linear"}),
    "patterns": Adapter(
        "qwen3",
        "base",
        {"r": 4, "lora_alpha": 8, "target_modules": r".*\.(q_proj|k_proj|down_proj)"}
        | {"rank_pattern": {"layers.1.mlp.down_proj": 6, "k_proj": 2}}
        | {"alpha_pattern": {"k_proj": 16, "^layers\\.0\\.self_attn\\.q_proj": 3}},
    ),
    "fan_in_fan_out": Adapter(
        "gpt2",
        "causal",
        {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
    ),
    "modules_to_save": Adapter("llama", "causal", Q_AND_V | {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "embeddings": Adapter(
        "llama", "causal", Q_AND_V | {"target_modules": ["embed_tokens", "o_proj", "lm_head"]}
    ),
    "all_biases": Adapter("qwen2", "base", Q_AND_V | {"bias": "all"}),
    "lora_biases": Adapter("qwen2", "base", Q_AND_V | {"bias": "lora_only"}),
    "lora_bias": Adapter("llama_biases", "base", Q_AND_V | {"lora_bias": True}),
    "chain_first": Adapter("mistral_bidirectional", "base", Q_AND_V),
    "chain_second": Adapter(
        "mistral_bidirectional", "base", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    ),
    "e5_lora": Adapter("mistral", "base", Q_AND_V),
    "rankllama": Adapter(
        "llama", "classifier", Q_AND_V | {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    ),
}
_PEFT_DEFAULTS: Fields = {
    "peft_type": "LORA",
    "task_type": None,
    "revision": None,
    "inference_mode": True,
    "lora_dropout": 0.05,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "init_lora_weights": True,
}
_TASKS = {"causal": "CAUSAL_LM", "base": "FEATURE_EXTRACTION", "classifier": "SEQ_CLS"}


def write_adapter(name: str, folder: str | Path, base: str | Path = "some/base") -> Path:
    """Writes one of `ADAPTERS` (adapter_config.json, adapter_model.safetensors) over a base folder or name."""
    adapter, folder = ADAPTERS[name], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _PEFT_DEFAULTS | {"task_type": _TASKS[adapter.names]} | adapter.config
    if config["target_modules"] == "all-linear":  # peft lists what that means when it saves
        config["target_modules"] = sorted({module.rpartition(".")[2] for module in matrices(name)})
    text = json.dumps(config | {"base_model_name_or_path": str(base)}, indent=2)
    (folder / "adapter_config.json").write_text(text, "utf-8")
    decoders.write_arrays(adapter_tensors(name, config), folder / "adapter_model.safetensors")
    return folder


def matrices(name: str) -> dict[str, tuple[int, ...]]:
    """Modules with a matrix in the model that an adapter wraps, without head and embeddings, and their shapes."""
    wrapped = wrapped_tensors(name)
    found = {
        k.removesuffix(".weight"): v.shape
        for k, v in wrapped.items()
        if k.endswith(".weight") and v.ndim == 2
    }
    return {k: v for k, v in found.items() if not re.search(r"lm_head|embed_tokens|wte|wpe", k)}


def wrapped_tensors(name: str) -> dict[str, np.ndarray]:
    adapter = ADAPTERS[name]
    arrays = decoders.tensors(adapter.variant)
    if adapter.names != "causal":
        arrays = {k: v for k, v in arrays.items() if not k.startswith("lm_head.")}
    if adapter.names == "base":
        arrays = {k.removeprefix("model.").removeprefix("transformer."): v for k, v in arrays.items()}
    return arrays


def adapter_tensors(name: str, config: Fields) -> dict[str, np.ndarray]:
    """The adapter's tensors under peft's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    wrapped = wrapped_tensors(name)
    targets, saved = config["target_modules"], config["modules_to_save"] or ()
    for key, value in wrapped.items():
        module, _, kind = key.rpartition(".")
        last = module.rpartition(".")[2]
        hit = re.fullmatch(targets, module) if isinstance(targets, str) else last in targets
        if kind == "weight" and hit:
            rank = _of_pattern(config["rank_pattern"], module, config["r"])
            inside, outside = value.shape if config["fan_in_fan_out"] else value.shape[::-1]
            if "embed_tokens" in module:
                rows, columns = value.shape
                shapes |= {
                    f"{module}.lora_embedding_A": (rank, rows),
                    f"{module}.lora_embedding_B": (columns, rank),
                }
                continue
            shapes |= {f"{module}.lora_A.weight": (rank, inside), f"{module}.lora_B.weight": (outside, rank)}
            if config["lora_bias"]:
                shapes[f"{module}.lora_B.bias"] = (outside,)
        if kind == "weight" and last in saved:
            shapes[key] = value.shape
        if kind == "bias" and (config["bias"] == "all" or (config["bias"] == "lora_only" and hit)):
            # What peft calls the layer that it wraps; it passes over a bias of the layer's own name.
            shapes[f"{module}.base_layer.bias" if hit else key] = value.shape
    if "score" in saved:
        shapes["score.weight"] = (1, decoders.config(ADAPTERS[name].variant)["hidden_size"])
    return {f"base_model.model.{k}": decoders.random_tensor(name, k, shape) for k, shape in shapes.items()}


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module, by peft's rule."""
    matching = (value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(matching, default)
