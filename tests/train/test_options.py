"""Options of the command, by what they do to the loss of the first step, which is computed before any update."""

import json

import numpy as np
import pytest
from training import write_model

from sgpt_jax.files.lines import write_jsonl
from train.__main__ import main

WORDS = "heron sea bread bridge glue star salt fish yeast mill coffee hide law".split()  # noqa: SIM905
BATCH = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A decoder whose config has rates of dropout."""
    folder = tmp_path_factory.mktemp("base")
    write_model("gpt_neo", folder)
    config = json.loads((folder / "config.json").read_text())
    rates = {"resid_dropout": 0.5, "embed_dropout": 0.5, "attention_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(config | rates))
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = [" ".join(draw.choice(WORDS, 5)) for _ in range(3 * 24)]
    write_jsonl(
        path,
        [
            {"query": words[i], "positive": words[i + 24], "negatives": [words[i + 48]], "scores": [9.0, 1.0]}
            for i in range(24)
        ],
    )
    return str(path)


@pytest.fixture
def losses(base, pairs, tmp_path):
    def run(*options):
        out = tmp_path / "-".join(("out", *options)).replace("/", "")
        common = ["--batch-size", BATCH, "--max-seq-length", 32, "--lr", 1e-3, "--seed", 3]
        arguments = ["--model", base, "--data", pairs, "--output", out, *common, *options]
        assert main(["pairs", *map(str, arguments)]) == 0
        return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]

    return run


def test_scale(losses):
    """At a scale of nearly nothing all candidates, positives and hard negatives, are as likely."""
    (flat, _) = losses("--steps", "2", "--scale", "1e-6")
    assert flat == pytest.approx(np.log(2 * BATCH), abs=1e-4)
    assert abs(losses("--steps", "2", "--scale", "50")[0] - flat) > 0.01


def test_distill_weight(losses):
    """The loss is linear in it, and without distillation at 0."""
    plain = losses("--steps", "2")[0]
    none, one, three = (
        losses("--steps", "2", "--distill", "margin", "--distill-weight", weight)[0] for weight in "013"
    )
    assert none == pytest.approx(plain, rel=1e-6)
    assert one - none > 0.01
    assert three - none == pytest.approx(3 * (one - none), rel=1e-4)


def test_dropout_and_fractional_epochs(losses):
    """24 examples in batches of 8: three steps an epoch."""
    plain = losses("--epochs", "0.67", "--no-dropout")
    assert len(plain) == 2
    dropped = losses("--epochs", "1.34", "--dropout")
    assert len(dropped) == 4
    assert abs(dropped[0] - plain[0]) > 1e-3
