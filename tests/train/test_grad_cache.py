"""GradCache equals the plain step; packed rows equal texts by themselves."""

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sgpt_jax.checkpoint.bias_sets import bias_leaves
from sgpt_jax.decoder.batch import Batch
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import DecoderConfig, RotaryConfig
from sgpt_jax.decoder.model import Decoder, merge, split
from sgpt_jax.decoder.pooling import POOLING_MODES, pool
from sgpt_jax.load import load_decoder
from sgpt_jax.packing.rows import encode_rows, most_texts
from train.batches import pack, row_length
from train.grad_cache import encode_in_chunks
from train.losses import LossConfig
from train.optimizer import linear_schedule, make_optimizer, split_params, trainable_mask
from train.step import init_state, make_step, pad_rows

LENGTH = 24


def texts(count, longest=LENGTH, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 300, draw.integers(1, longest + 1)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def dropped():
    """A decoder with dropout in every place that has one."""
    config = DecoderConfig(
        vocab_size=300, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
        max_positions=LENGTH, positions="learned", qkv_bias=True, attn_out_bias=True, mlp_bias=True,
        embed_dropout=0.1, attn_dropout=0.2, residual_dropout=0.1,
    )  # fmt: skip
    return split(Decoder(config, Build(jnp.dtype("float32"), rngs=nnx.Rngs(0))))


def make_batch(size=7, negatives=2):
    count = size * (2 + negatives)
    rows, vectors = pack(texts(count), LENGTH, 0)
    ids = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    return {
        "rows": rows,
        "skip": np.zeros((len(rows.segments), most_texts(LENGTH)), np.int32),
        "indices": (vectors[:size], vectors[size : 2 * size], vectors[2 * size :].reshape(size, negatives)),
        "ids": (ids[:size], ids[size : 2 * size], ids[2 * size :].reshape(size, negatives, 2)),
        "negative_mask": np.ones((size, negatives), bool),
        "order": np.arange(size, dtype=np.int32),
        "scores": np.zeros((size, 1 + negatives), np.float32),
    }


def run_step(structure, params, batch, chunk, dropout, rate=1e-2):
    mask = trainable_mask(params, "bias")
    trainable, frozen = split_params(params, mask)
    optimizer = make_optimizer(mask, linear_schedule(rate, 0, 10))
    step = jax.jit(
        make_step(
            structure,
            pooling="weightedmean",
            loss=LossConfig(),
            optimizer=optimizer,
            dtype=jnp.float32,
            chunk_rows=chunk,
            dropout=dropout,
        )
    )
    state, values = init_state(trainable, optimizer, 0, None), []
    for _ in range(2):
        state, loss, norm = step(state, frozen, batch)
        values += [float(loss), float(norm)]
    # Key biases apart: without rotary positions their gradient is exactly zero, and Adam makes steps of its rounding.
    return values, [leaf for name, leaf in bias_leaves(state.trainable).items() if "/k/" not in name]


@pytest.mark.parametrize("dropout", [False, True])
def test_every_chunk_size_gives_the_plain_step(dropped, dropout):
    batch = make_batch()
    rows = len(batch["rows"].segments)
    values, biases = run_step(*dropped, batch, 0, dropout)
    for chunk in (1, 3, rows - 1, rows + 3):
        other_values, other_biases = run_step(*dropped, batch, chunk, dropout)
        np.testing.assert_allclose(other_values, values, rtol=1e-5)
        for one, other in zip(biases, other_biases, strict=True):
            np.testing.assert_allclose(other, one, atol=1e-5)


def test_dropout_changes_the_loss_and_every_step_has_its_own(dropped):
    batch = make_batch()
    without, with_noise = (run_step(*dropped, batch, 3, dropout)[0] for dropout in (False, True))
    assert abs(without[0] - with_noise[0]) > 1e-3
    still = run_step(*dropped, batch, 3, True, rate=0.0)[0]  # nothing moves: only the noise can differ
    assert still[0] == with_noise[0] != still[2]


def test_chunks_keep_the_order_of_rows():
    rows = {"x": jnp.arange(10.0)}
    for chunk in range(12):
        result = encode_in_chunks(lambda factor, part: factor * part["x"], 2.0, rows, chunk)
        np.testing.assert_array_equal(result, 2 * np.arange(10))
    with pytest.raises(ValueError, match="negative"):
        encode_in_chunks(lambda factor, part: part["x"], 2.0, rows, -1)


def test_a_thousand_examples_fit_where_64_do():
    """Temporary memory of the compiled step, texts of 75 tokens each in a row of its own: the worst there is."""
    config = DecoderConfig(
        vocab_size=64, embed_dim=48, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=12, mlp_dim=96,
        max_positions=None, rotary=RotaryConfig(dim=12), qkv_bias=True, attn_out_bias=True, mlp_bias=True,
    )  # fmt: skip
    structure, params = split(Decoder(config, Build(jnp.dtype("float32"), rngs=nnx.Rngs(0))))
    mask = trainable_mask(params, "bias")
    trainable, frozen = split_params(params, mask)
    optimizer = make_optimizer(mask, lambda _: 1e-3)
    state = init_state(trainable, optimizer, 0, None)

    def temporary(size, chunk):
        shape = jax.ShapeDtypeStruct
        tokens = shape((3 * size, 75), jnp.int32)
        batch = {
            "rows": Batch(tokens, tokens, tokens),
            "skip": shape((3 * size, most_texts(75)), jnp.int32),
            "indices": (shape((size,), jnp.int32), shape((size,), jnp.int32), shape((size, 1), jnp.int32)),
            "ids": tuple(shape((size, *more, 2), jnp.int32) for more in ((), (), (1,))),
            "negative_mask": shape((size, 1), bool),
            "order": shape((size,), jnp.int32),
            "scores": shape((size, 2), jnp.float32),
        }
        step = make_step(
            structure,
            pooling="weightedmean",
            loss=LossConfig(),
            optimizer=optimizer,
            dtype=jnp.float32,
            chunk_rows=chunk,
            dropout=False,
        )
        return jax.jit(step).lower(state, frozen, batch).compile().memory_analysis().temp_size_in_bytes

    plain, cached = temporary(64, 0), temporary(1024, 64)
    assert cached < plain


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neo", "bloom", "llama"])
def test_packed_texts_have_the_vectors_they_have_alone(variant, tmp_path):
    """Learned positions, windows, ALiBi and rotary positions: none sees its neighbours in the row."""
    structure, params = split(load_decoder(decoders.write_checkpoint(variant, tmp_path)))
    ids = texts(30)
    rows, vectors = pack(ids, LENGTH, 0)
    rows = pad_rows(rows, len(rows.segments) + 2, 5)
    alone, mask = np.zeros((8, LENGTH), np.int32), np.zeros((8, LENGTH), np.int32)
    for row, text in enumerate(ids[:8]):
        alone[row, : len(text)], mask[row, : len(text)] = text, 1
    hidden = jax.jit(lambda params: merge(structure, params)(alone, mask))(params)
    for mode in POOLING_MODES if variant == "gpt2" else ("weightedmean",):
        packed = jax.jit(encode_rows, static_argnums=(0, 3, 4))(
            structure, params, rows, mode, most_texts(LENGTH)
        )
        packed = np.asarray(packed).reshape(-1, packed.shape[-1])[vectors]
        expected = np.asarray(pool(hidden, mask, mode))
        np.testing.assert_allclose(packed[:8], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_packing_is_tight_and_complete():
    ids = texts(200, longest=12)
    rows, vectors = pack(ids, LENGTH, 0)
    room = most_texts(LENGTH)
    assert len(set(vectors.tolist())) == len(ids)
    for text, index in zip(ids, vectors, strict=True):
        row, segment = index // room, index % room + 1
        where = rows.segments[row] == segment
        assert rows.input_ids[row][where].tolist() == text
        assert rows.positions[row][where].tolist() == list(range(len(text)))
    total = sum(map(len, ids))
    assert (rows.segments > 0).sum() == total
    # a few per cent above what is needed at the least, by tokens or by texts a row
    assert len(rows.segments) <= 1 + 1.1 * max(total / LENGTH, len(ids) / room)


@pytest.mark.parametrize(
    ("platform", "lengths"), [("cpu", [76, 300, 1024, 2000]), ("gpu", [80, 304, 1024, 2000])]
)
def test_few_shapes(platform, lengths, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    limits = ((10, 75), (300, 300), (600, 2048), (1900, 2000))
    assert [row_length(longest, limit) for longest, limit in limits] == lengths
