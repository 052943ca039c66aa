"""`sgpt embed`: the vectors of texts, in order, and what it says of brackets and prompts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sgpt_jax as sgpt
from sgpt_jax.cli.parser import main


def test_embed_writes_the_vectors_in_order(model, corpus, tmp_path):
    output = tmp_path / "vectors.npy"
    assert main(["embed", corpus, "-o", str(output), "--model", model, "--normalize"]) == 0
    vectors = np.load(output)
    expected = sgpt.BiEncoder.from_pretrained(model).encode(
        [json.loads(line)["text"] for line in Path(corpus).read_text().splitlines()], normalize=True
    )
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert os.listdir(tmp_path) == ["vectors.npy"]


def test_embed_says_when_it_leaves_brackets_out(model, corpus, tmp_path, capsys):
    named = str(shutil.copytree(model, tmp_path / "specb"))  # the name turns brackets on
    for more, noted in (([], True), (["--side", "document"], False)):
        assert main(["embed", corpus, "-o", str(tmp_path / "v.npy"), "--model", named, *more]) == 0
        assert ("note: the model has brackets; without --side" in capsys.readouterr().err) == noted


def test_embed_says_which_prompt_a_folder_puts_before_other_texts(model, corpus, tmp_path, capsys):
    folder = tmp_path / "prompts"
    sgpt.BiEncoder.from_pretrained(model).save_pretrained(folder)
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings |= {"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert main(["embed", corpus, "-o", str(tmp_path / "v.npy"), "--model", str(folder)]) == 0
    assert "texts are embedded with its default prompt, query" in capsys.readouterr().err


def test_embed_reads_standard_input(model, tmp_path):
    output = tmp_path / "vectors.npy"
    command = [sys.executable, "-m", "sgpt_jax.cli", "embed", "-", "-o", str(output), "--model", model]
    subprocess.run(command, input=b"a heron\r\n\xef\xbb\xbfthe bay\n", check=True, capture_output=True)
    assert np.load(output).shape == (2, 32)


@pytest.mark.parametrize("output", [".", "nowhere/vectors.npy", "/proc/vectors.npy"])
def test_embed_refuses_where_it_cannot_write(output, model, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["embed", corpus, "-o", output, "--model", model]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {output}: ") and error.count("\n") == 1
    assert os.listdir(tmp_path) == []
