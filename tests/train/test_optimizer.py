"""What trains, the schedule, and AdamW step by step."""

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sgpt_jax.checkpoint.bias_sets import add_zero_biases, bias_leaves
from sgpt_jax.decoder.model import split
from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError
from sgpt_jax.load import load_decoder
from train.optimizer import (
    describe_split,
    join_params,
    linear_schedule,
    make_optimizer,
    split_params,
    trainable_mask,
)


def load(variant, folder, **options):
    return load_decoder(decoders.write_checkpoint(variant, folder), **options)


def trained_names(params, rule):
    mask = trainable_mask(params, rule)
    return {leaf_path(path) for path, trains in jax.tree_util.tree_leaves_with_path(mask) if trains}


def test_bias_rule_is_the_repositorys(tmp_path):
    """Every name with "bias" in it, but for the language-model head's, which GPT-J has."""
    _, params = split(load("gptj", tmp_path))
    assert "bias" in params["head"]
    names = trained_names(params, "bias")
    assert names == {
        name.replace("{i}", str(i))
        for i in range(decoders.config("gptj")["n_layer"])
        for name in (
            "blocks/{i}/norm1/bias",
            "blocks/{i}/mlp/up/bias",
            "blocks/{i}/mlp/down/bias",
            "final_norm/bias",
        )
    }


def test_all_and_patterns(tmp_path):
    _, params = split(load("gptj", tmp_path))
    everything = {leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert trained_names(params, "all") == {name for name in everything if not name.startswith("head/")}
    assert trained_names(params, r"norm.*scale|blocks/0/attn/q") == {
        name for name in everything if name.endswith("scale") or name == "blocks/0/attn/q/kernel"
    }


def test_nothing_to_train_names_the_ways_out(tmp_path):
    decoder = load("llama", tmp_path)
    with pytest.raises(InputError, match=r"(?s)--add-biases.*--trainable all"):
        trainable_mask(split(decoder)[1], "bias")
    names = trained_names(split(add_zero_biases(decoder))[1], "bias")
    assert {name.split("/", 2)[2] for name in names} == {
        *(f"attn/{part}/bias" for part in "qkvo"), *(f"mlp/{part}/bias" for part in ("up", "gate", "down")),
    }  # fmt: skip
    for rule in ("no_such_leaf", "(", "head/"):
        with pytest.raises(InputError, match="--trainable"):
            trainable_mask(split(decoder)[1], rule)


def test_split_and_join(tmp_path):
    _, params = split(load("gpt_neo", tmp_path, dtype="bfloat16"))
    trainable, frozen = split_params(params, trainable_mask(params, "bias"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trainable))
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params))
    joined = join_params(trainable, frozen, jnp.bfloat16)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    for one, other in zip(*map(jax.tree.leaves, (joined, params)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    count = sum(leaf.size for leaf in bias_leaves(params).values())
    assert f"training {count:,} of" in describe_split(trainable, frozen)


def test_moments_exist_for_what_trains_alone(tmp_path):
    _, params = split(load("gpt_neo", tmp_path))
    mask = trainable_mask(params, "bias")
    trainable, _ = split_params(params, mask)
    state = make_optimizer(mask, lambda _: 0.1).init(trainable)
    sizes = sum(np.size(leaf) for leaf in jax.tree.leaves(state))
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert 2 * trained <= sizes <= 2 * trained + 4  # two moments, and counters


@pytest.mark.parametrize(("warmup", "total"), [(0, 3), (1, 3), (4, 10), (10, 10)])
def test_schedule_is_transformers(warmup, total):
    def reference(step):
        if step < warmup:
            return step / max(1, warmup)
        return max(0.0, (total - step) / max(1, total - warmup))

    rate = linear_schedule(0.02, warmup, total)
    for step in range(total + 2):
        assert float(rate(step)) == pytest.approx(0.02 * reference(step), abs=1e-8)
        assert float(jax.jit(rate)(step)) == pytest.approx(0.02 * reference(step), abs=1e-8)


def test_adamw_by_hand():
    """Clipping over what trains, moments with bias correction, decay on kernels and embeddings alone."""
    draw = np.random.default_rng(0)
    params = {
        "blocks": {0: {"attn": {"q": {"kernel": draw.normal(size=(3, 2)), "bias": draw.normal(size=2)}}}},
        "final_norm": {"scale": draw.normal(size=3)},
        "embed": {"tokens": {"embedding": draw.normal(size=(4, 3))}},
        "head": {"kernel": draw.normal(size=(3, 4))},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    mask = trainable_mask(params, "all")
    trainable, _ = split_params(params, mask)
    rate = linear_schedule(0.1, 1, 4)
    optimizer = make_optimizer(mask, rate)
    state = optimizer.init(trainable)
    values = {leaf_path(p): np.float64(x) for p, x in jax.tree_util.tree_leaves_with_path(trainable)}
    m, v = (dict.fromkeys(values, 0.0) for _ in range(2))
    for step in range(4):
        gradient = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        g = {leaf_path(p): np.float64(x) for p, x in jax.tree_util.tree_leaves_with_path(gradient)}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        assert norm > 1
        for name in values:
            clipped = g[name] / norm
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.999 * v[name] + 0.001 * clipped**2
            move = m[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[name] / (1 - 0.999 ** (step + 1))) + 1e-6)
            decay = 0.01 if name.endswith(("kernel", "embedding")) else 0.0
            values[name] = values[name] - float(rate(step)) * (move + decay * values[name])
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        np.testing.assert_allclose(leaf, values[leaf_path(path)], atol=1e-5)
    assert "head/kernel" not in values
