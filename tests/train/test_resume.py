"""A run goes on with what it was started with, or not at all; what chose its best checkpoint stays comparable."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from training import arguments, metrics

import train
import train.loop
from train.__main__ import main
from train.resume import INPUTS, RUN


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def add_to(path, part):
    """Adds a half to the tensors of a file whose names hold `part`."""
    with safe_open(str(path), "numpy") as opened:
        about = opened.metadata()
    tensors = {name: value + 0.5 if part in name else value for name, value in load_file(path).items()}
    save_file(tensors, path, about)


@pytest.fixture(scope="module")
def started(base, pairs, tmp_path_factory):
    """A run that started from biases, with its inputs beside it."""
    folder = tmp_path_factory.mktemp("started")
    shutil.copytree(base, folder / "base")
    shutil.copy(pairs, folder / "pairs.jsonl")
    first, second = folder / "first", folder / "out"
    common = str(folder / "base"), str(folder / "pairs.jsonl")
    assert main(arguments(*common, first, "--steps", 2, "--warmup-steps", 0)) == 0
    shutil.copy(first / "biases.safetensors", folder / "biases.safetensors")
    more = ("--steps", 3, "--biases", folder / "biases.safetensors")
    assert main(arguments(*common, second, *more)) == 0
    return folder, arguments(*common, second, *more, "--resume")


def change_data(folder):
    path = folder / "pairs.jsonl"
    lines = path.read_text().splitlines()
    lines[17] = json.dumps({"query": "heron", "positive": "sea"})
    path.write_text("\n".join(lines))


CHANGES = {
    "--data": change_data,
    "--biases": lambda folder: add_to(folder / "biases.safetensors", "bias"),
}


@pytest.mark.parametrize("option", CHANGES)
def test_files_that_changed_in_place(option, started, tmp_path, capsys):
    """Nothing is overwritten, and the option is named; a run of which nothing was noted goes on."""
    folder, resume = started
    shutil.copytree(folder, tmp_path / "copy")
    resume = [word.replace(str(folder), str(tmp_path / "copy")) for word in resume]
    out = tmp_path / "copy/out"
    config = json.loads((out / "config.json").read_text().replace(str(folder), str(tmp_path / "copy")))
    (out / "config.json").write_text(json.dumps(config))
    assert main(resume) == 0  # a copy of the same content
    CHANGES[option](tmp_path / "copy")
    before = contents(out)
    capsys.readouterr()
    assert main(resume) == 1
    error = capsys.readouterr().err
    assert f"the content of {option} " in error and error.count("--") == 1, error
    assert contents(out) == before
    del config[RUN][INPUTS]
    (out / "config.json").write_text(json.dumps(config))
    assert main(resume) == 0


@pytest.mark.parametrize("part", ["mlp.c_fc.weight", "ln_1.bias"])
def test_a_base_that_changed_in_place(part, base, pairs, tmp_path, capsys):
    """Its weights, or its own biases, which the hash that a bias set names its base by does not hold."""
    shutil.copytree(base, tmp_path / "base")
    run = arguments(str(tmp_path / "base"), pairs, tmp_path / "out", "--steps", 2, "--resume")
    assert main(run) == main(run) == 0
    add_to(tmp_path / "base/model.safetensors", part)
    before = contents(tmp_path / "out")
    assert main(run) == 1
    assert "the content of --model" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_another_dev(base, pairs, sts, tmp_path, capsys):
    """Numbers of two data sets are not compared, and the best is not passed over; with a first one a run goes on."""
    out, dev = tmp_path / "out", tmp_path / "dev.csv"
    shutil.copy(sts, dev)
    other = tmp_path / "other.csv"
    other.write_text("\n".join(dev.read_text().splitlines()[:15]))
    look = ["--eval-every", "2", "--dev"]
    run = arguments(base, pairs, out, "--steps", 4, "--save-every", 1)
    assert main([*run, *look, str(dev)]) == 0
    before = contents(out)
    assert main([*run, "--resume", *look, str(other)]) == 1
    assert f"--dev {dev}, not {other}" in capsys.readouterr().err
    assert contents(out) == before
    assert main([*run, "--resume"]) == 1
    assert f"--dev {dev}, which is missing now" in capsys.readouterr().err
    assert contents(out) == before
    assert main([*run, "--resume", *look, str(dev)]) == 0
    shutil.copy(other, dev)
    capsys.readouterr()
    assert main([*run, "--resume", *look, str(dev)]) == 1
    assert f"--dev {dev}, whose content has changed" in capsys.readouterr().err

    run = arguments(base, pairs, tmp_path / "none", "--steps", 4, "--save-every", 1)
    assert main(run) == 0
    assert main([*run, "--resume", *look, str(other)]) == 0


def whole(folder, base):
    shutil.copytree(base, folder)


def adapter(folder, base):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": np.ones(2, np.float32)}, folder / "adapter_model.safetensors")


def settings(folder, base):
    folder.mkdir()
    (folder / "modules.json").write_text("[]")


def left_over(folder, base):
    (folder / "best/2").mkdir(parents=True)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (whole, "holds a model (config.json), not a run"),
        (adapter, "holds a model (adapter_config.json), not a run"),
        (settings, "holds a model (modules.json), not a run"),
        (left_over, "holds best of a run of which nothing else is left"),
    ],
)
def test_folders_that_hold_no_run(fill, message, base, pairs, tmp_path, capsys):
    """Neither a start nor --resume writes there, be it the folder of --model itself, nor is --resume advised."""
    out = tmp_path / "out"
    fill(out, base)
    before = contents(out)
    run = arguments(str(out) if fill is whole else base, pairs, out, "--steps", 2)
    for more in ([], ["--resume"]):
        assert main([*run, *more]) == 1
        error = capsys.readouterr().err
        assert message in error and "--resume" not in error
        assert contents(out) == before


def test_a_run_whose_end_was_cut_short_is_still_known(base, pairs, tmp_path, monkeypatch, capsys):
    """Stopped as soon as the model folder is there: the run's options stay noted beside the model."""
    export = train.loop.export

    def then_stops(*arguments, **more):
        export(*arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.loop, "export", then_stops)
    run = arguments(base, pairs, tmp_path / "out", "--steps", 2)
    assert main(run) == 130
    monkeypatch.undo()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "gpt_neo" and config[RUN][INPUTS]
    assert main([*run, "--resume", "--scale", "5"]) == 1
    assert "scale 20.0, now 5.0" in capsys.readouterr().err
    assert main([*run, "--resume"]) == 0


def test_runs_of_earlier_versions_go_on(base, pairs, tmp_path, capsys):
    """Of one that was stopped before the run was noted again; and of one with an option that was passed over."""
    out = tmp_path / "out"
    run = arguments(base, pairs, out, "--steps", 2)
    assert main(run) == 0
    config = json.loads((out / "config.json").read_text())
    noted = config.pop("run")
    (out / "config.json").write_text(json.dumps(config))
    assert main([*run, "--resume"]) == 0
    (out / "config.json").write_text(json.dumps(config | {"run": noted | {"split": "validation"}}))
    assert main([*run, "--resume"]) == 0
    assert main([*run, "--resume", "--lr", "1"]) == 1
    assert "was started with other options: lr" in capsys.readouterr().err


def test_the_best_of_other_evaluations_after_a_kill(base, pairs, sts, tmp_path):
    """A best one of after the checkpoint is of steps that are made again: it is gone, and in nobody's way."""

    class Dies(train.Callback):
        def on_step(self, step, *_):
            if step == 9:
                raise RuntimeError

    options = {"model": base, "data": pairs, "output": str(tmp_path), "dev": sts, "steps": 12}
    options |= {"batch_size": 8, "max_seq_length": 40, "lr": 3e-3, "save_every": 5, "keep_best": 20}
    config = dataclasses.replace(train.PAIRS, **options)

    def kept():
        return sorted(int(path.name) for path in (tmp_path / "best").iterdir() if path.name.isdigit())

    with pytest.raises(RuntimeError):
        train.run(dataclasses.replace(config, eval_every=9), callbacks=[Dies()])
    assert kept() == [9]
    assert (tmp_path / "checkpoints/5").exists()
    assert train.run(dataclasses.replace(config, eval_every=2, resume=True))
    assert kept() == [6, 8, 10, 12]
    assert len(metrics(tmp_path)) == 12
