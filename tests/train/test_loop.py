"""Runs as a whole: killed, stopped and resumed; on several devices and processes; gone wrong."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import eval_cases
import numpy as np
import pytest
from devices import SHAPES, cpus
from safetensors.numpy import load_file
from training import (
    ROOT,
    Process,
    arguments,
    check_parameters,
    data,
    expected,
    metrics,
    wait_for_steps,
    write_model,
)

import train
from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import load_bias_set
from sgpt_jax.errors import InputError
from train.__main__ import main
from train.dev import make_evaluator
from train.log import RunLog


def assert_same_biases(one, other, **tolerance):
    ours, theirs = (load_bias_set(Path(out) / "biases.safetensors").values for out in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if tolerance:
            np.testing.assert_allclose(value, theirs[name], **tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_stopped_and_killed_and_resumed(base, pairs, tmp_path):
    """SIGTERM, then SIGKILL, then a checkpoint that was not finished: the biases are those of an unbroken run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(arguments(base, pairs, whole, "--steps", 120)) == 0

    process = Process(tmp_path, arguments(base, pairs, broken, "--steps", 120))
    wait_for_steps(process, broken, 15)
    process.popen.send_signal(signal.SIGTERM)
    code, output, errors = process.wait()
    assert code == 0, errors
    assert "stopped by SIGTERM" in output
    assert not (broken / "biases.safetensors").exists()
    done = len(metrics(broken))
    assert 15 <= done < 120
    assert f"after {done} of 120 steps" in output
    assert metrics(broken) == metrics(whole)[:done]

    process = Process(tmp_path, arguments(base, pairs, broken, "--steps", 120, "--resume"))
    wait_for_steps(process, broken, done + 25)
    process.popen.kill()
    _, output, _ = process.wait()
    assert f"going on after step {done}" in output
    killed = len(metrics(broken))

    checkpoints = sorted(int(path.name) for path in (broken / "checkpoints").iterdir() if path.name.isdigit())
    newest = checkpoints[-1]
    assert newest > done
    # What a process leaves that is killed while it writes: no complete checkpoint.
    shutil.copytree(
        broken / f"checkpoints/{newest}", broken / f"checkpoints/{newest + 1}.orbax-checkpoint-tmp"
    )
    process = Process(tmp_path, arguments(base, pairs, broken, "--steps", 120, "--resume"))
    code, output, errors = process.wait()
    assert code == 0, errors
    assert f"going on after step {newest}" in output
    assert newest <= killed + 1
    assert metrics(broken) == metrics(whole)
    assert_same_biases(broken, whole)
    for name in ("model.safetensors", "modules.json", "README.md"):
        assert (broken / name).exists()


def test_interrupted_by_the_keyboard(base, pairs, tmp_path):
    process = Process(tmp_path, arguments(base, pairs, tmp_path / "out", "--steps", 100_000))
    wait_for_steps(process, tmp_path / "out", 3)
    process.popen.send_signal(signal.SIGINT)
    code, _, errors = process.wait()
    assert (code, errors) == (130, "interrupted\n")


def test_a_disk_that_is_full_during_training(base, pairs, tmp_path):
    """Large files fail as on a full disk; the last line says so, whatever orbax's threads print before."""
    code = (
        "import signal, resource, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
        "from train.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    options = arguments(base, pairs, tmp_path / "out", "--steps", 30, "--save-every", 2)
    environment = os.environ | {"SGPT_COMPILATION_CACHE": "off"}
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'out'}") and "File too large" in last, done.stderr


def test_a_disk_that_is_full_at_the_end(base, pairs, tmp_path, monkeypatch, capsys):
    """A model folder that could not be written is an error, not a note as where transformers has no such model."""

    def full(*_, **__):
        raise InputError("the weights cannot be written: no space left")

    monkeypatch.setattr(BiEncoder, "save_pretrained", full)
    assert main(arguments(base, pairs, tmp_path / "out", "--steps", 2)) == 1
    assert "no space left" in capsys.readouterr().err


def test_tokens_a_second_are_not_invented(base, pairs, tmp_path, monkeypatch):
    """By the rates in TensorBoard, every step took about as long as the others, and all of them no longer than the run.

    (When the clock started after the work, the rate was a hundred thousand times too high.)
    """
    tokens, step = {}, RunLog.step
    monkeypatch.setattr(
        RunLog,
        "step",
        lambda log, number, *more: (tokens.update({number: more[-1]}), step(log, number, *more)),
    )
    start = time.perf_counter()
    assert main(arguments(base, pairs, tmp_path / "out", "--steps", 30, "--save-every", 7)) == 0
    elapsed = time.perf_counter() - start
    rates = scalars(tmp_path / "out/tensorboard", "tokens_per_second")
    seconds = [tokens[number] / rates[number] for number in range(30)]
    assert sum(seconds) < elapsed
    assert min(seconds) > 0.05 * np.median(seconds)
    losses = scalars(tmp_path / "out/tensorboard", "loss")
    assert [losses[number] for number in range(30)] == pytest.approx(
        [line["loss"] for line in metrics(tmp_path / "out")]
    )


def scalars(folder, name):
    """What TensorBoard reads of a scalar: {step: value}."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")  # a TFRecord: length, checksum, event, checksum
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                if value.tag == name:
                    found[event.step] = value.simple_value
            data = data[16 + length :]
    return found


def test_one_step_of_warm_up_trains_nothing_and_says_so(base, pairs, tmp_path, capsys):
    assert main(arguments(base, pairs, tmp_path / "one", "--steps", 1)) == 0
    assert "trains nothing" in capsys.readouterr().out
    assert main(arguments(base, pairs, tmp_path / "none", "--steps", 1, "--warmup-steps", 0)) == 0
    assert "trains nothing" not in capsys.readouterr().out
    changed = [load_bias_set(tmp_path / name / "biases.safetensors").values for name in ("one", "none")]
    assert any(np.any(changed[0][name] != changed[1][name]) for name in changed[0])


def test_the_best_by_dev_is_taken_and_callbacks_are_told(base, pairs, sts, tmp_path):
    out, told = tmp_path / "out", []

    class Told(train.Callback):
        def on_dev(self, step, name, value):
            told.append({"step": step, "dev": value})

        def on_step(self, step, loss, lr, tokens_per_second):
            assert tokens_per_second > 0
            told.append({"step": step, "loss": loss, "lr": lr})

    options = {
        "steps": 12,
        "dev": sts,
        "eval_every": 2,
        "keep_best": 2,
        "batch_size": 8,
        "max_seq_length": 40,
    }
    options |= {"model": base, "data": pairs, "output": str(out), "lr": 3e-3, "seed": 3}
    assert train.run(dataclasses.replace(train.PAIRS, **options), callbacks=[Told()])
    assert [each for each in told if "loss" in each] == metrics(out)
    assert [each for each in told if "dev" in each] == [
        json.loads(line) for line in (out / "dev.jsonl").read_text().splitlines()
    ]
    looks = [json.loads(line) for line in (out / "dev.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [1, 3, 5, 7, 9, 11]
    best = max(look["dev"] for look in looks)
    record = load_bias_set(out / "biases.safetensors").header["training"]
    assert record["chosen_step"] in {look["step"] + 1 for look in looks if look["dev"] == best}
    assert record["dev"] == pytest.approx(best, abs=1e-6)
    assert f"{best:.4f}" in (out / "README.md").read_text()
    kept = [look["dev"] for look in looks if (out / f"best/{look['step'] + 1}").exists()]
    assert sorted(kept) == sorted(look["dev"] for look in looks)[-2:]
    # the model in the folder gives that number
    assert make_evaluator(sts, "")(BiEncoder.from_pretrained(out)) == pytest.approx(best, abs=1e-6)


def test_nan_stops_the_run(base, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(
        arguments(base, pairs, out, "--steps", 20, "--lr", 1e38, "--save-every", 1, "--warmup-steps", 2)
    )
    assert code == 1
    error = capsys.readouterr().err
    lines = metrics(out)
    assert f"error: step {len(lines)}: loss" in error
    batch = [int(number) for number in error.split("[")[1].split("]")[0].split(",")]
    assert len(batch) == 8
    assert all(0 <= number < 30 for number in batch)
    assert all(np.isfinite(line["loss"]) for line in lines)
    saved = {int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit()}
    assert max(saved) == len(lines) >= 1
    assert not (out / "biases.safetensors").exists()
    assert not (out / "model.safetensors").exists()


SEVERAL = """
import json
from train.__main__ import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
"""


def fixture_run(folder):
    """A model, the options of the run of which torch's numbers are known, and these numbers."""
    base = write_model("gpt_neo", folder / "base")
    options = (
        f"pairs --model {base} --data {data(1)} --batch-size 8 --max-seq-length 75 --lr 1e-2 --warmup-steps 1 "
        "--steps 3 --no-shuffle --save-every 2"
    ).split()
    return load_file(f"{base}/model.safetensors"), options, expected("gpt_neo")


def check_run(folder, before, wanted):
    """Losses and parameters of a run are those of torch."""
    losses = [line["loss"] for line in metrics(folder)]
    np.testing.assert_allclose(losses, wanted["losses"], atol=1e-5)
    check_parameters(load_file(folder / "model.safetensors"), before, wanted)


def test_eight_devices(tmp_path):
    """Data, weights and heads spread over devices: the numbers of one device, which are torch's."""
    before, options, wanted = fixture_run(tmp_path)
    runs, mixed_mesh = [], "data=2,fsdp=2,tensor=2"
    meshes = ["data={},fsdp={},tensor={}".format(*sizes) for sizes in SHAPES]
    for mesh in meshes:
        chunk = "8" if mesh.startswith("data=2") else "0"
        runs.append([*options, "--output", str(tmp_path / mesh), "--mesh", mesh, "--chunk-size", chunk])
    learnt, again = tmp_path / mixed_mesh / "biases.safetensors", tmp_path / "again"
    start = ("--biases", str(learnt), "--lr", "1e-9", "--mesh", mixed_mesh)
    runs.append([*options, "--output", str(again), *start])
    code, output, errors = Process(tmp_path, [json.dumps(runs)], SEVERAL, **cpus(8)).wait()
    assert code == 0, output + errors
    for mesh in meshes:
        check_run(tmp_path / mesh, before, wanted)
    # A run that starts from the biases of another has them where that one had.
    sets = [load_file(path) for path in (learnt, again / "biases.safetensors")]
    assert sets[0].keys() == sets[1].keys()
    assert all(np.allclose(sets[1][name], values, atol=1e-6) for name, values in sets[0].items())
    # A checkpoint of eight devices goes on on one.
    mixed = tmp_path / mixed_mesh
    shutil.rmtree(mixed / "checkpoints/3")
    assert main([*options, "--output", str(mixed), "--chunk-size", "3", "--resume"]) == 0
    check_parameters(load_file(mixed / "model.safetensors"), before, wanted)
    assert len(metrics(mixed)) == 3


def test_two_processes(base, pairs, sts, tmp_path):
    """The numbers of one process, which are torch's; over a longer run, as near as Adam keeps rounding."""
    before, options, wanted = fixture_run(tmp_path)
    mesh = ("--mesh", "data=2,fsdp=2")
    longer = ("--steps", 12, "--dev", sts, "--eval-every", 4, "--chunk-size", 4)
    corpus = eval_cases.small_beir(tmp_path / "corpus")
    search = ("--steps", 2, "--dev", corpus, "--dev-split", "test", "--eval-every", 1)
    runs = [
        [*options, "--output", str(tmp_path / "short"), "--chunk-size", "4", *mesh, "--distributed"],
        arguments(base, pairs, tmp_path / "two", *longer, *mesh),
        arguments(base, pairs, tmp_path / "two searched", *search, *mesh),
    ]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # As Slurm describes a job of two tasks on this machine.
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    job |= {"JAX_COORDINATOR_PORT": str(port)} | cpus(2)
    processes = [
        Process(
            tmp_path, [json.dumps(runs)], SEVERAL, **job, SLURM_PROCID=str(number), SLURM_LOCALID=str(number)
        )
        for number in range(2)
    ]
    results = [process.wait() for process in processes]
    assert [code for code, *_ in results] == [0, 0], results
    check_run(tmp_path / "short", before, wanted)
    assert main(arguments(base, pairs, tmp_path / "one", *longer)) == 0
    assert main(arguments(base, pairs, tmp_path / "one searched", *search)) == 0
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    np.testing.assert_allclose([m["loss"] for m in ours], [m["loss"] for m in theirs], atol=1e-4)
    looks = [(tmp_path / name / "dev.jsonl").read_text() for name in ("two", "one")]
    assert looks[0].count("\n") == looks[1].count("\n") == 3
    found = [(tmp_path / f"{name} searched/dev.jsonl").read_text() for name in ("two", "one")]
    assert found[0] == found[1] != ""
    assert_same_biases(tmp_path / "two", tmp_path / "one", atol=2e-4)
