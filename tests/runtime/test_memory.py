"""What memory is free: the least of what the machine has and what the control groups of the process allow."""

from types import SimpleNamespace

import pytest

from sgpt_jax.runtime import memory

VERSIONS = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: (".", "memory.max", "memory.current", ""),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ({"": (900, 100, 0)}, 800),  # from within a container, whose own group is the root of what it sees
        ({"": (900, 100, 50)}, 850),  # cached files give way
        ({"slurm": (700, 300, 0), "slurm/job": (5000, 100, 0)}, 400),
        ({"slurm": (5000, 100, 0), "slurm/job": (200, 300, 0)}, 0),
        ({"slurm/job": ("max", 300, 0)}, 1000),
        ({}, 1000),
    ],
)
def test_control_groups(version, groups, free, tmp_path, monkeypatch):
    root, limit, used, start = VERSIONS[version]
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 1000 kB\n")
    name = ":" if version == 2 else "memory,other:"
    (tmp_path / "self/cgroup").write_text(f"7:cpu:/other\n4:{name}/slurm/job\n")
    for group, (most, now, cached) in groups.items():
        folder = tmp_path / root / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most if most == 'max' else most * 1024}\n")
        (folder / used).write_text(f"{now * 1024}\n")
        old = cached // 3  # files that were read twice count as active, and give way too
        (folder / "memory.stat").write_text(
            f"anon 5\n{start}inactive_file {old * 1024}\n{start}active_file {(cached - old) * 1024}\n"
        )
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert memory.free_memory(SimpleNamespace(memory_stats=lambda: None)) == free * 1024
