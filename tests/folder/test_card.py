"""The README.md of a model folder, and what models state of their license."""

import json

import gguf

from sgpt_jax.decoder.modules import Normalize
from sgpt_jax.folder.card import read_license, write_model_card
from sgpt_jax.folder.settings import ModelSettings


def test_model_card(tmp_path):
    settings = ModelSettings("weightedmean", True, 300)
    write_model_card(
        tmp_path,
        settings,
        768,
        name="me/heron",
        base_model="EleutherAI/gpt-neo-125m",
        license="mit",
        training={"data": "a|b\nc", "examples": 499184},
        results={"SciFact nDCG@10": 0.569},
    )
    card = (tmp_path / "README.md").read_text("utf-8")
    front = card.split("---\n")[1].splitlines()
    assert {'license: "mit"', 'base_model: "EleutherAI/gpt-neo-125m"'} < set(front)
    assert all(isinstance(json.loads(line.partition(": ")[2]), str | list) for line in front)
    assert "sentence-transformers adds no brackets by itself" in card
    assert 'SentenceTransformer("me/heron")' in card
    assert 'BiEncoder.from_pretrained("me/heron")' in card
    assert "| data | a\\|b c |" in card
    assert "| examples | 499,184 |" in card
    assert "| SciFact nDCG@10 | 0.569 |" in card
    assert read_license(tmp_path) == "mit"


def test_model_card_without_much_to_say(tmp_path):
    write_model_card(
        tmp_path, ModelSettings("mean", False, None, (Normalize(),)), 8, base_model=str(tmp_path)
    )
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "license" not in card.split("---")[1]
    assert "base_model" not in card.split("---")[1]
    assert "brackets" not in card
    assert "## " not in card
    assert read_license(tmp_path) is None


def test_license_of_other_sources(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlanguage: en\nlicense: 'apache-2.0'\n---\nlicense: no\n", "utf-8"
    )
    assert read_license(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("# Model\nlicense: no\n", "utf-8")
    assert read_license(tmp_path) is None
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_license("mit")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_license(tmp_path / "model.gguf") == "mit"
