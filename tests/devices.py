"""Several devices on a CPU, for tests of meshes, and how quickly programs are compiled for it."""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parent
SHAPES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if sizes[0] * sizes[1] * sizes[2] == 8]


# The tests compile some thousand tiny programs and run most of them once: what LLVM optimises costs a third of their
# time and changes no result.
QUICK = "--xla_backend_optimization_level=0"


def cpus(count):
    """The environment of a process with so many devices.

    XLA takes a thread for each; several collectives at once on each device then wait for each other for want of
    threads. NPROC is how many it makes.
    """
    flags = f"{QUICK} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": str(4 * count)}


def run_on_eight(code, *arguments):
    environment = os.environ | cpus(8) | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done
