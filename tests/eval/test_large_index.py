"""python -m eval large-index on a small scale."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the eval extra is not installed")

from eval.__main__ import main
from eval.large_index import generate


def test_documents_are_short_and_the_same_for_a_seed():
    texts = list(generate(10_050, 3))
    assert len(texts) == 10_050 and texts == list(generate(10_050, 3))
    assert texts != list(generate(10_050, 4))
    lengths = np.array([len(text.split()) for text in texts])
    assert (lengths.min(), lengths.max()) == (5, 20)


def test_it_measures_and_finds_what_brute_force_finds(tmp_path, capsys):
    command = ["large-index", "--documents", "3000", "--width", "32", "--store", "int8"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "large-index.json").read_text())
    assert result["search"]["exact"] == 1 and result["search"]["itself_first"] > 0.95
    assert result["tokens_padded"] >= result["tokens"] >= 3000 * 5
    assert 0 <= result["waited"] <= 1 and result["recall"]["recall@10"] > 0.9
    documents = [point["documents"] for point in result["curve"]]
    assert documents == sorted(documents) and documents[-1] == 3000
    assert (tmp_path / "large-index.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large-index.json", "large-index.png"]
    assert "3000 documents in" in capsys.readouterr().out


def test_a_width_is_not_of_a_model_that_is_given(tmp_path, capsys):
    assert main(["large-index", "--width", "32", "--model", "x", "--output", str(tmp_path / "out")]) == 1
    assert "--width is of the tiny decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
