"""A tiny decoder, a corpus, and the index of one by the other."""

import json

import decoders
import numpy as np
import pytest

from sgpt_jax.cli.parser import main

WORDS = ("heron ferry market bay water night shallow day people stay twice crosses waits three on").split()  # noqa: SIM905


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = decoders.write_checkpoint("llama", tmp_path_factory.mktemp("cli") / "tiny")
    return str(decoders.write_tokenizer(folder))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    random = np.random.RandomState(1)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [" ".join(random.choice(WORDS, random.randint(3, 12))) for _ in range(40)]
    path.write_text(
        "".join(
            json.dumps({"_id": f"d{i}", "title": "", "text": text}) + "\n" for i, text in enumerate(texts)
        )
    )
    return str(path)


@pytest.fixture(scope="module")
def index(model, corpus, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("index") / "index")
    assert main(["index", corpus, "-o", folder, "--model", model, "--brackets", "--chunk-size", "8"]) == 0
    return folder
