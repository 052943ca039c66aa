"""Decoders taken apart and put together: all families, and what a structure tells from another."""

import dataclasses

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import load
from flax import nnx
from plans import TINY

from sgpt_jax.decoder.build import Build, Lora
from sgpt_jax.decoder.model import Decoder, merge, split

FLOAT32 = Build(jnp.dtype("float32"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_a_decoder_taken_apart_is_nnx_state_and_comes_together_again(variant, tmp_path):
    decoder = load(decoders.write_checkpoint(variant, tmp_path))
    structure, params = split(decoder)
    expected = nnx.to_pure_dict(nnx.split(decoder)[1])
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(params), jax.tree.leaves(expected)))
    again = merge(structure, params)
    assert nnx.split(again)[0] == nnx.split(decoder)[0]
    assert split(again)[0] is structure
    ids = np.arange(6)[None]
    np.testing.assert_array_equal(again(ids, np.ones_like(ids)), decoder(ids, np.ones_like(ids)))


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "relu"},
        {"norm_eps": 1e-3},
        {"windows": (None, 8, None)},
        {"attn_scale": 0.5},
        {"bidirectional": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_decoders_with_equal_weights_that_compute_something_else_differ_in_structure(changes):
    ours, other = (split(Decoder(config, FLOAT32)) for config in (TINY, dataclasses.replace(TINY, **changes)))
    assert jax.tree.structure(ours[1]) == jax.tree.structure(other[1])
    assert ours[0] != other[0]


def test_decoders_with_other_builds_differ_in_structure():
    builds = [
        FLOAT32,
        dataclasses.replace(FLOAT32, dtype=jnp.dtype("bfloat16")),
        dataclasses.replace(FLOAT32, int8=True),
        dataclasses.replace(FLOAT32, lora=Lora(4, 8.0, ("q",))),
        dataclasses.replace(FLOAT32, lora=Lora(4, 16.0, ("q",))),
    ]
    assert len({split(Decoder(TINY, build))[0] for build in builds}) == len(builds)
    assert split(Decoder(TINY, FLOAT32))[0] is split(Decoder(TINY, FLOAT32))[0]


def test_a_weight_that_was_changed_in_place_is_what_the_next_split_has():
    decoder = Decoder(TINY, FLOAT32)
    split(decoder)
    kernel = jnp.zeros_like(decoder.blocks[1].mlp.up.kernel[...])
    decoder.blocks[1].mlp.up.kernel[...] = kernel
    assert not split(decoder)[1]["blocks"][1]["mlp"]["up"]["kernel"].any()
    decoder.blocks[1].mlp.activation = "relu"
    assert split(decoder)[0] != split(Decoder(TINY, FLOAT32))[0]


def test_a_block_that_computes_something_else_differs_in_structure():
    """So that a block is not run as another that was traced before it."""
    alike, scaled = (
        Decoder(dataclasses.replace(TINY, scale_by_layer=each), FLOAT32).blocks for each in (False, True)
    )
    assert jax.tree.structure(alike[0]) == jax.tree.structure(alike[1])
    assert jax.tree.structure(scaled[0]) != jax.tree.structure(scaled[1])


def test_parameters_of_another_structure_are_refused():
    structure, params = split(Decoder(TINY, FLOAT32))
    kernel = params["blocks"][0]["mlp"]["up"].pop("kernel")
    for wrong in (None, {"x": kernel}):
        params["blocks"][0]["mlp"]["up"]["kernel"] = wrong
        with pytest.raises(ValueError, match="another structure"):
            merge(structure, params)
