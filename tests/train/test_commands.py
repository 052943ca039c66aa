"""The recipes by their commands, and options that are refused."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import decoders
import numpy as np
import pytest
from safetensors.numpy import load_file
from training import (
    WORDS,
    arguments,
    metrics,
    write_model,
    write_msmarco,
)

import train
from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import load_bias_set
from sgpt_jax.errors import InputError
from train.__main__ import main


def test_adding_biases(pairs, tmp_path, capsys):
    """A Llama gets biases and stays a Llama; a Qwen3 cannot, and leaves its bias set alone."""
    for variant in ("llama", "qwen3"):
        base, out = write_model(variant, tmp_path / variant), tmp_path / f"{variant}-out"
        assert main(arguments(base, pairs, out, "--steps", 2)) == 1
        assert "--add-biases" in capsys.readouterr().err
        assert not out.exists()  # an error leaves nothing behind
        assert main(arguments(base, pairs, out, "--steps", 2, "--add-biases")) == 0
        assert (out / "model.safetensors").exists() == (variant == "llama")
        assert (
            len(load_bias_set(out / "biases.safetensors").values)
            == 7 * decoders.config(variant)["num_hidden_layers"]
        )
    config = json.loads((tmp_path / "llama-out/config.json").read_text())
    assert config["attention_bias"] is config["mlp_bias"] is True
    output = capsys.readouterr().out
    said = output.index("and no model folder: transformers has no qwen3 config")
    assert "biases.safetensors" in output[:said]
    assert said < output.rindex("hard negatives; 2 steps")  # before the first step
    assert "no model folder: transformers has no qwen3 config" in output[said + 100 :]
    code = main(arguments(base, pairs, tmp_path / "all", "--steps", 2, "--add-biases", "--trainable", "all"))
    assert code == 1  # refused before training: there would be nothing to save
    assert "cannot be exported" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


def test_biases_to_start_from(pairs, tmp_path, capsys):
    """A second run goes on from the first one's bias set; what cannot hold all of its biases is refused."""
    base, first, second = write_model("qwen3", tmp_path / "base"), tmp_path / "first", tmp_path / "second"
    options = ("--steps", 3, "--brackets", "--pooling", "mean")
    assert main(arguments(base, pairs, first, *options, "--add-biases")) == 0
    start = ("--steps", 3, "--biases", first / "biases.safetensors")
    assert main(arguments(base, pairs, second, *start, "--lr", "1e-9")) == 0
    sets = [load_bias_set(folder / "biases.safetensors") for folder in (first, second)]
    assert all(
        np.allclose(sets[1].values[name], values, atol=1e-6) for name, values in sets[0].values.items()
    )
    assert sets[0].values.keys() == sets[1].values.keys()
    for key in ("base_sha256", "brackets", "pooling"):  # made for the same base, vectors made as before
        assert sets[0].header[key] == sets[1].header[key]
    assert sets[1].header["training"]["started_from"].startswith("biases.safetensors, sha256 ")
    assert "started_from" not in sets[0].header["training"] and "go on with" not in capsys.readouterr().out
    losses = [[line["loss"] for line in metrics(folder)] for folder in (first, second)]
    assert losses[1][0] != losses[0][0]  # the same batch, another start

    for refused, reason in (
        (("--trainable", "lora"), "leave the merged model"),
        (("--trainable", "lora", "--merge"), "cannot be exported"),
        (("--trainable", "attn/q/bias"), "does not train, such as blocks/0/attn/k/bias"),
        (("--biases", pairs), "not a bias set"),
    ):
        assert main(arguments(base, pairs, tmp_path / "none", *start, *refused)) == 1
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "none").exists()

    half = ("--steps", 2, "--dtype", "bfloat16", "--no-brackets", "--lr", "1e-9")
    assert main(arguments(base, pairs, tmp_path / "half", *start, *half)) == 0
    assert "were trained with brackets True, and go on with False" in capsys.readouterr().out
    kept = load_bias_set(tmp_path / "half" / "biases.safetensors").values  # not rounded on the way
    assert all(np.allclose(kept[name], values, atol=1e-6) for name, values in sets[0].values.items())


def test_training_everything(base, pairs, tmp_path):
    out = tmp_path / "out"
    options = (
        "--steps",
        3,
        "--trainable",
        "all",
        "--matryoshka",
        "8,32",
        "--both-directions",
        "--dtype",
        "bfloat16",
    )
    assert main(arguments(base, pairs, out, *options)) == 0
    assert not (out / "biases.safetensors").exists()
    before, after = load_file(f"{base}/model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name].astype(np.float32))}
    assert changed == set(before)


def test_the_nli_recipe(base, tmp_path):
    """From three plain files; symmetric, so a model with brackets in its name gets none here."""
    draw = np.random.default_rng(2)
    folder = tmp_path / "snli"
    folder.mkdir()
    premises = [" ".join(draw.choice(WORDS, 4)) + f" {n}" for n in range(12)]
    rows = [(p, f"{p} yes", "entailment") for p in premises] + [
        (p, f"no {p}", "contradiction") for p in premises
    ]
    for name, column in zip(("s1", "s2", "labels"), zip(*rows, strict=True), strict=True):
        (folder / f"{name}.dev").write_text("\n".join(column))
    out = tmp_path / "out"
    common = ["--model", base, "--data", str(folder), "--output", str(out)]
    assert main(["nli", *common, "--batch-size", "8", "--chunk-size", "4", "--steps", "3"]) == 0
    header = load_bias_set(out / "biases.safetensors").header
    assert header["brackets"] is False
    assert header["max_seq_length"] == 75
    assert header["training"]["examples"] == 24
    config = json.loads((out / "config.json").read_text())["run"]
    assert config["avoid_duplicates"] is True
    assert config["lr"] == 3.2e-4
    assert config["epochs"] == 8


def test_the_msmarco_recipe(base, tmp_path):
    """Brackets, rotating negatives, and the cross-encoder's scores for distillation."""
    records = [{"qid": q, "pos": [q], "neg": {"bm25": [q + 10, q + 20], "dense": [q + 15]}} for q in range(8)]
    scores = {q: {q: 9.0, q + 10: 1.0, q + 20: 2.5, q + 15: -3} for q in range(8)}
    folder = write_msmarco(tmp_path / "msmarco", records, scores)
    (tmp_path / "msmarco/queries.train.tsv").write_text("".join(f"{q}\tquery {WORDS[q]}\n" for q in range(8)))
    out = tmp_path / "out"
    options = {"batch-size": 4, "max-seq-length": 60, "steps": 4, "warmup-steps": 1, "negatives": 2}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    losses = {}
    for kind in ("kl", "margin"):
        assert (
            main(
                [
                    "msmarco",
                    "--model",
                    base,
                    "--data",
                    folder,
                    "--output",
                    f"{out}-{kind}",
                    *flags,
                    "--distill",
                    kind,
                ]
            )
            == 0
        )
        losses[kind] = [line["loss"] for line in metrics(f"{out}-{kind}")]
        assert load_bias_set(f"{out}-{kind}/biases.safetensors").header["brackets"] is True
        assert BiEncoder.from_pretrained(f"{out}-{kind}").text.brackets
    assert np.all(np.isfinite(list(losses.values())))
    assert losses["kl"][0] != losses["margin"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--lr 0", "--lr must be positive"),
        ("--dtype float16", "dtype must be 'float32' or 'bfloat16'"),
        ("--epochs inf", "--epochs must be positive and finite, not inf"),
        ("--distill margin --distill-weight nan", "--distill-weight must be 0 or more and finite, not nan"),
        ("--distill margin --near nan", "--near must be a number, not nan"),
        ("--patience 2", "--patience is about evaluations, which need --dev"),
        ("--eval-every 2", "--eval-every is about evaluations, which need --dev"),
        ("--keep-best 2", "--keep-best is about evaluations, which need --dev"),
        ("--dev-split test", "--dev-split is for a folder in BEIR's format as --dev"),
        ("--split validation", "--split is for data sets of TFDS and of the hub"),
        ("--distill-weight 2", "--distill-weight is for --distill"),
        ("--trainable=", "--trainable is needed"),
        (f"--seed {2**63}", f"--seed must be below {2**63}"),
        ("--epochs 1e308", "a run has fewer than 2,147,483,648 steps"),
        ("--wandb project", "--wandb needs the package wandb"),
        ("--trainable lora|bias", "adapters are made by lora, and by lora,bias"),
        ("--distill mse", "distill"),
        ("--distill kl --steps 1", "no `scores`"),
        ("--distill kl --near 1 --negatives 0", "no example has a hard negative, whose score --distill kl"),
        ("--matryoshka 8,64 --steps 1", "--matryoshka"),
        ("--pooling median", "pooling"),
        ("--mesh data=3", "mesh"),
        ("--dev nowhere.csv", "nowhere.csv"),
        ("--max-seq-length 1000", "positions"),
        ("--batch-size 31", "30 examples do not fill a batch of 31"),
    ],
)
def test_refused_options(options, message, base, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(arguments(base, pairs, tmp_path / "out", *options.split())) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wandb_that_does_not_begin(base, pairs, tmp_path, capsys, monkeypatch):
    """Its reason is said, and the next start needs no other folder."""

    def refuse(**_):
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    run = arguments(base, pairs, tmp_path / "out", "--steps", 2)
    assert main([*run, "--wandb", "herons"]) == 1
    assert capsys.readouterr().err.endswith("error: --wandb herons: api_key not configured\n")
    assert main(run) == 0


def test_paths_in_place_of_text(base, pairs, tmp_path):
    """As options of `train.run`; while it runs, no other run takes its folder."""
    config = dataclasses.replace(
        train.PAIRS,
        model=Path(base),
        data=Path(pairs),
        output=tmp_path / "out",
        steps=2,
        batch_size=8,
        max_seq_length=40,
    )

    class Second(train.Callback):
        def on_step(self, step, *_):
            with pytest.raises(InputError, match="another process is writing this run"):
                train.run(dataclasses.replace(config, resume=True))

    assert train.run(config, [Second()])
    noted = json.loads((tmp_path / "out/config.json").read_text())["run"]
    assert (noted["model"], noted["data"]) == (base, pairs)


def test_another_run_is_not_resumed(base, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(base, pairs, out, "--steps", 2)) == 0
    assert main(arguments(base, pairs, out, "--steps", 2)) == 1
    assert "holds a run" in capsys.readouterr().err
    assert main(arguments(base, pairs, out, "--steps", 3, "--resume")) == 1
    assert "steps 2, now 3" in capsys.readouterr().err
    assert (
        main(arguments(base, pairs, out, "--steps", 2, "--resume", "--save-every", 7)) == 0
    )  # complete already
    assert len(metrics(out)) == 2


def test_help_has_every_option(capsys):
    for recipe in ("nli", "msmarco", "pairs", "adapt", "mine"):
        with pytest.raises(SystemExit) as stop:
            main([recipe, "--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "default: None" not in text
        assert ("--margin" in text) == (recipe in ("msmarco", "mine"))
        assert ("--split" in text) == (recipe in ("nli", "pairs", "mine"))
        for value in {"nli": ["1024", "0.00032"], "msmarco": ["256", "0.0004", "1000"]}.get(recipe, []):
            assert f"(default: {value})" in text
