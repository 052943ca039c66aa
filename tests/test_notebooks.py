"""The notebooks, cell by cell, with small settings and a tiny decoder."""

import json
from pathlib import Path

import decoders
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("grain", reason="the train extra is not installed")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALL = {
    "quick_start": {"ABSTRACTS": 20},
    "train_biases": {"ABSTRACTS": 20, "STEPS": 2, "BATCH_SIZE": 4, "TOKENS": 16},
    "prompts": {"CLAIMS": 2, "OTHERS": 1, "EXAMPLES": 1, "TOKENS": 96, "NAMES": ("A", "G")},
    "tpu": {"TEXTS": 8, "DTYPE": "float32"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = decoders.write_checkpoint("llama", tmp_path_factory.mktemp("notebooks") / "tiny")
    return str(decoders.write_tokenizer(folder))


def test_all_notebooks_are_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore")
def test_notebook(name, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "notebooks are kept without outputs"
        exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), names)
        if "settings" in cell["metadata"].get("tags", ()):
            unknown = SMALL[name].keys() - names.keys()
            assert not unknown, unknown
            names |= {"MODEL": tiny, **SMALL[name]}
    opening = "".join(cells[0]["source"])
    assert "**Needs**" in opening and "**What comes out**" in opening
    assert names["plt"].get_fignums() and capsys.readouterr().out
    names["plt"].close("all")
