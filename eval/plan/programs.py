"""The programs of this project as they would run on a mesh, from a config alone: no weights, no devices."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sgpt_jax.checkpoint.weights import is_int8
from sgpt_jax.decoder.batch import Batch, Targets
from sgpt_jax.decoder.build import Build, Lora
from sgpt_jax.decoder.config import DecoderConfig, compute_dtype
from sgpt_jax.decoder.log_probs import score_tokens
from sgpt_jax.decoder.model import abstract_decoder
from sgpt_jax.decoder.sharding import batch_sharding, num_shards, param_shardings
from sgpt_jax.packing.rows import embed, most_texts

from ..training import (
    LossConfig,
    TrainState,
    jit_step,
    make_optimizer,
    make_step,
    new_state,
    state_shardings,
    trainable_mask,
)

Task = Literal["train", "encode", "score"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one call of a program computes.

    Attributes:
        task: "train" is a step of train/step.py, "encode" a batch of the bi-encoder, "score" a pass of the
            cross-encoder.
        rows: of the batch, over all devices.
        length: tokens of a row.
        chunk: in training, rows at a time over all devices (GradCache); 0 takes all rows at once.
        examples: in training, examples of a step.
        trainable: in training, what trains, see `train.optimizer.trainable_mask`.
        dtype: of frozen weights and matmuls.
        weights: "int8" for int8 matrices; None for matrices in the dtype.
        lora: the decoder's adapters, or None.
    """

    task: Task
    rows: int
    length: int
    chunk: int = 0
    examples: int = 0
    trainable: str = "bias"
    dtype: str = "bfloat16"
    weights: str | None = None
    lora: Lora | None = None

    @property
    def build(self) -> Build:
        """How the decoder of the program is made."""
        return Build(compute_dtype(self.dtype), is_int8(self.weights), self.lora)


def at_depth(config: DecoderConfig, layers: int) -> DecoderConfig:
    """The decoder with its first layers only."""
    return dataclasses.replace(
        config,
        num_layers=layers,
        windows=config.windows[:layers],
        layer_rotary=config.layer_rotary[:layers],
    )


def abstract_params(config: DecoderConfig, build: Build, mesh: Mesh) -> tuple[Any, Any]:
    """(structure, params): each leaf a `jax.ShapeDtypeStruct` with its sharding."""
    structure, params = abstract_decoder(config, build)
    return structure, jax.tree.map(_sharded, params, param_shardings(params, config, mesh))


def abstract_state(params: Any, work: Work, mesh: Mesh) -> tuple[TrainState, Any, Any]:
    """(state, frozen, optimizer) of a training run, with the shardings of `train.step.init_state`."""
    mask = trainable_mask(params, work.trainable)
    trainable = jax.tree.map(
        lambda leaf, trains: (
            jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding) if trains else None
        ),
        params,
        mask,
    )
    frozen = jax.tree.map(lambda leaf, trains: None if trains else leaf, params, mask)
    optimizer = make_optimizer(mask, lambda _: jnp.float32(1e-4))
    state = jax.eval_shape(lambda trainable: new_state(trainable, optimizer, 0), trainable)
    return jax.tree.map(_sharded, state, state_shardings(state, trainable, mesh)), frozen, optimizer


def lower(config: DecoderConfig, work: Work, mesh: Mesh) -> jax.stages.Lowered:
    """The program that the project would compile for this work on this mesh.

    Args:
        config: the decoder's.
        work: see `Work`; its rows and its chunk must divide over the mesh.
        mesh: of real devices, or of described ones (`jax.experimental.topologies`).
    """
    structure, params = abstract_params(config, work.build, mesh)
    rows = _packed(mesh, work)
    if work.task == "encode":
        return embed.lower(
            structure,
            params,
            (),
            rows,
            0,
            pooling="weightedmean",
            room=1,
            dimension=config.embed_dim,
            normalize=True,
            mesh=mesh,
        )
    if work.task == "score":
        shards = num_shards(mesh)
        targets = _rows(mesh, shards, work.rows * work.length // shards)
        return score_tokens.lower(structure, params, rows, Targets(targets, targets), mesh=mesh)
    state, frozen, optimizer = abstract_state(params, work, mesh)
    step = make_step(
        structure,
        pooling="weightedmean",
        loss=LossConfig(),
        optimizer=optimizer,
        dtype=compute_dtype(work.dtype),
        chunk_rows=work.chunk,
        dropout=False,
    )
    return jit_step(step, structure, state, mesh).lower(state, frozen, _batch(mesh, work))


def _batch(mesh: Mesh, work: Work) -> dict[str, Any]:
    """A batch as `train.step.place_batch` shards it; each example with one hard negative."""
    count = work.examples
    return {
        "rows": _packed(mesh, work),
        "skip": _rows(mesh, work.rows, most_texts(work.length)),
        "indices": (_rows(mesh, count), _rows(mesh, count), _rows(mesh, count, 1)),
        "ids": (_rows(mesh, count, 2), _rows(mesh, count, 2), _rows(mesh, count, 1, 2)),
        "negative_mask": _rows(mesh, count, 1, dtype=jnp.bool_),
        "order": _rows(mesh, count),
        "scores": _rows(mesh, count, 2, dtype=jnp.float32),
    }


def _packed(mesh: Mesh, work: Work) -> Batch:
    tokens = _rows(mesh, work.rows, work.length)
    return Batch(tokens, tokens, tokens)


def _rows(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _sharded(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
