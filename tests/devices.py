"""Eight devices on a CPU, for tests of meshes."""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parent
SHAPES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if sizes[0] * sizes[1] * sizes[2] == 8]


EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


def run_on_eight(code, *arguments):
    environment = os.environ | EIGHT | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done
