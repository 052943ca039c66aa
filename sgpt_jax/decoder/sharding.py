"""The mesh, and how every array is sharded over it."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")

# The one table from logical axes to mesh axes. Axes that are not here are replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}

# The logical axes of every leaf, by the end of its path; () is replicated: vectors along E are small.
LEAF_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"tokens/embedding", ("vocab", "embed")),
    (r"positions/embedding", (None, "embed")),
    (r"project_(in|out)/kernel", (None, "embed")),
    (r"attn/q/kernel", ("embed", "heads")),
    (r"attn/q/bias", ("heads",)),
    (r"attn/[kv]/kernel", ("embed", "kv_heads")),
    (r"attn/[kv]/bias", ("kv_heads",)),
    (r"attn/o/kernel", ("heads", "embed")),
    (r"mlp/(up|gate)/kernel", ("embed", "mlp")),
    (r"mlp/(up|gate)/bias", ("mlp",)),
    (r"mlp/down/kernel", ("mlp", "embed")),
    (r"head/linear/kernel", ("embed", None)),
    (r"head/kernel", ("embed", "vocab")),
    (r"head/bias", ("vocab",)),
    (r".*(norm\d?/(scale|bias)|attn/o/bias|mlp/down/bias|head/linear/bias)", ()),
)


def make_mesh(spec: str | None = None, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor.

    Args:
        spec: such as "data=2,fsdp=4,tensor=1"; an axis left out has size 1, and one axis may be -1 for what is
            left. None puts all devices on data.
        devices: by default all devices of all processes.

    Raises:
        InputError: for an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(spec, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def check_mesh(mesh: Mesh | None) -> None:
    """Raises InputError for a mesh that is not one of `make_mesh`."""
    if mesh is not None and not {*AXES} <= {*getattr(mesh, "axis_names", ())}:
        raise InputError(
            f"mesh must be one of sgpt_jax.make_mesh, with the axes {', '.join(AXES)}, not {mesh!r}"
        )


def device_mesh(spec: str | None = None) -> Mesh | None:
    """The mesh of a command that encodes or scores, over the devices of this process; None for its first device.

    Where there are several accelerators the default puts all of them on `data`: each holds the whole model and takes a
    part of every batch. On CPUs the default is one device.

    Raises:
        InputError: see `make_mesh`.
    """
    devices = jax.local_devices()
    if not spec and (len(devices) == 1 or devices[0].platform == "cpu"):
        return None
    return make_mesh(spec, devices)


def mesh_sizes(spec: str | None, count: int) -> dict[str, int]:
    """The size of every axis of `make_mesh`'s mesh of `count` devices.

    Raises:
        InputError: see there.
    """
    sizes = dict.fromkeys(AXES, 1)
    if not spec:
        sizes["data"] = count
    for part in filter(None, (spec or "").split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", part)
        if match is None or match[1] not in AXES:
            raise InputError(f"mesh {spec!r}: {part!r} is not one of data=N, fsdp=N, tensor=N")
        sizes[match[1]] = int(match[2])
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise InputError(f"mesh {spec!r}: only one axis can be -1")
    if free:
        sizes[free[0]] = max(1, count // -math.prod(sizes.values()))
    if math.prod(sizes.values()) != count:
        raise InputError(f"mesh {spec!r} is for {math.prod(sizes.values())} devices, not {count}")
    return sizes


def leaf_path(path: tuple[Any, ...]) -> str:
    """A path of `jax.tree_util` as the name that the tables use, such as "blocks/0/attn/q/kernel"."""
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)


def param_shardings(params: Any, config: DecoderConfig, mesh: Mesh) -> Any:
    """How each leaf is sharded: a tree of `NamedSharding` like params.

    A dimension that does not divide by its mesh axis (for attention: whose heads do not) is replicated over that axis,
    with one message that lists all of them.

    Args:
        params: the decoder's params, arrays or `jax.ShapeDtypeStruct`.
        config: tells head counts.
        mesh: from `make_mesh`.
    """
    units = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    replicated: set[str] = set()

    def shard(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = leaf_path(path)
        axes = leaf_axes(name)
        spec: list[Any] = []
        for size, axis in zip(leaf.shape, axes or (None,) * leaf.ndim, strict=True):
            mesh_axes = RULES.get(axis or "", ())
            shards = math.prod(mesh.shape[a] for a in mesh_axes)
            count = units.get(axis or "", size)
            if count % shards:
                replicated.add(f"{axis} ({count} over {shards})")
                mesh_axes = ()
            spec.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(shard, params)
    if replicated:
        logger.warning(
            "replicated, as they do not divide over their mesh axis: %s", ", ".join(sorted(replicated))
        )
    return shardings


def leaf_axes(name: str) -> tuple[str | None, ...]:
    """The logical axes of a leaf; () is replicated.

    What stands beside a matrix follows it: the scales of int8 its channels, an adapter's A its inputs, B its outputs.

    Raises:
        ValueError: for a leaf that no decoder has.
    """

    def find(name: str) -> tuple[str | None, ...] | None:
        return next((axes for pattern, axes in LEAF_AXES if re.search(f"(^|/){pattern}$", name)), None)

    axes = find(name)
    parent, _, last = name.rpartition("/")
    if axes is None and last == "scale":
        rows, columns = find(f"{parent}/embedding"), find(f"{parent}/kernel")
        channel = rows[0] if rows else columns[-1] if columns else None
        axes = () if channel in (None, "embed") else (channel,)
    elif axes is None and last in ("lora_a", "lora_b") and (kernel := find(f"{parent}/kernel")):
        axes = (kernel[0], None) if last == "lora_a" else (None, kernel[1])
    if axes is None:
        raise ValueError(f"no logical axes for the leaf {name}")
    return axes


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis of an array, the batch, over the mesh."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def describe_devices(mesh: Mesh | None) -> str:
    """What computes, for people: such as "cpu" or "4 x TPU v5 lite"."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return count + devices[0].device_kind


def num_shards(mesh: Mesh | None) -> int:
    """Into how many shards the rows of a batch are split; their number must divide by it."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """For what is traced inside, `by_rows` splits over this mesh; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def platform() -> str:
    """What is traced for: "cpu", "gpu" or "tpu".

    Inside `on_mesh` it is the platform of the mesh's devices, which need not be devices of this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def by_rows(x: jax.Array) -> jax.Array:
    """Shards activations x [B, ...] by rows alone, on the mesh of `on_mesh`.

    Left to itself, XLA gathers the rows of all devices beside their shards of the weights, so that every device holds
    the whole batch; the weights are what is to be gathered. Without a mesh, or where rows do not divide, x stays as it
    is; so it does on a mesh that a user's program has set for itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not {*RULES["batch"]} <= {*mesh.axis_names} or x.shape[0] % math.prod(
        mesh.shape[axis] for axis in RULES["batch"]
    ):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(RULES["batch"]))
