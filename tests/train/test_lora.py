"""LoRA: three steps against PEFT (fixtures/training/make_lora.py), runs as a whole, what they leave, refusals."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_eight
from gguf_files import write_gguf
from safetensors.numpy import load_file, safe_open, save_file
from training import Process, data, expected, lora_start, wait_for_steps, write_model

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.lora import add_lora, make_lora, save_adapter
from sgpt_jax.decoder.model import merge, split
from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError
from sgpt_jax.families import family_of
from sgpt_jax.families.tables import active_rules, leaf_name
from train.__main__ import main
from train.batches import BatchPlan, PackedBatches
from train.data import ListExamples, read_pairs
from train.losses import LossConfig
from train.optimizer import join_params, linear_schedule, make_optimizer, split_params, trainable_mask
from train.step import init_state, jit_step, make_step, place_batch

TEXTS = ["how do herons hunt", "a café", "the mill grinds rye"]
# name: variant, targets, what trains
RUNS = {
    "llama": ("llama", (), "lora"),
    "llama_qv": ("llama", ("q", "v"), "lora"),
    "gptj": ("gptj", (), "lora"),
    "gptj_bias": ("gptj", ("v", "q"), "lora,bias"),
}


def named(params):
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def peft_names(model):
    """{leaf of a kernel: PEFT's name of it}"""
    config, family = model.decoder.config, family_of(model.hf_config)
    rules = active_rules(config, family.rules, named(split(model.decoder)[1]))
    return {
        leaf_name(rule.leaves[0], layer): f"base_model.model.{name.removesuffix('.weight')}"
        for name, (rule, layer) in rules.items()
    }


def start_as_peft(model, trainable):
    """The adapters' A as the fixture has it; see `lora_start`."""
    names = peft_names(model)

    def start(path, leaf):
        parent, _, last = leaf_path(path).rpartition("/")
        if last != "lora_a":
            return leaf
        name = f"{names[f'{parent}/kernel']}.lora_A.weight"
        return jnp.asarray(lora_start(name, leaf.shape[::-1]).T)

    return jax.tree_util.tree_map_with_path(start, trainable)


def three_steps(model, rule, chunk_rows, *, dtype=jnp.float32):
    structure, params = split(model.decoder)
    mask = trainable_mask(params, rule)
    trainable, frozen = split_params(params, mask)
    optimizer = make_optimizer(mask, linear_schedule(1e-3, 0, 3))
    state = init_state(start_as_peft(model, trainable), optimizer, 0, None)
    plan = BatchPlan(ListExamples(read_pairs(data(1))), 8, seed=0, shuffle=False, no_duplicates=False)
    batches = PackedBatches(plan, model.text, vocab_size=384, symmetric=False, steps=3)
    step = make_step(
        structure, pooling="weightedmean", loss=LossConfig(), optimizer=optimizer, dtype=dtype,
        chunk_rows=chunk_rows, dropout=False,
    )  # fmt: skip
    run_step, losses, norms = jit_step(step, structure, state, None), [], []
    for number in range(3):
        batch = batches[number]
        arrays = place_batch(
            batch, rows=len(batch["rows"].segments), chunk_rows=chunk_rows, pad_id=0, mesh=None
        )
        state, loss, norm = run_step(state, frozen, arrays)
        losses.append(float(loss))
        norms.append(float(norm))
    decoder = merge(structure, join_params(state.trainable, frozen, dtype))
    return losses, norms, {name: np.asarray(leaf) for name, leaf in named(state.trainable).items()}, decoder


def adapted(variant, folder, targets=(), **options):
    model = BiEncoder.from_pretrained(
        write_model(variant, folder), max_seq_length=75, pooling="weightedmean", **options
    )
    return dataclasses.replace(
        model, decoder=add_lora(model.decoder, make_lora(model.decoder.config, 4, 8, targets), 0)
    )


@pytest.mark.parametrize("run", RUNS)
def test_three_steps_against_peft(run, tmp_path):
    variant, targets, rule = RUNS[run]
    wanted = expected(run, "lora")
    model = adapted(variant, tmp_path, targets)
    losses, norms, trained, decoder = three_steps(model, rule, 2)
    np.testing.assert_allclose(losses, wanted["losses"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norms, wanted["norms"], rtol=1e-4)
    save_adapter(tmp_path, decoder, model.hf_config, trained, base="base", header={})
    ours = load_file(tmp_path / "adapter_model.safetensors")
    after = {
        name.removeprefix("after/"): value for name, value in wanted.items() if name.startswith("after/")
    }
    assert ours.keys() == after.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, after[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_chunks_change_nothing(weights, tmp_path):
    """GradCache, also over int8 weights."""
    plain, chunked = (
        three_steps(adapted("llama", tmp_path, weights=weights), "lora", rows) for rows in (0, 2)
    )
    np.testing.assert_allclose(chunked[0], plain[0], rtol=1e-5)
    for name, value in plain[2].items():
        np.testing.assert_allclose(chunked[2][name], value, atol=1e-5, err_msg=name)
    # B moves from the first step on, A from the second on.
    assert all(np.any(value) for value in plain[2].values())


def test_bfloat16_over_int8(tmp_path):
    model = adapted("llama", tmp_path, weights="int8", dtype="bfloat16")
    losses, _, trained, _ = three_steps(model, "lora", 2, dtype=jnp.bfloat16)
    wanted = expected("llama", "lora")["losses"]
    np.testing.assert_allclose(losses, wanted, rtol=0.1)
    assert {leaf.dtype.name for leaf in trained.values()} == {"float32"}


def test_a_new_adapter_changes_nothing_and_is_pefts_start(tmp_path):
    base = BiEncoder.from_pretrained(write_model("qwen3", tmp_path))
    model = dataclasses.replace(base, decoder=add_lora(base.decoder, make_lora(base.decoder.config, 4, 8), 7))
    np.testing.assert_array_equal(model.encode(TEXTS), base.encode(TEXTS))
    leaves = named(split(model.decoder)[1])
    for name in (name for name in leaves if name.endswith("lora_a")):
        a = np.asarray(leaves[name])
        limit = a.shape[0] ** -0.5
        assert np.abs(a).max() <= limit and np.abs(a).max() > 0.9 * limit and abs(a.mean()) < limit / 4
    again = named(split(add_lora(base.decoder, make_lora(base.decoder.config, 4, 8), 7))[1])
    other = named(split(add_lora(base.decoder, make_lora(base.decoder.config, 4, 8), 8))[1])
    np.testing.assert_array_equal(again["blocks/0/attn/q/lora_a"], leaves["blocks/0/attn/q/lora_a"])
    assert np.any(other["blocks/0/attn/q/lora_a"] != leaves["blocks/0/attn/q/lora_a"])
    assert np.any(leaves["blocks/0/attn/k/lora_a"] != leaves["blocks/0/attn/v/lora_a"])


def command(base, out, *more):
    options = (
        f"pairs --model {base} --data {data(1)} --output {out} --batch-size 8 --max-seq-length 75 --lr 1e-2"
    )
    return [*options.split(), "--warmup-steps", "0", "--no-shuffle", "--trainable", *map(str, more)]


@pytest.mark.parametrize(
    ("variant", "more"),
    [("llama", ["lora"]), ("gpt2", ["lora", "--lora-targets", "q,v,down"]), ("gpt_neox", ["lora,bias"]),
     ("llama", ["lora", "--weights", "int8"])],
)  # fmt: skip
def test_what_a_run_leaves_is_what_peft_and_sentence_transformers_read(variant, more, tmp_path):
    base, out = write_model(variant, tmp_path / "base"), tmp_path / "out"
    assert main(command(base, out, *more, "--lora-rank", 4, "--steps", 3)) == 0
    with safe_open(out / "adapter_model.safetensors", "numpy") as opened:
        header = json.loads(opened.metadata()["sgpt_jax_adapter"])
    assert header.get("weights") == ("int8" if "int8" in more else None) and header["base_model"] == "base"
    assert not (out / "model.safetensors").exists() and not (out / "biases.safetensors").exists()
    assert "rank 4, alpha 8" in (out / "README.md").read_text()
    copy = tmp_path / "moved"  # the adapters over the base that they name, by this project
    shutil.copytree(out, copy)
    if "int8" in more:
        assert "trained over int8 weights" in (out / "README.md").read_text()
        with pytest.warns(UserWarning, match="trained over int8 weights of base"):
            applied = BiEncoder.from_pretrained(copy)
    else:
        applied = BiEncoder.from_pretrained(copy)
    assert main(command(base, tmp_path / "merged", *more, "--lora-rank", 4, "--steps", 3, "--merge")) == 0
    assert not (tmp_path / "merged/adapter_config.json").exists()
    merged = BiEncoder.from_pretrained(tmp_path / "merged")
    tolerance = 0.2 if "int8" in more else 1e-5
    np.testing.assert_allclose(applied.encode(TEXTS), merged.encode(TEXTS), atol=tolerance)
    before = BiEncoder.from_pretrained(base, pooling="weightedmean")
    assert np.abs(merged.encode(TEXTS) - before.encode(TEXTS)).max() > 1e-3

    weights = load_file(tmp_path / "base/model.safetensors")
    name = next(name for name, value in weights.items() if ".mlp." in name and value.ndim == 2)
    save_file(
        {**weights, name: weights[name] + np.float32(0.5)},
        tmp_path / "base/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match="this adapter belongs to base"):
        BiEncoder.from_pretrained(copy)
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})

    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    source = tmp_path / "base"
    if "int8" in more:  # what PEFT sees the adapters over is the dequantised copy
        source = tmp_path / "copy"
        BiEncoder.from_pretrained(base, weights="int8").save_pretrained(source)
    model = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(source, attn_implementation="eager"), str(out)
    )
    merged_by_peft = model.merge_and_unload()
    merged_by_peft.save_pretrained(tmp_path / "by_peft")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "by_peft"))
    compared = 0
    for name, value in theirs.items():
        mine = next(tensor for key, tensor in ours.items() if key == name or key.endswith(f".{name}"))
        np.testing.assert_allclose(mine, value, atol=1e-5, err_msg=name)
        compared += 1
    assert compared > 10
    if "int8" in more:
        return
    library = pytest.importorskip("sentence_transformers")
    vectors = library.SentenceTransformer(str(out), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(vectors, merged.encode(TEXTS), atol=1e-4)


@pytest.mark.parametrize("kind", ["adapter", "gguf"])
def test_a_base_that_peft_does_not_load(kind, tmp_path, capsys):
    """The run says so at its start, and the card does not show how; this project loads the stack."""
    base, out = tmp_path / "base.gguf", tmp_path / "out"
    if kind == "gguf":
        write_gguf("llama", base)
    else:
        base = tmp_path / "first"
        assert main(command(write_model("llama", tmp_path / "base"), base, "lora", "--steps", 2)) == 0
        assert "SentenceTransformer(" in (base / "README.md").read_text()
        assert "will not load" not in capsys.readouterr().out
    assert main(command(base, out, "lora", "--steps", 2)) == 0
    assert "will not load the adapters of this run" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "do not load these adapters" in card and "SentenceTransformer(" not in card
    assert "BiEncoder.from_pretrained" in card and "library_name" not in card
    assert np.all(np.isfinite(BiEncoder.from_pretrained(out).encode(TEXTS)))


def test_killed_and_resumed(tmp_path):
    base = write_model("gptj", tmp_path / "base")
    options = ["lora,bias", "--lora-rank", 2, "--steps", 30, "--save-every", 4, "--lr", "1e-3"]
    assert main(command(base, tmp_path / "whole", *options)) == 0
    process = Process(tmp_path, command(base, tmp_path / "broken", *options))
    wait_for_steps(process, tmp_path / "broken", 10)
    process.popen.kill()
    process.wait()
    assert not (tmp_path / "broken/adapter_model.safetensors").exists()
    assert main(command(base, tmp_path / "broken", *options, "--resume")) == 0
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("broken", "whole"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_eight_devices(tmp_path):
    code = """
        import sys
        import numpy as np
        from safetensors.numpy import load_file
        from train.__main__ import main
        folder, data = sys.argv[1:]
        found = []
        for number, more in enumerate(["--mesh data=1", "--mesh data=2,fsdp=2,tensor=2", "--mesh fsdp=8"]):
            import jax
            from train import prepare
            out = f"{folder}/out{number}"
            options = f"pairs --model {folder}/base --data {data} --output {out} --batch-size 8 --max-seq-length 75"
            options += " --lr 1e-3 --warmup-steps 0 --no-shuffle --steps 3 --weights int8 --lora-rank 4"
            options += " --trainable lora,bias --chunk-size 8"
            if number:
                options += f" {more}"
            assert main(options.split()) == 0
            found.append(load_file(f"{out}/adapter_model.safetensors"))
        for other in found[1:]:
            assert other.keys() == found[0].keys()
            for name, value in other.items():
                np.testing.assert_allclose(value, found[0][name], atol=1e-4, err_msg=name)
        print("same")
    """
    write_model("gptj", tmp_path / "base")
    assert run_on_eight(code, tmp_path, data(1)).stdout.splitlines()[-1] == "same"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["lora", "--lora-rank", 4096], "adapters of rank 4096: no more than"),
        (
            ["lora", "--lora-targets", "q,gates"],
            "adapters for gates: this model has no such linear layer; it has q, k",
        ),
        (["lora", "--lora-rank", 0], "--lora-rank must be at least 1"),
        (["lora", "--lora-alpha", -1], "positive rank and alpha"),
        (["bias", "--lora-rank", 4], "--lora-rank is for --trainable lora"),
        (["all", "--weights", "int8"], "that --weights int8 freezes"),
        (["attn/q/scale", "--weights", "int8"], "that --weights int8 freezes"),
        (["lora,bias"], "no bias to train"),
        (["lora,bias", "--add-biases"], "no room for biases that the base model lacks"),
        (["bias", "--weights", "int4"], "weights must be int8"),
    ],
)
def test_refused(more, message, tmp_path, capsys):
    base = write_model("llama", tmp_path / "base")
    assert main(command(base, tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_targets_of_a_model_without_gates(tmp_path):
    config = BiEncoder.from_pretrained(write_model("gptj", tmp_path)).decoder.config
    assert make_lora(config, 2, 4).targets == ("q", "k", "v", "o", "up", "down")
    with pytest.raises(InputError, match="adapters for gate"):
        make_lora(config, 2, 4, ("gate",))
