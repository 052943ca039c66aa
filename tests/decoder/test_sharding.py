"""The mesh: parsing, placement, and the same numbers on eight devices as on one."""

import json

import decoders
import jax
import pytest
from devices import run_on_eight

from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import compute_dtype
from sgpt_jax.decoder.model import abstract_decoder
from sgpt_jax.decoder.sharding import AXES, make_mesh, param_shardings
from sgpt_jax.errors import InputError
from sgpt_jax.families import read_config


def test_mesh_specs():
    one = jax.devices()[:1]
    assert make_mesh(None, one).shape == {"data": 1, "fsdp": 1, "tensor": 1}
    assert make_mesh("data=-1", one).axis_names == AXES


@pytest.mark.parametrize("spec", ["data=2", "rows=1", "data", "data=0", "data=-1,fsdp=-1", "tensor=x"])
def test_bad_meshes_are_refused(spec):
    with pytest.raises(InputError, match="mesh"):
        make_mesh(spec, jax.devices()[:1])


@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_every_leaf_has_a_place(variant):
    config = read_config(decoders.config(variant))
    _, params = abstract_decoder(config, Build(compute_dtype("float32")))
    shardings = param_shardings(params, config, make_mesh(None, jax.devices()[:1]))
    assert len(jax.tree.leaves(shardings)) == len(jax.tree.leaves(params))


def test_eight_devices_give_the_same_vectors_and_logits(tmp_path):
    code = """
        import json, sys
        import numpy as np, jax
        import decoders
        import sgpt_jax as sgpt
        from sgpt_jax.decoder.model import merge, split
        texts = ["", "a heron", "the ferry crosses the bay twice a day"] * 5
        ids = np.array([[5, 6, 7, 8]] * 8)

        def all_logits(decoder):
            structure, params = split(decoder)
            def run(params):
                decoder = merge(structure, params)
                return decoder.logits(decoder(ids, np.ones_like(ids)))
            return np.asarray(jax.jit(run)(params))

        results = {}
        for variant in ("gptj", "bloom_six_heads", "qwen3"):
            folder = decoders.write_tokenizer(decoders.write_checkpoint(variant, f"{sys.argv[1]}/{variant}"))
            plain = sgpt.BiEncoder.from_pretrained(folder, brackets=True)
            expected = plain.encode_query(texts)
            logits = all_logits(plain.decoder)
            for spec in (None, "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"):
                mesh = sgpt.make_mesh(spec)
                model = sgpt.BiEncoder.from_pretrained(folder, brackets=True, mesh=mesh)
                error = np.abs(model.encode_query(texts) - expected).max() / np.abs(expected).max()
                ours = all_logits(model.decoder)
                results[f"{variant} {spec}"] = [
                    float(error), float(np.abs(ours - logits).max() / np.abs(logits).max()),
                    len(model.decoder.embed.tokens.embedding[...].addressable_shards),
                ]
        print(json.dumps(results))
    """
    results = json.loads(run_on_eight(code, tmp_path).stdout.splitlines()[-1])
    assert len(results) == 12
    for name, (vectors, logits, shards) in results.items():
        assert vectors < 1e-5 and logits < 1e-5, name
        assert shards == 8, name


def test_heads_that_do_not_divide_stay_whole_with_a_message(tmp_path):
    code = """
        import logging, sys
        logging.basicConfig()
        import decoders, sgpt_jax as sgpt
        folder = decoders.write_checkpoint("bloom_six_heads", sys.argv[1])
        decoder = sgpt.load_decoder(folder, mesh=sgpt.make_mesh("data=2,tensor=4"))
        block = decoder.blocks[0]
        print(*(tuple(leaf.kernel[...].sharding.spec) for leaf in (block.attn.q, block.mlp.up)))
    """
    done = run_on_eight(code, tmp_path)
    assert "('fsdp', None) ('fsdp', 'tensor')" in done.stdout
    assert "replicated, as they do not divide" in done.stderr and "heads (6 over 4)" in done.stderr


def test_shards_hold_their_part_only():
    code = """
        import jax, numpy as np
        from sgpt_jax.decoder.config import DecoderConfig, RotaryConfig, compute_dtype
        from sgpt_jax.decoder.build import Build
        from sgpt_jax.decoder.model import abstract_decoder
        from sgpt_jax.decoder.sharding import make_mesh, param_shardings
        config = DecoderConfig(vocab_size=64, embed_dim=32, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=4,
                               mlp_dim=64, max_positions=8, rotary=RotaryConfig(dim=4), head="untied")
        _, params = abstract_decoder(config, Build(compute_dtype("float32")))
        shardings = param_shardings(params, config, make_mesh("fsdp=4,tensor=2"))
        shapes = jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), params, shardings)
        block = shapes["blocks"][0]
        print(shapes["embed"]["tokens"]["embedding"], block["attn"]["q"]["kernel"], block["mlp"]["down"]["kernel"],
              shapes["head"]["kernel"])
    """
    assert run_on_eight(code).stdout.strip() == "(32, 8) (8, 16) (32, 8) (8, 32)"
