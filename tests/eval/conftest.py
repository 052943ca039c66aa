"""A tiny decoder and a small data set, for all evaluations."""

import decoders
import eval_cases
import pytest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    decoders.write_checkpoint("gpt_neo", folder)
    decoders.write_tokenizer(folder)
    return str(folder)


@pytest.fixture
def small(tmp_path):
    return str(eval_cases.small_beir(tmp_path / "small"))
