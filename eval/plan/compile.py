"""What the compiler says of a program on its target, memory of every device and FLOPs, without having the target."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import os
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.sharding import make_mesh

from .devices import GIB, Target
from .gpus import GPUS, target_config
from .programs import Work, at_depth, lower

logger = logging.getLogger(__name__)

NO_LIBTPU = (
    "libtpu is not installed, so nothing was compiled: what follows is the analytic part alone. "
    "pip install libtpu (of the version that `pip install 'jax[tpu]'` would take) needs no TPU"
)
NO_CUDA = (
    "the GPUs are not here, nor is JAX's CUDA plugin installed, so nothing was compiled: what follows is the analytic "
    "part alone. pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, of jax's version, needs no GPU"
)
# Temporaries of a step of GPT-Neo 1.3B's biases, 160 rows of 80 tokens: 29.7 GB compiled without the GPU, 23.1 by an
# H200's own compiler (eval/results/speed/train-gpt-neo-1.3b-h200.json). Both are of the time before MLPs computed their
# activations again for the gradient.
WITHOUT_GPU = (
    "compiled without the GPU: untuned, and with XLA's attention where a run has cuDNN's, which needs less"
)
# What can be compiled without the GPU: Triton's kernels are chosen by trying them.
_WITHOUT_GPU: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": "0"}

# The two ways in which libtpu says so.
_TOO_MUCH = (
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])",
    r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler found, a device.

    Attributes:
        temporaries: bytes beside arguments and results: activations, gathered weights, everything else.
        flops: as the compiler counts the compiled program, a loop's body once; None where it does not say (a GPU's).
        seconds: that compiling took.
        layers: depths that were compiled; where it is not the model's own, the rest is extrapolated linearly.
        by_depth: temporaries of each of these.
    """

    temporaries: float
    flops: float | None
    seconds: float
    layers: tuple[int, ...]
    by_depth: tuple[float, ...]


class DoesNotFit(Exception):
    """The compiler refused: the program needs `needed` of `limit` bytes, for the number of `layers` compiled."""

    def __init__(self, needed: float, limit: float, layers: int):
        super().__init__(f"{needed / GIB:.2f} of {limit / GIB:.2f} GiB at {layers} layers")
        self.needed, self.limit, self.layers = needed, limit, layers


def devices_of(target: Target) -> list[Any] | None:
    """Devices to compile for; None where they cannot be had, for which `missing` says why.

    They are described, but on a machine with GPUs: there these are used, whatever they are.
    """
    from jax.experimental import topologies

    if target.chip.kind == "gpu":
        if jax.default_backend() == "gpu":
            found = jax.local_devices()
            return found[: target.count] if len(found) >= target.count else None
        if target.chip_name not in GPUS or not has_cuda_plugin():
            return None
        shape = f"1x1x{target.count}"  # slices, hosts, GPUs of a host
        config = target_config(target.chip_name)
        return list(topologies.get_topology_desc(shape, "cuda", target_config=config, topology=shape).devices)
    if importlib.util.find_spec("libtpu") is None:
        return None
    # No TPU is asked for: libtpu must neither look for one on the network nor wait for it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

    options: dict[str, Any] = {}
    sizes = [int(size) for size in str(target.shape).split("x")]
    if target.chip_name == "v4":
        options["chip_config_name"] = (
            "megacore"  # as Cloud TPU runs it: the two cores of a chip are one device
        )
    if any(size % 2 for size in sizes[:2]):
        options["chips_per_host_bounds"] = [*sizes, 1][:3]
    return list(topologies.get_topology_desc(f"{target.chip_name}:{target.shape}", "tpu", **options).devices)


def has_cuda_plugin() -> bool:
    """Whether JAX's compiler for NVIDIA GPUs is installed."""
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    )


def missing(target: Target) -> str:
    """Why `devices_of` has none."""
    if target.chip.kind == "tpu":
        return NO_LIBTPU
    if jax.default_backend() == "gpu":
        return (
            f"{target.count} GPUs are not here, so nothing was compiled; with JAX_PLATFORMS=cpu it is compiled "
            "without them"
        )
    if target.chip_name not in GPUS:
        known = ", ".join(GPUS)
        return f"nothing was compiled: the GPUs that need not be here are {known}"
    return NO_CUDA


def is_described(device: Any) -> bool:
    """Whether it is a GPU that is not here."""
    return device.platform == "gpu" and jax.default_backend() != "gpu"


def compile_lowered(lowered: jax.stages.Lowered, device: Any) -> jax.stages.Compiled:
    """Compiles for the device, which need not be here."""
    return lowered.compile(compiler_options=_WITHOUT_GPU if is_described(device) else None)


def depth_step(config: DecoderConfig) -> int:
    """After how many layers the kinds of layers repeat: 2 where local and global attention take turns."""
    for step in range(1, config.num_layers):
        kept = config.num_layers - step
        if (config.windows[step:], config.layer_rotary[step:]) == (
            config.windows[:kept],
            config.layer_rotary[:kept],
        ):
            return step
    return config.num_layers


def compile_work(
    config: DecoderConfig, work: Work, mesh_spec: str, devices: list[Any], *, full: bool
) -> Compiled:
    """Compiles for the devices, or two shallow versions of it and a line through them.

    Args:
        config: the decoder's.
        work: what to compile.
        mesh_spec: such as "fsdp=8".
        devices: from `devices_of`.
        full: compile all layers; otherwise two depths, of two and three repetitions. One alone would mislead: the
            second adds buffers that are used again by all later ones.

    Raises:
        DoesNotFit: a program that was compiled needs more memory than the device has.
    """
    mesh = make_mesh(mesh_spec, devices)
    step = depth_step(config)
    if full or config.num_layers <= 3 * step:
        temporaries, flops, seconds = _compile(config, work, mesh)
        return Compiled(temporaries, flops, seconds, (config.num_layers,), (temporaries,))
    two, three = (_compile(at_depth(config, layers), work, mesh) for layers in (2 * step, 3 * step))
    times = config.num_layers / step - 2
    return Compiled(
        two[0] + times * max(0.0, three[0] - two[0]),
        None if two[1] is None or three[1] is None else two[1] + times * (three[1] - two[1]),
        two[2] + three[2],
        (2 * step, 3 * step),
        (two[0], three[0]),
    )


@functools.lru_cache(maxsize=256)
def counted_flops(config: DecoderConfig, work: Work) -> float | None:
    """FLOPs of the whole program on one device as XLA counts it before it is compiled, a loop's body once.

    None where this backend does not say.
    """
    mesh = make_mesh(None, jax.devices()[:1])
    costs = lower(config, work, mesh).cost_analysis()
    return float(costs["flops"]) if costs and "flops" in costs else None


def _compile(config: DecoderConfig, work: Work, mesh: Mesh) -> tuple[float, float | None, float]:
    """(temporary bytes, FLOPs, seconds) of a program."""
    start = time.monotonic()
    try:
        compiled = compile_lowered(lower(config, work, mesh), mesh.devices.flat[0])
    except jax.errors.JaxRuntimeError as error:
        found = next(filter(None, (re.search(pattern, str(error)) for pattern in _TOO_MUCH)), None)
        if found is None:
            raise
        units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        needed, limit = (float(found[i]) * units[found[i + 1]] for i in (1, 3))
        raise DoesNotFit(needed, limit, config.num_layers) from None
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None  # TPU, GPU and CPU all say
    seconds = time.monotonic() - start
    logger.info("compiled %d layers in %.0f s", config.num_layers, seconds)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + results, (costs or {}).get("flops"), seconds
