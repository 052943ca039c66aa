"""Plans compiled: at two depths or whole, for machines that are not here, and what is said where nothing compiles."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from devices import TESTS
from plans import TINY, WORKS, arguments

from eval.__main__ import main
from eval.plan import command as plan
from eval.plan import compile as plan_compile
from eval.plan import devices as plan_devices
from eval.plan import gpus as plan_gpus
from eval.plan import table as plan_table

ON_GPU = jax.default_backend() == "gpu"


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e-8", "libtpu is not installed"),
        pytest.param("h100:8", "CUDA plugin installed", marks=pytest.mark.skipif(ON_GPU, reason="has GPUs")),
        pytest.param(
            "l4", "the GPUs that need not be here", marks=pytest.mark.skipif(ON_GPU, reason="has GPUs")
        ),
    ],
)
def test_without_a_compiler_a_message_and_the_analytic_part(topology, message, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    result = plan.make_plan("gpt-neo-125m", plan_devices.parse_target(topology), arguments(no_compile=False))
    assert result["compiled"] is None
    assert plan_table.describe(result).count(message) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("chip", plan_gpus.GPUS)
def test_every_gpu_is_described(chip):
    """XLA reads the description as a message, in which every brace closes and each field stands once."""
    text = plan_gpus.target_config(chip)
    assert text.count("{") == text.count("}") == 3
    names = [line.split(":")[0].strip() for line in text.splitlines() if ":" in line and "{" not in line]
    assert len(names) == len(set(names)) == 22
    assert f"device_memory_size: {int(plan_devices.CHIPS[chip].memory)}\n" in text


def test_two_depths_tell_the_third(tmp_path):
    """A line through two and three repetitions of the layers, against the whole decoder compiled."""
    config = dataclasses.replace(TINY, num_layers=8, windows=(None, 16) * 4)
    assert plan_compile.depth_step(config) == 2 and plan_compile.depth_step(TINY) == 1
    work = dataclasses.replace(WORKS["in chunks"], rows=64, chunk=16)
    devices = jax.devices()[:1]
    line = plan_compile.compile_work(config, work, "data=1", devices, full=False)
    whole = plan_compile.compile_work(config, work, "data=1", devices, full=True)
    assert line.layers == (4, 6) and whole.layers == (8,)
    assert line.flops == pytest.approx(whole.flops, rel=0.02)
    assert line.temporaries == pytest.approx(whole.temporaries, rel=0.1)


@pytest.mark.parametrize(("share", "depths"), [(0.3, [False]), (0.5, [False, True])])
def test_what_comes_near_the_memory_is_compiled_whole(share, depths, monkeypatch, capsys):
    asked = []
    usable = plan_devices.parse_target("v5e-1").chip.usable

    def compile_work(config, work, mesh, devices, *, full):
        asked.append(full)
        layers = (config.num_layers,) if full else (2, 3)
        return plan_compile.Compiled(share * usable, 1.0, 0.0, layers, (0.0,) * len(layers))

    monkeypatch.setattr(plan_compile, "compile_work", compile_work)
    monkeypatch.setattr(plan_compile, "devices_of", lambda target: jax.devices())
    arguments = ["plan", "--model", "gpt-neo-125m", "--topology", "v5e-1", "--task", "encode"]
    assert main(arguments) == 0
    assert asked == depths
    assert ("12 layers compiled" in capsys.readouterr().out) == depths[-1]


@pytest.mark.parametrize(("program", "kept"), [("plan", False), ("sts", True)])
def test_programs_for_other_machines_are_not_kept(program, kept, monkeypatch):
    """`plan` has a --task of its own."""
    asked = []
    monkeypatch.setattr("eval.__main__.run_command", lambda *_, cache_programs: asked.append(cache_programs))
    arguments = {"plan": ["--model", "gpt-neo-125m", "--topology", "v5e-1"], "sts": ["f.csv", "--model", "m"]}
    main([program, *arguments[program]])
    assert asked == [kept]


ELSEWHERE = """
    import sys, jax
    jax.config.update("jax_platforms", "cpu")
    from eval.plan import compile as plan_compile
    from eval.plan.devices import parse_target
    from eval.plan.programs import Work
    from plans import TINY
    target = parse_target(sys.argv[1])
    devices = plan_compile.devices_of(target)
    assert len(devices) == target.count and devices[0].platform == target.chip.kind, devices
    for work in (Work(task="encode", rows=8, length=32), Work(task="train", rows=16, length=32, examples=8)):
        found = plan_compile.compile_work(TINY, work, f"fsdp={target.count}", devices, full=True)
        assert found.temporaries > 0 and found.layers == (3,)
        assert target.chip.kind == "gpu" or found.flops > 0  # of which a GPU's compiler says nothing
    if target.chip.kind == "tpu":  # whose compiler has a limit
        large = Work(task="encode", rows=2**25, length=128)
        try:
            plan_compile.compile_work(TINY, large, "data=-1", devices, full=True)
        except plan_compile.DoesNotFit as error:
            assert abs(error.limit - target.chip.usable) < 2**28 and error.needed > error.limit
        else:
            sys.exit("it fits")
    print("compiled")
"""


@pytest.mark.parametrize("topology", ["v5e-4", "v4-8", "h100", "a100:8"])
def test_compiling_for_a_machine_without_having_it(topology):
    is_gpu = plan_devices.parse_target(topology).chip.kind == "gpu"
    if not (plan_compile.has_cuda_plugin() if is_gpu else importlib.util.find_spec("libtpu")):
        pytest.skip("JAX's CUDA plugin is not installed" if is_gpu else "libtpu is not installed")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path.cwd()), str(TESTS), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ELSEWHERE), topology],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "compiled"
