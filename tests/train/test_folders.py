"""Training folders whose vectors are more than pooled hidden states: Dense modules, prompts left out of the pooling."""

import json
import warnings

import numpy as np
import pytest
from folders import write_folder
from safetensors.numpy import load_file
from training import data

from sgpt_jax.bi_encoder import BiEncoder
from train.__main__ import main
from train.data import read_pairs


def loss_of(model, examples):
    """The contrastive loss of one batch, from the vectors that the bi-encoder gives."""
    queries = model.encode_query([e.query for e in examples], truncate_dim=None)
    texts = [e.positive for e in examples] + [text for e in examples for text in e.negatives]
    documents = model.encode_document(texts)
    queries, documents = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, documents))
    logits = 20.0 * queries @ documents.T
    logits -= logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(logits).sum(axis=1)) - np.diagonal(logits)).mean())


@pytest.mark.parametrize(
    ("name", "chunk"), [("gritlm", 2), ("embeddinggemma", 0), ("dense_chain", 2), ("pooling_all", 0)]
)
def test_the_loss_is_that_of_the_vectors(name, chunk, tmp_path):
    """Of the folder before the first step, and of what the run leaves after the last."""
    source, out = write_folder(name, tmp_path / "base"), tmp_path / "out"
    examples = read_pairs(data(1))[:8]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = BiEncoder.from_pretrained(
            source, max_seq_length=75, truncate_dim=24 if name == "dense_chain" else None
        )
        arguments = (
            f"pairs --model {source} --data {data(1)} --output {out} --batch-size 8 --chunk-size {chunk}"
        )
        arguments += " --max-seq-length 75 --lr 1e-2 --warmup-steps 0 --steps 6 --no-shuffle --add-biases"
        if name == "dense_chain":  # the loss sees what the folder says to leave out
            arguments += " --matryoshka 24"
        if name == "embeddinggemma":  # transformers has no Gemma with biases
            arguments = arguments.replace("--add-biases", "--trainable all")
        assert main(arguments.split()) == 0
        after = BiEncoder.from_pretrained(out)
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses[0], loss_of(before, examples), rtol=2e-5)
    assert losses[-1] < 0.8 * losses[0]
    assert (after.include_prompt, after.text.prompts) == (before.include_prompt, before.text.prompts)
    for file in source.glob("*_Dense/model.safetensors"):
        kept = load_file(out / file.relative_to(source))
        for key, values in load_file(file).items():
            np.testing.assert_array_equal(kept[key], values)
