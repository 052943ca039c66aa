"""Adapters (LoRA): given to a decoder, merged into its matrices, and written as a folder that PEFT loads."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors.numpy import save

from sgpt_jax.checkpoint.adapters import CONFIG, HEADER, WEIGHTS
from sgpt_jax.checkpoint.leaves import with_leaves
from sgpt_jax.checkpoint.quantise import dequantised
from sgpt_jax.decoder.build import PROJECTIONS, Build, Lora
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.model import Decoder, abstract_decoder
from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError
from sgpt_jax.families import family_of
from sgpt_jax.families.tables import Rule, active_rules, leaf_name
from sgpt_jax.files.lines import atomic_write, write_json


def make_lora(config: DecoderConfig, rank: int, alpha: float, targets: tuple[str, ...] = ()) -> Lora:
    """Checks the settings of adapters for a decoder.

    Args:
        config: the decoder's.
        rank: at least 1, and no more than any target's inputs or outputs.
        alpha: positive.
        targets: of `PROJECTIONS`; none are all that the decoder has.

    Raises:
        InputError: the settings are not possible.
    """
    there = {name: size for name, size in _sizes(config).items() if size is not None}
    unknown = [name for name in targets if name not in there]
    if unknown:
        raise InputError(
            f"adapters for {', '.join(unknown)}: this model has no such linear layer; it has {', '.join(there)}"
        )
    if rank < 1 or not alpha > 0:
        raise InputError(f"adapters need a positive rank and alpha, not {rank} and {alpha:g}")
    lora = Lora(rank, alpha, tuple(name for name in there if name in (targets or there)))
    narrow = min(min(there[name]) for name in lora.targets)
    if rank > narrow:
        raise InputError(
            f"adapters of rank {rank}: no more than {narrow} make sense, the width of the narrowest layer they are for"
        )
    return lora


def _sizes(config: DecoderConfig) -> dict[str, tuple[int, int] | None]:
    """Inputs and outputs of every projection; None for one that the decoder has not."""
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embed_dim, mlp_dim = config.embed_dim, config.mlp_dim
    sizes: dict[str, tuple[int, int] | None] = dict.fromkeys(PROJECTIONS)
    sizes |= {"q": (embed_dim, width), "k": (embed_dim, kv_width), "v": (embed_dim, kv_width)}
    sizes |= {"o": (width, embed_dim), "up": (embed_dim, mlp_dim), "down": (mlp_dim, embed_dim)}
    return sizes | ({"gate": (embed_dim, mlp_dim)} if config.gated else {})


def add_lora(decoder: Decoder, lora: Lora, seed: int) -> Decoder:
    """A decoder with adapters, which computes exactly what it did before: B is zero.

    A is uniform within 1 / sqrt(in), as PEFT starts it (Kaiming, a = sqrt(5)); the same on any mesh.

    Args:
        decoder: is left as it is, and shares its leaves.
        lora: from `make_lora`.
        seed: of A.
    """
    build = dataclasses.replace(decoder.build, lora=lora)
    _, abstract = abstract_decoder(decoder.config, build)
    key = jax.random.key(seed)
    values = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = leaf_path(path)
        if name.endswith("/lora_a"):
            limit = leaf.shape[0] ** -0.5
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            values[name] = np.asarray(jax.random.uniform(own, leaf.shape, minval=-limit, maxval=limit))
    return with_leaves(decoder, decoder.config, build, values)


def is_adapter(path: tuple[Any, ...]) -> bool:
    """Tells whether a leaf of a decoder's params is one of an adapter; `path` as of `jax.tree_util`."""
    return leaf_path(path).rpartition("/")[2] in ("lora_a", "lora_b")


def whole_leaf(leaves: Mapping[str, Any], leaf: str, build: Build) -> np.ndarray:
    """A leaf as another program would hold it, in the decoder's dtype: int8 multiplied out, its adapter merged.

    Args:
        leaves: all of the decoder's, by name.
        leaf: which.
        build: how the decoder is made.
    """
    values, parent = dequantised(leaves, leaf), leaf.rpartition("/")[0]
    if leaf.endswith("/kernel") and f"{parent}/lora_a" in leaves:
        assert build.lora is not None
        a, b = (np.asarray(leaves[f"{parent}/{part}"], np.float32) for part in ("lora_a", "lora_b"))
        values = values.astype(np.float32) + build.lora.scale * (a @ b)
    return values.astype(build.dtype, copy=False)


def save_adapter(
    folder: Any,
    decoder: Decoder,
    hf: Mapping[str, Any],
    leaves: Mapping[str, np.ndarray],
    *,
    base: str,
    header: Mapping[str, Any],
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT applies to the base's bare decoder.

    Where a family has one tensor for several projections, PEFT has one adapter for it: of the ranks of ours together,
    with the Bs side by side, each beside zeros.

    Args:
        folder: is there.
        decoder: with adapters.
        hf: the Hugging Face config that it was read from.
        leaves: float32 by name: those of the adapters, and biases that trained with them.
        base: the base model, as PEFT is to load it: a folder or a hub id, perhaps with @revision.
        header: where the adapter belongs, as of a bias set: `base_sha256` and so on.
    """
    lora, family = decoder.build.lora, family_of(hf)
    assert lora is not None
    prefix = "base_model.model." + family.headless_prefix
    _, params = abstract_decoder(decoder.config, decoder.build)
    there = {leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    biases: dict[str, np.ndarray] = {}
    in_by_out = False
    for name, (rule, layer) in active_rules(decoder.config, family.rules, there).items():
        names = [leaf_name(pattern, layer) for pattern in rule.leaves]
        if all(leaf in leaves for leaf in names):
            biases[name] = rule.layout.dump(tuple(leaves[leaf] for leaf in names), decoder.config)
        parents = [leaf.rpartition("/")[0] for leaf in names if leaf.endswith("/kernel")]
        if any(f"{parent}/lora_a" in leaves for parent in parents):
            module = name.removesuffix(".weight")
            a, b, in_by_out = _peft_matrices(rule, parents, leaves, decoder.config)
            tensors[f"{prefix}{module}.lora_A.weight"] = a
            tensors[f"{prefix}{module}.lora_B.weight"] = b
            ranks[module] = len(a)
    for name, values in biases.items():
        module, _, last = name.rpartition(".")
        # PEFT wraps a layer that it adapts.
        inner = f"{module}.base_layer.{last}" if module in ranks else name
        tensors[prefix + inner] = np.ascontiguousarray(values)
    save_config = _adapter_config(lora, ranks, base, in_by_out, bias=bool(biases))
    metadata = {"format": "pt", HEADER: json.dumps(dict(header))}
    with atomic_write(epath.Path(folder) / WEIGHTS) as stream:
        stream.write(save(tensors, metadata=metadata))
    write_json(epath.Path(folder) / CONFIG, save_config)


def _peft_matrices(
    rule: Rule, parents: list[str], leaves: Mapping[str, np.ndarray], config: DecoderConfig
) -> tuple[np.ndarray, np.ndarray, bool]:
    """(A [r, in], B [out, r], whether the family's own weight is [in, out]) of one tensor's adapter."""
    here = [(f"{parent}/lora_a" in leaves, parent.rpartition("/")[2]) for parent in parents]
    ranks = [
        leaves[f"{p}/lora_b"].shape[0] if there else 0 for p, (there, _) in zip(parents, here, strict=True)
    ]
    total, at, parts = sum(ranks), 0, []
    for parent, rank, (there, name) in zip(parents, ranks, here, strict=True):
        sizes = _sizes(config)[name]
        assert sizes is not None
        part = np.zeros((total, sizes[1]), np.float32)
        if there:
            part[at : at + rank] = leaves[f"{parent}/lora_b"]
        parts.append(part)
        at += rank
    a = np.concatenate(
        [leaves[f"{p}/lora_a"] for p, (there, _) in zip(parents, here, strict=True) if there], axis=1
    )
    b = rule.layout.dump(tuple(parts), config)
    # A layout does to the columns of B what it does to those of a kernel; one row shows the order of its axes.
    in_by_out = rule.layout.dump(tuple(part[:1] for part in parts), config).shape[0] == 1
    return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T if in_by_out else b), in_by_out


def _adapter_config(
    lora: Lora, ranks: Mapping[str, int], base: str, in_by_out: bool, *, bias: bool
) -> dict[str, Any]:
    name, _, revision = (base, "", "") if epath.Path(base).exists() else base.partition("@")
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    kinds = {module.rpartition(".")[2]: rank for module, rank in ranks.items()}
    wider = {kind: rank for kind, rank in kinds.items() if rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": lora.rank,
        "lora_alpha": alpha,
        # Whole names: the parts of one block may be called like those of another.
        "target_modules": sorted(ranks),
        "rank_pattern": wider,
        "alpha_pattern": {kind: alpha * rank / lora.rank for kind, rank in wider.items()},
        "fan_in_fan_out": in_by_out,
        "bias": "all" if bias else "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
