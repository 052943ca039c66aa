"""One training step, from packed tokens to updated parameters, as one jitted function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgpt_jax.decoder.batch import Batch
from sgpt_jax.decoder.modules import Modules, apply_modules
from sgpt_jax.decoder.program import can_have_gelu_in_matmul, decoder_jit
from sgpt_jax.decoder.sharding import batch_sharding, leaf_path, num_shards, on_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.packing.layout import round_up
from sgpt_jax.packing.rows import encode_rows, most_texts
from sgpt_jax.runtime.platform import by_platform

from .grad_cache import encode_in_chunks
from .losses import LossConfig, total_loss
from .optimizer import join_params


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        trainable: float32 master copies of what trains, None elsewhere.
        moments: the optimizer's state.
        step: int32, steps done.
        key: data of the random key for dropout, the same in all steps.
    """

    trainable: Any
    moments: Any
    step: Array
    key: Array


def new_state(trainable: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step, wherever its arrays may lie. Shapes are enough (`jax.eval_shape`)."""
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32), key)


def state_shardings(state: TrainState, trainable: Any, mesh: Mesh) -> TrainState:
    """The sharding of every leaf of a state: a moment has that of its parameter, anything else is replicated.

    Args:
        state: arrays or their shapes.
        trainable: the parameters that train, with their shardings.
        mesh: of these.
    """
    shardings = {
        leaf_path(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: Any, _: Any) -> NamedSharding:
        # A moment's path ends in that of its parameter, behind those of the optimizer's parts.
        ends = (leaf_path(path[start:]) for start in range(len(path)))
        return next((shardings[end] for end in ends if end in shardings), replicated)

    return jax.tree_util.tree_map_with_path(sharding, state)


def init_state(
    trainable: Any, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh | None
) -> TrainState:
    """The state before the first step, on the mesh as `state_shardings` says, or on the first device."""
    state = new_state(trainable, optimizer, seed)
    if mesh is None:
        return jax.device_put(state, jax.devices()[0])

    def place(leaf: Array, sharding: NamedSharding) -> Array:
        if leaf.sharding == sharding:  # of parameters and moments, which may be on other hosts too
            return leaf
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(place, state, state_shardings(state, trainable, mesh))


def make_step(
    structure: Any,
    *,
    pooling: str,
    modules: Modules = (),
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any,
    chunk_rows: int,
    dropout: bool,
) -> Callable[[TrainState, Any, dict], tuple[TrainState, Array, Array]]:
    """The step as a pure function, not jitted: (state, frozen, batch) to (new state, loss, gradient norm).

    The norm is that of the whole gradient before clipping: it is finite exactly when all of its entries are.

    Args:
        structure: the decoder's structure.
        pooling: see `sgpt_jax.pool`.
        modules: what follows it, as it is: none of it trains.
        loss: what is minimised.
        optimizer: from `train.optimizer.make_optimizer`.
        dtype: compute dtype, to which trainable leaves are cast.
        chunk_rows: rows encoded at a time, see `encode_in_chunks`.
        dropout: whether to use the dropout rates of the model's config.
    """

    def step(state: TrainState, frozen: Any, batch: dict) -> tuple[TrainState, Array, Array]:
        rows: Batch = batch["rows"]
        count, length = rows.segments.shape
        if dropout:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
            rows = dataclasses.replace(rows, dropout_keys=keys)

        def loss_of(trainable: Any) -> Array:
            params = join_params(trainable, frozen, dtype)
            vectors = encode_in_chunks(
                lambda params, part: encode_rows(
                    structure, params, part[0], pooling, most_texts(length), part[1]
                ),
                params,
                (rows, batch["skip"]),
                chunk_rows,
            )
            vectors = vectors.reshape(-1, vectors.shape[-1])  # [R * S, E]
            queries, positives, negatives = (
                apply_modules(vectors[indices], modules) for indices in batch["indices"]
            )
            return total_loss(loss, queries, positives, negatives, batch)

        value, gradient = jax.value_and_grad(loss_of)(state.trainable)
        updates, moments = optimizer.update(gradient, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(trainable, moments, state.step + 1, state.key), value, optax.tree.norm(gradient)

    return step


def jit_step(step: Callable, structure: Any, state: TrainState, mesh: Mesh | None) -> jax.stages.Wrapped:
    """Compiles a step that updates its state in place; on a mesh the new state is sharded as the old one."""
    in_matmul = can_have_gelu_in_matmul(structure, mesh)
    if mesh is None:
        return decoder_jit(step, in_matmul, donate_argnums=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    replicated = NamedSharding(mesh, PartitionSpec())

    def step_on_mesh(state: TrainState, frozen: Any, batch: dict) -> tuple[TrainState, Array, Array]:
        with on_mesh(mesh):
            return step(state, frozen, batch)

    return decoder_jit(
        step_on_mesh, in_matmul, donate_argnums=0, out_shardings=(shardings, replicated, replicated)
    )


def agree(*values: int) -> list[int]:
    """The largest of each value over all processes."""
    if jax.process_count() == 1:
        return list(values)
    return np.max(multihost_utils.process_allgather(np.array(values)), axis=0).tolist()


def place_batch(
    batch: dict[str, Any], *, rows: int, chunk_rows: int, pad_id: int, mesh: Mesh | None
) -> dict[str, Any]:
    """Puts a batch of `PackedBatches` on the devices, as part of the global batch.

    Args:
        batch: this process's part.
        rows: the most rows that a process's part has.
        chunk_rows: see `make_step`.
        pad_id: for empty rows, by which the number of rows becomes a multiple of the chunk.
        mesh: None for the first device.

    Raises:
        InputError: the mesh gives this process more or fewer rows than its part has.
    """
    count = jax.process_count()
    multiple = chunk_rows if chunk_rows and rows * count > chunk_rows else num_shards(mesh)
    # Each number of rows compiles a program, which takes an accelerator minutes and a CPU seconds.
    local = round_up(rows * count, multiple, steps=by_platform(cpu=8, accelerator=4)) // count
    sharding = None if mesh is None else batch_sharding(mesh)
    global_rows = np.arange(local)
    if sharding is not None:
        global_rows = np.concatenate([np.arange(*span) for span in _spans(sharding, local)])
    room = most_texts(batch["rows"].segments.shape[1])
    arrays = {
        "rows": pad_rows(batch["rows"], local, pad_id),
        "skip": np.pad(batch["skip"], ((0, local - len(batch["skip"])), (0, 0))),
        "indices": tuple(
            (global_rows[indices // room] * room + indices % room).astype(np.int32)
            for indices in batch["indices"]
        ),
        "ids": batch["ids"],
        "negative_mask": batch["negative_mask"],
        "order": batch["order"],
        "scores": batch["scores"],
    }
    if sharding is None:
        return jax.device_put(arrays, jax.devices()[0])

    def shard(values: np.ndarray) -> Array:
        starts, at = {}, 0
        for start, stop in _spans(sharding, len(values)):
            starts[start], at = at, at + stop - start

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(len(values) * count)
            return values[starts[start] : starts[start] + stop - start]

        return jax.make_array_from_callback((len(values) * count, *values.shape[1:]), sharding, part)

    return jax.tree.map(shard, arrays)


def pad_rows(rows: Batch, count: int, pad_id: int) -> Batch:
    """Adds empty rows up to `count`."""
    missing = ((0, count - len(rows.segments)), (0, 0))
    return Batch(
        np.pad(rows.input_ids, missing, constant_values=pad_id),
        np.pad(rows.positions, missing),
        np.pad(rows.segments, missing, constant_values=-1),
    )


def _spans(sharding: NamedSharding, local: int) -> list[tuple[int, int]]:
    """Which rows of a global array are this process's `local` ones, as (start, stop).

    They need not be adjacent: JAX orders the devices of a pod by their coordinates in its network, not by host.
    """
    total = local * jax.process_count()
    indices = sharding.addressable_devices_indices_map((total,)).values()
    spans = sorted({index[0].indices(total)[:2] for index in indices if index is not None})
    if (found := sum(stop - start for start, stop in spans)) != local:
        raise InputError(
            f"mesh {dict(sharding.mesh.shape)}: this process would hold {found} of {total} rows, not {local}; the "
            "devices of a tensor axis must belong to one process"
        )
    return spans
