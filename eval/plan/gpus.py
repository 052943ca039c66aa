"""GPUs that are not here, described to XLA's compiler: it makes their programs from these figures alone.

Source: the device descriptions that XLA has of these (openxla/xla, xla/backends/gpu/target_config/specs).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .devices import CHIPS

_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {block_memory}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} feature_extension: {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What XLA wants to know of a GPU beside its memory.

    Attributes:
        name: as its driver says it.
        capability: compute capability.
        cores: multiprocessors.
        units: float32 units of one.
        threads: that one holds.
        shared_memory: of one, bytes; a block can have all of it but 1 KiB.
        cache: of the second level, bytes.
        clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    units: int
    threads: int
    shared_memory: int
    cache: int
    clock: float


_HOPPER: dict[str, Any] = {"capability": (9, 0), "cores": 132, "units": 128, "threads": 2048, "shared_memory": 233472,
                           "cache": 50 * 2**20, "clock": 1.98}  # fmt: skip
_AMPERE: dict[str, Any] = {"capability": (8, 0), "cores": 108, "units": 64, "threads": 2048, "shared_memory": 167936,
                           "cache": 40 * 2**20, "clock": 1.41}  # fmt: skip

GPUS: dict[str, Gpu] = {
    "h100": Gpu(name="NVIDIA H100 80GB HBM3", **_HOPPER),
    "h200": Gpu(name="NVIDIA H200 141GB HBM3e", **_HOPPER),
    "a100": Gpu(name="NVIDIA A100-SXM4-80GB", **_AMPERE),
    "a100-40gb": Gpu(name="NVIDIA A100-SXM4-40GB", **_AMPERE),
}


def target_config(chip: str) -> str:
    """XLA's description of a GPU of `CHIPS`, a GpuTargetConfigProto as text."""
    gpu = GPUS[chip]
    return _TEXT.format(
        gpu=gpu,
        block_memory=gpu.shared_memory - 1024,
        bandwidth=int(CHIPS[chip].bandwidth),
        memory=int(CHIPS[chip].memory),
        extension="ACCELERATED_FEATURES" if gpu.capability >= (9, 0) else "NONE",
    )
