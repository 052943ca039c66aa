"""int8 weights: the rounding, what a decoder computes with them, loading, export, bias sets, refusals."""

import json
import subprocess
import sys
import textwrap
import warnings

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import hidden_states, relative_error
from devices import run_on_eight
from etils import epath
from safetensors.numpy import load_file, save_file

import sgpt_jax as sgpt
from sgpt_jax.checkpoint.bias_sets import BiasSet, bias_leaves, load_bias_set, save_bias_set
from sgpt_jax.checkpoint.export import count_parameters, export_folder
from sgpt_jax.checkpoint.fingerprint import weights_sha256
from sgpt_jax.checkpoint.quantise import quantise
from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import checkpoint_sha256, load_checkpoint
from sgpt_jax.cli.parser import main
from sgpt_jax.decoder.model import merge, split
from sgpt_jax.errors import InputError

TEXTS = ["", "a heron", "the ferry crosses the bay", "people stay at night"]


def load(folder, dtype="float32", **options):
    return load_checkpoint(open_checkpoint(epath.Path(folder)), dtype, **options)


def both(variant, folder, dtype="float32"):
    """(the decoder in int8, its dequantised copy)"""
    source = decoders.write_checkpoint(variant, folder / "model")
    int8 = load(source, dtype, weights="int8")
    export_folder(int8, decoders.config(variant), folder / "copy")
    return int8, load(folder / "copy", dtype)


@pytest.mark.parametrize("axis", [0, 1])
def test_rounding_is_to_the_nearest_step_of_each_channel(axis):
    values = np.random.default_rng(0).normal(size=(50, 33)).astype(np.float32) * np.logspace(-6, 2, 33)
    values[:, 3] = 0
    leaf = "a/embedding" if axis == 0 else "a/kernel"
    q, scale = quantise(leaf, values.astype(np.float32))
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (values.shape[axis],)
    steps = np.expand_dims(scale, 1 - axis)
    assert np.all(np.abs(q * steps - values) <= 0.5001 * steps)
    largest = np.abs(values).max(axis=1 - axis)
    assert np.all(np.abs(q).max(axis=1 - axis)[largest > 0] == 127)
    np.testing.assert_array_equal(scale[largest == 0], 1)


def test_scales_are_no_parameters(tmp_path):
    counts = [count_parameters(split(decoder)[1]) for decoder in both("gpt2", tmp_path)]
    assert counts[0] == counts[1] and counts[0]["scale"] > 0  # of the norms


@pytest.mark.parametrize("variant", (*decoders.VARIANTS, *decoders.SUPPORTED_NEW_VARIANTS))
def test_every_family_computes_what_its_dequantised_copy_does(variant, tmp_path):
    int8, copy = both(variant, tmp_path)
    leaves = jax.tree.leaves(split(int8)[1])
    matrices = [leaf for leaf in leaves if leaf.dtype == jnp.int8]
    assert {leaf.ndim for leaf in matrices} == {2} and {leaf.dtype.name for leaf in leaves} == {
        "int8",
        "float32",
    }
    wanted = decoders.expected(variant)
    ids, mask = wanted["input_ids"], wanted["attention_mask"]
    ours, theirs = (hidden_states(decoder, ids, mask) for decoder in (int8, copy))
    valid = mask.astype(bool)
    assert relative_error(ours[valid], theirs[valid]) < 1e-5
    if int8.config.head != "none":
        logits = [np.asarray(decoder.logits(hidden)) for decoder, hidden in ((int8, ours), (copy, theirs))]
        assert relative_error(*(each[valid] for each in logits)) < 2e-5
    # int8 is another model, but not a wholly other one.
    cosine = (
        np.sum(ours * wanted["hidden"], -1)[valid]
        / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(wanted["hidden"], axis=-1))[valid]
    )
    assert 1e-7 < 1 - cosine.mean() < 0.02


def test_gradients_are_those_over_the_dequantised_copy(tmp_path):
    """Of every bias and norm, and of the embedding's output; none reaches the int8 weights."""
    int8, copy = both("gptj", tmp_path)
    ids = np.random.default_rng(0).integers(0, 300, (2, 9))
    target = np.random.default_rng(1).normal(size=(2, 9, int8.config.embed_dim)).astype(np.float32)

    def gradients(decoder):
        structure, params = split(decoder)
        trained = lambda leaf: leaf.ndim == 1 and leaf.dtype == jnp.float32  # noqa: E731
        frozen = {
            name for name, leaf in _named(params).items() if not trained(leaf) or name.endswith("kernel")
        }

        def loss(ours):
            full = jax.tree_util.tree_map_with_path(
                lambda path, leaf: ours.get(sgpt_name(path), leaf), params
            )
            return jnp.sum((merge(structure, full)(ids, np.ones_like(ids)) - target) ** 2)

        ours = {name: leaf for name, leaf in _named(params).items() if name not in frozen}
        return jax.grad(loss)(ours)

    found, wanted = gradients(int8), gradients(copy)
    scales = found.keys() - wanted.keys()
    assert scales and all(name.endswith("/scale") for name in scales)
    for name, gradient in wanted.items():
        if np.abs(gradient).max() > 1e-6:
            assert relative_error(np.asarray(found[name]), np.asarray(gradient)) < 1e-5, name


def sgpt_name(path):
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)


def _named(params):
    return {sgpt_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_bfloat16(tmp_path):
    int8, copy = both("llama", tmp_path, "bfloat16")
    ids = np.random.default_rng(0).integers(0, 300, (2, 9))
    ours, theirs = (hidden_states(decoder, ids, np.ones_like(ids)) for decoder in (int8, copy))
    assert relative_error(ours, theirs) < 0.05
    assert int8.dtype == jnp.bfloat16


def test_eight_devices(tmp_path):
    code = """
        import json, sys
        import numpy as np
        import decoders
        import sgpt_jax as sgpt
        texts = ["", "a heron", "the ferry crosses the bay", "people stay at night"] * 2
        pairs = [("night market", text) for text in texts]
        folder = decoders.write_tokenizer(decoders.write_checkpoint("qwen3", sys.argv[1]))

        def run(mesh):
            encoder = sgpt.BiEncoder.from_pretrained(folder, mesh=mesh, weights="int8")
            scorer = sgpt.CrossEncoder.from_pretrained(folder, mesh=mesh, weights="int8")
            return encoder.encode(texts), scorer.predict(pairs)

        expected, results = run(None), {}
        for spec in ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"):
            results[spec] = [
                float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                for ours, theirs in zip(run(sgpt.make_mesh(spec)), expected)
            ]
        print(json.dumps(results))
    """
    results = json.loads(run_on_eight(code, tmp_path / "model").stdout.splitlines()[-1])
    assert len(results) == 3
    for spec, errors in results.items():
        assert max(errors) < 1e-5, (spec, errors)


def test_biases_name_the_weights_they_were_trained_over(tmp_path):
    folder = decoders.write_tokenizer(decoders.write_checkpoint("gptj", tmp_path / "model"))
    decoder = load(folder)
    original = weights_sha256(split(decoder)[1])
    assert checkpoint_sha256(open_checkpoint(epath.Path(folder))) == original
    values = {name: np.asarray(leaf) + 0.5 for name, leaf in bias_leaves(split(decoder)[1]).items()}
    path = tmp_path / "biases.safetensors"
    save_bias_set(path, BiasSet(values, {"base_model": "tiny", "base_sha256": original, "weights": "int8"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        int8 = sgpt.BiEncoder.from_pretrained(folder, weights="int8", biases=path)
    with pytest.warns(UserWarning, match="trained over int8 weights of tiny"):
        other = sgpt.BiEncoder.from_pretrained(folder, biases=path)
    assert int8.decoder.build.int8 and not other.decoder.build.int8
    assert 1e-6 < relative_error(int8.encode(TEXTS[1:]), other.encode(TEXTS[1:])) < 0.1
    # biases of another base are refused over int8 too
    wrong = load_bias_set(path)
    save_bias_set(path, BiasSet(wrong.values, {**wrong.header, "base_sha256": "0" * 64}))
    with pytest.raises(InputError, match="belong to tiny"):
        sgpt.BiEncoder.from_pretrained(folder, weights="int8", biases=path)


def test_export_is_the_dequantised_copy_and_says_so(tmp_path, capsys):
    folder = decoders.write_tokenizer(decoders.write_checkpoint("llama", tmp_path / "model"))
    assert main(["export", str(folder), "-o", str(tmp_path / "out"), "--weights", "int8"]) == 0
    assert "dequantised copy of its int8 weights" in capsys.readouterr().out
    assert "dequantised copy of int8 weights" in (tmp_path / "out/README.md").read_text()
    int8 = sgpt.BiEncoder.from_pretrained(folder, weights="int8")
    copy = sgpt.BiEncoder.from_pretrained(tmp_path / "out")
    assert relative_error(copy.encode(TEXTS[1:]), int8.encode(TEXTS[1:])) < 1e-5


def test_what_is_quantised_already_is_refused(tmp_path):
    folder = decoders.write_checkpoint("gpt_neo", tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file({**weights, name: weights[name].astype(np.int8)}, folder / "model.safetensors")
    for options in ({}, {"weights": "int8"}):
        with pytest.raises(InputError, match=f"{name} is quantised already: it holds int8"):
            load(folder, **options)
    broken = weights[name].copy()
    broken[0, 0] = np.nan
    save_file({**weights, name: broken}, folder / "model.safetensors")
    with pytest.raises(InputError, match="blocks/1/mlp/up/kernel cannot be held as int8"):
        load(folder, weights="int8")
    with pytest.raises(InputError, match="weights must be int8"):
        load(folder, weights="int4")


def test_loading_holds_no_second_copy(tmp_path):
    """Of a file of 100 MB it takes the pages of the file, the int8 weights and one tensor."""
    code = """
        import resource, sys, json
        import numpy as np
        from etils import epath
        from sgpt_jax.checkpoint.tensors import open_checkpoint
        from sgpt_jax.checkpoint.weights import load_checkpoint
        from safetensors.numpy import save_file
        import jax
        jax.numpy.zeros(()).block_until_ready()
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        files = open_checkpoint(epath.Path(sys.argv[1]))
        decoder = load_checkpoint(files, "bfloat16", weights="int8")
        print(json.dumps([before, peak()]))
    """
    settings = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1536,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    size, mlp = settings["hidden_size"], settings["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (4096, size), "model.norm.weight": (size,)}
    for i in range(4):
        start = f"model.layers.{i}."
        shapes |= {f"{start}self_attn.{part}_proj.weight": (size, size) for part in "qkvo"}
        shapes |= {f"{start}mlp.{part}_proj.weight": (mlp, size) for part in ("gate", "up")}
        shapes[f"{start}mlp.down_proj.weight"] = (size, mlp)
        shapes |= {f"{start}{norm}_layernorm.weight": (size,) for norm in ("input", "post_attention")}
    draw = np.random.default_rng(0)
    save_file(
        {name: draw.random(shape, np.float32) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = json.loads(done.stdout.splitlines()[-1])
    file = (tmp_path / "model.safetensors").stat().st_size
    assert after - before < 1.3 * file + file / 4
