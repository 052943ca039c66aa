"""Exporting decoders as checkpoints that transformers loads, and counting their parameters."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sgpt_jax.checkpoint.adapters import CONFIG as ADAPTER_CONFIG
from sgpt_jax.checkpoint.lora import whole_leaf
from sgpt_jax.checkpoint.quantise import scale_name
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError
from sgpt_jax.families import export_config, family_of
from sgpt_jax.families.tables import active_rules, leaf_name
from sgpt_jax.files.lines import write_json

MAX_SHARD_BYTES = 5_000_000_000

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def export_tensors(decoder: Decoder, hf: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The decoder's tensors under the names that transformers gives them, one at a time, in the decoder's dtype.

    int8 weights are dequantised, and adapters merged.
    """
    family = family_of(hf)
    _, params = split(decoder)
    leaves = {leaf_path(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
    prefix = family.base_prefix if decoder.config.head != "none" else family.headless_prefix
    for name, (rule, layer) in active_rules(decoder.config, family.rules, leaves).items():
        parts = tuple(whole_leaf(leaves, leaf_name(pattern, layer), decoder.build) for pattern in rule.leaves)
        values = np.ascontiguousarray(rule.layout.dump(parts, decoder.config))
        yield (name if rule.leaves[0].startswith("head/") else prefix + name), values


def export_folder(decoder: Decoder, hf: Mapping[str, Any], folder: Any) -> None:
    """Writes config.json and model.safetensors as transformers reads them; above 5 GB several files and an index.

    They take the place of weights that are there, once all are written.

    Args:
        decoder: the decoder; its dtype is the files' dtype.
        hf: the Hugging Face config that it was read from.
        folder: created where it is not there.

    Raises:
        InputError: when transformers has no config for the decoder, as for biases added to some families; or the
            folder has an adapter, which would be loaded in place of the decoder. Nothing is written then.
    """
    folder = epath.Path(folder)
    if (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{folder} has an adapter ({ADAPTER_CONFIG}), which would be loaded in place of what is saved there: save "
            "to another folder"
        )
    config = export_config(hf, decoder.config)
    family = family_of(config)
    name = family.causal_lm
    if decoder.config.head == "none":
        for ending in ("ForCausalLM", "LMHeadModel"):
            name = name.removesuffix(ending)
        name += "Model"
    config |= {"architectures": [name], "dtype": decoder.dtype.name}
    config.pop("torch_dtype", None)  # the older spelling of dtype
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = total = 0
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        path = folder / f"shard-{len(shards)}.tmp"
        try:
            save_file(pending, str(path), metadata={"format": "pt"})
        except SafetensorError as error:  # the disk is full, for example
            for unfinished in folder.glob("shard-*.tmp"):
                unfinished.unlink()
            raise InputError(f"{folder}: the weights cannot be written: {error}") from error
        pending.clear()

    for tensor_name, values in export_tensors(decoder, config):
        if pending and size + values.nbytes > MAX_SHARD_BYTES:
            flush()
            shards.append([])
            size = 0
        pending[tensor_name] = values
        shards[-1].append(tensor_name)
        size += values.nbytes
        total += values.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else several
        (folder / f"shard-{number}.tmp").replace(folder / file)
        weight_map |= dict.fromkeys(names, file)
    new = set(weight_map.values())
    if len(shards) > 1:
        new.add("model.safetensors.index.json")
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)
    for old in folder.iterdir():
        if _WEIGHTS.fullmatch(old.name) and old.name not in new:
            old.unlink()


def count_parameters(params: Any) -> collections.Counter[str]:
    """Numbers of values by leaf name: kernel, bias, scale, embedding; the scales of int8 weights do not count."""
    counts: collections.Counter[str] = collections.Counter()
    leaves = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    of_int8 = {scale_name(name) for name, leaf in leaves.items() if leaf.dtype == np.int8}
    for name, leaf in leaves.items():
        if name not in of_int8:
            counts[name.rsplit("/", 1)[-1]] += leaf.size
    return counts
