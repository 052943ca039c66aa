"""The settings of malloc, by the pages that large blocks are mapped to."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from sgpt_jax.runtime.malloc import give_back_freed_memory, keep_freed_memory

print(keep_freed_memory())
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 27, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
give_back_freed_memory()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_what_was_freed_is_kept_until_it_is_given_back():
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def run(**environment):
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            env=plain | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        said, *faults = done.stdout.split()
        return said, *map(int, faults)

    said, kept, given_back = run()
    assert said == "True"
    assert kept < 100 < given_back
    said, not_kept, _ = run(MALLOC_ARENA_MAX="1", GLIBC_TUNABLES="glibc.malloc.arena_max=1")
    assert said == "False"
    assert kept < 100 < not_kept
