"""The memory of a step is said before the first one runs."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from training import data, write_model

import train
from sgpt_jax.decoder.batch import Batch
from train import programs
from train.recipes import RECIPES


def run(folder, capsys, **options):
    config = dataclasses.replace(
        RECIPES["pairs"][0], model=write_model("gpt_neo", folder / "base"), data=data(1), output=str(folder / "out"),
        batch_size=8, max_seq_length=24, steps=2, **options,
    )  # fmt: skip
    assert train.run(config)
    output = capsys.readouterr()
    return output.out + output.err


def test_memory_of_a_step_against_what_is_free(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(programs, "free_memory", lambda device: 300 * 2**30)
    said = run(tmp_path, capsys)
    assert re.findall(r"a step takes 0\.\d GiB beside the model; 300\.0 GiB are free", said), said
    assert said.count("a step takes") == 1


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_a_step_that_would_run_out_of_memory(chunk_size, tmp_path, capsys, monkeypatch):
    compiled, describe = [], programs.StepPrograms._describe

    def remember(self, program, rows):
        compiled.append(program)
        describe(self, program, rows)

    monkeypatch.setattr(programs.StepPrograms, "_describe", remember)
    monkeypatch.setattr(
        programs, "free_memory", lambda device: compiled[-1].memory_analysis().temp_size_in_bytes // 2
    )
    said = run(tmp_path, capsys, chunk_size=chunk_size)
    rows, fits = map(
        int, re.search(r"encodes (\d+) rows at a time; --chunk-size (\d+) should fit", said).groups()
    )
    assert rows == chunk_size or chunk_size == 0
    assert fits == int(0.45 * rows) or fits == int(0.45 * rows) - 1


@pytest.mark.parametrize("free", [0, 2**40])
def test_the_memory_of_another_shape_is_given_back_where_it_is_wanted(free, monkeypatch):
    given_back = []
    monkeypatch.setattr(programs, "free_memory", lambda device: free)
    monkeypatch.setattr(programs, "give_back_freed_memory", lambda: given_back.append(ran[-1]))
    step = jax.jit(lambda state, frozen, batch: (state, batch["rows"].positions.sum(), state))
    steps = programs.StepPrograms(step, 0, 1, lambda note: None)
    ran = []
    for rows in (2, 2, 3, 3, 2):
        steps(np.zeros(1), (), {"rows": Batch(*np.zeros((3, rows, 8), np.int32))})
        ran.append(rows)
    assert given_back == ([2, 3] if free == 0 else [])
