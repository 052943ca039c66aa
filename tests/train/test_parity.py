"""Three steps of bias-only training against torch (tests/fixtures/training/make.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from training import check_parameters, data, expected, write_model

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import load_bias_set
from sgpt_jax.checkpoint.export import export_tensors
from sgpt_jax.decoder.model import merge, split
from train.__main__ import main
from train.batches import BatchPlan, PackedBatches
from train.data import ListExamples, read_pairs
from train.losses import LossConfig
from train.optimizer import (
    join_params,
    linear_schedule,
    make_optimizer,
    split_params,
    trainable_mask,
)
from train.step import init_state, jit_step, make_step, place_batch

# name: variant, hard negatives, brackets, warm-up steps
RUNS = {
    "gpt_neo": ("gpt_neo", 1, False, 1),
    "gptj": ("gptj", 1, False, 1),
    "gpt2": ("gpt2", 1, False, 1),
    "llama_biases": ("llama_biases", 1, False, 1),
    "gpt_neo_no_warmup": ("gpt_neo", 1, False, 0),
    "gpt_neo_two_negatives": ("gpt_neo", 2, False, 1),
    "gpt_neo_brackets": ("gpt_neo", 1, True, 1),
}


@pytest.mark.parametrize("run", RUNS)
def test_three_steps(run, tmp_path):
    variant, negatives, brackets, warmup = RUNS[run]
    wanted = expected(run)
    model = BiEncoder.from_pretrained(
        write_model(variant, tmp_path), brackets=brackets, max_seq_length=75, pooling="weightedmean"
    )
    structure, params = split(model.decoder)
    before = dict(export_tensors(model.decoder, model.hf_config))
    mask = trainable_mask(params, "bias")
    trainable, frozen = split_params(params, mask)
    rate = linear_schedule(1e-2, warmup, 3)
    optimizer = make_optimizer(mask, rate)
    plan = BatchPlan(ListExamples(read_pairs(data(negatives))), 8, seed=0, shuffle=False, no_duplicates=False)
    batches = PackedBatches(plan, model.text, vocab_size=384, symmetric=False, steps=3)
    # Rows of 75 tokens hold several texts each, and two rows go at a time: packing and GradCache change nothing.
    step = make_step(
        structure,
        pooling="weightedmean",
        loss=LossConfig(),
        optimizer=optimizer,
        dtype=jnp.float32,
        chunk_rows=2,
        dropout=False,
    )
    state = init_state(trainable, optimizer, 0, None)
    run_step = jit_step(step, structure, state, None)
    losses, norms = [], []
    for number in range(3):
        batch = batches[number]
        rows = len(batch["rows"].segments)
        assert rows > 2
        arrays = place_batch(batch, rows=rows, chunk_rows=2, pad_id=0, mesh=None)
        state, loss, norm = run_step(state, frozen, arrays)
        losses.append(float(loss))
        norms.append(float(norm))
    np.testing.assert_allclose(losses, wanted["losses"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norms, wanted["norms"], rtol=1e-4)
    np.testing.assert_allclose([float(rate(s)) for s in range(3)], wanted["rates"], rtol=1e-6)
    decoder = merge(structure, join_params(state.trainable, frozen, jnp.float32))
    check_parameters(dict(export_tensors(decoder, model.hf_config)), before, wanted)


def test_the_command(tmp_path):
    """The same from the command line, and what it leaves behind."""
    source, out = write_model("gpt_neo", tmp_path / "base"), tmp_path / "out"
    code = main(
        f"pairs --model {source} --data {data(1)} --output {out} --batch-size 8 --chunk-size 8 --max-seq-length 75 "
        "--lr 1e-2 --warmup-steps 1 --steps 3 --no-shuffle --trainable bias".split()
    )
    assert code == 0
    wanted = expected("gpt_neo")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line.keys() for line in lines] == [{"step", "loss", "lr"}] * 3
    np.testing.assert_allclose([line["loss"] for line in lines], wanted["losses"], atol=1e-5)
    np.testing.assert_allclose([line["lr"] for line in lines], wanted["rates"], rtol=1e-6)
    tensors, before = load_file(out / "model.safetensors"), load_file(f"{source}/model.safetensors")
    assert tensors.keys() == before.keys()
    check_parameters(tensors, before, wanted)

    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "gpt_neo"
    assert config["run"]["lr"] == 0.01
    assert config["run"]["scale"] == 20
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").iterdir())
    card = (out / "README.md").read_text()
    assert "8 examples" in card
    assert "weightedmean" in card

    biases = load_bias_set(out / "biases.safetensors")
    assert biases.header["base_model"] == "base"
    assert biases.header["training"]["steps"] == 3
    assert len(biases.values) == len([name for name in wanted if name.startswith("after/")])
    texts = ["how do herons hunt", "a café"]
    saved = BiEncoder.from_pretrained(out)
    applied = BiEncoder.from_pretrained(source, biases=out / "biases.safetensors")
    assert (saved.pooling, saved.text.max_seq_length) == ("weightedmean", 75)
    np.testing.assert_array_equal(saved.encode(texts), applied.encode(texts))
    base = BiEncoder.from_pretrained(source)
    assert np.abs(base.encode(texts) - saved.encode(texts)).max() > 0.01
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(split(saved.decoder)[1]))
