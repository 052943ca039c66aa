"""Plans: arithmetic against compiled programs of tiny decoders, the search, the table, the TPU compiler if here."""

import dataclasses
import json
import math

import decoders
import jax
import jax.numpy as jnp
import pytest
from devices import run_on_eight
from flax import nnx
from plans import TINY, WORKS, arguments

from eval.__main__ import main
from eval.plan import choosing
from eval.plan import command as plan
from eval.plan import compile as plan_compile
from eval.plan import devices as plan_devices
from eval.plan import estimate as plan_estimate
from eval.plan import models as plan_models
from eval.plan import search as plan_search
from eval.plan import table as plan_table
from eval.plan.programs import Work, lower
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.flops import layer_weights
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.sharding import leaf_path, make_mesh
from sgpt_jax.errors import InputError
from train.optimizer import lora_of, make_optimizer, split_params, trainable_mask
from train.step import init_state

BFLOAT16 = Build(jnp.dtype("bfloat16"))


def one_device():
    return make_mesh(None, jax.devices()[:1])


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
@pytest.mark.parametrize("length", [64, 192])
def test_flops_by_arithmetic_are_the_compilers(work, length):
    work = dataclasses.replace(work, length=length)
    counted = plan_compile.counted_flops(TINY, work)
    assert counted == pytest.approx(plan_estimate.flops(TINY, work, loops_once=True), rel=0.12)
    # What is no product (norms, softmax) weighs less the wider the decoder is.
    wide = dataclasses.replace(TINY, embed_dim=512, head_dim=64, mlp_dim=2048)
    counted = plan_compile.counted_flops(wide, work)
    assert counted == pytest.approx(plan_estimate.flops(wide, work, loops_once=True), rel=0.03)


def test_flops_of_the_compiled_program():
    """After XLA's passes too; there the derivative of a frozen weight must not come back."""
    wide = dataclasses.replace(TINY, embed_dim=256, head_dim=32, mlp_dim=1024)
    flops = {}
    for name in ("train", "everything"):
        compiled = lower(wide, WORKS[name], one_device()).compile()
        flops[name] = compiled.cost_analysis()["flops"]
        assert flops[name] == pytest.approx(plan_estimate.flops(wide, WORKS[name]), rel=0.08)
    kernels = 2.0 * 16 * 64 * layer_weights(wide) * wide.num_layers
    assert flops["everything"] - flops["train"] == pytest.approx(kernels, rel=0.15)


@pytest.mark.parametrize("rule", ["bias", "all"])
def test_resident_memory_is_what_the_arrays_take(rule):
    decoder = Decoder(TINY, Build(jnp.dtype("bfloat16"), rngs=nnx.Rngs(0)))
    _, params = split(decoder)
    mask = trainable_mask(params, rule)
    trainable, frozen = split_params(params, mask)
    state = init_state(trainable, make_optimizer(mask, lambda _: jnp.float32(0)), 0, None)
    size = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            for name, tree in {"frozen": frozen, "ours": trainable, "moments": state.moments}.items()}  # fmt: skip
    work = Work(task="train", rows=4, length=16, trainable=rule)
    memory = plan_estimate.memory(TINY, work, (1, 1, 1))
    assert memory.parameters == size["frozen"] + size["ours"]
    assert memory.optimizer == size["moments"]


@pytest.mark.parametrize(("rule", "rank"), [("bias", None), ("lora", 4), ("lora,bias", 4)])
def test_resident_memory_over_int8(rule, rank):
    lora = lora_of(TINY, rule, rank)
    work = Work(task="train", rows=4, length=16, trainable=rule, weights="int8", lora=lora)
    _, params = split(Decoder(TINY, dataclasses.replace(work.build, rngs=nnx.Rngs(0))))
    mask = trainable_mask(params, rule)
    trainable, frozen = split_params(params, mask)
    state = init_state(trainable, make_optimizer(mask, lambda _: jnp.float32(0)), 0, None)
    memory = plan_estimate.memory(TINY, work, (1, 1, 1))
    assert memory.parameters == sum(leaf.nbytes for leaf in jax.tree.leaves((frozen, trainable)))
    assert memory.optimizer == sum(leaf.nbytes for leaf in jax.tree.leaves(state.moments))
    dense = plan_estimate.memory(TINY, dataclasses.replace(work, weights=None), (1, 1, 1))
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.int8)
    scales = sum(leaf.nbytes for name, leaf in named(params).items() if name.endswith("/scale"))
    norms = sum(
        leaf.nbytes for name, leaf in named(params).items() if "norm" in name and name.endswith("/scale")
    )
    assert dense.parameters - memory.parameters == matrices - (scales - norms)


def named(params):
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_gpt_j_over_int8_leaves_a_chip_room_for_larger_chunks():
    target = plan_devices.parse_target("v5e:1x1")
    int8, dense = (
        plan.make_plan("gpt-j-6b", target, arguments(weights=weights)) for weights in ("int8", None)
    )
    assert int8["fits"] and int8["largest"] >= 3 * dense["largest"]
    assert int8["memory"]["parameters"] == pytest.approx(6.06e9, rel=0.01)
    assert "int8 weights" in plan_table.describe(int8) and "int8" not in plan_table.describe(dense)


@pytest.mark.parametrize("name", ["encode", "in chunks"])
def test_int8_weights_are_multiplied_out_one_layer_at_a_time(name):
    """Not all of them before the first layer, or before the loop over chunks."""
    wide = dataclasses.replace(TINY, embed_dim=256, head_dim=32, mlp_dim=1024, num_layers=8)
    changes = {"length": 16, "rows": 16, "chunk": 2} if WORKS[name].chunk else {"length": 16, "rows": 2}
    work = dataclasses.replace(WORKS[name], weights="int8", **changes)
    found = lower(wide, work, one_device()).compile().memory_analysis().temp_size_in_bytes
    assert found < 0.3 * 4 * layer_weights(wide) * wide.num_layers


def test_activations_by_arithmetic_are_near_the_compilers():
    """In float32 on a CPU: within a factor of two, and growing alike with rows and layers."""
    wide = dataclasses.replace(TINY, embed_dim=256, head_dim=32, mlp_dim=1024, num_layers=4)
    for layers in (4, 8):
        for rows in (8, 16):
            config = dataclasses.replace(wide, num_layers=layers)
            work = Work(task="train", rows=rows, length=128, examples=4, dtype="float32")
            memory = plan_estimate.memory(config, work, (1, 1, 1))
            found = lower(config, work, one_device()).compile().memory_analysis().temp_size_in_bytes
            assert 0.5 < (memory.activations + memory.temporaries + memory.gradients) / found < 2


def test_work_and_memory_fall_from_one_device_to_eight():
    code = """
        import dataclasses, json, jax
        from eval.plan.programs import Work, abstract_state, lower
        from sgpt_jax.decoder.sharding import leaf_path, make_mesh
        from plans import TINY, WORKS, arguments
        found = {}
        for spec in ("data=1", "data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"):
            mesh = make_mesh(spec, jax.devices()[: 1 if spec == "data=1" else 8])
            for name, work in WORKS.items():
                work = dataclasses.replace(work, rows=64, examples=16, chunk=16 if work.chunk else 0)
                compiled = lower(TINY, work, mesh).compile()
                memory = compiled.memory_analysis()
                found[f"{name} {spec}"] = (
                    compiled.cost_analysis()["flops"], memory.temp_size_in_bytes, memory.argument_size_in_bytes
                )
        print(json.dumps(found))
    """
    found = json.loads(run_on_eight(code).stdout.splitlines()[-1])
    for name, work in WORKS.items():
        flops, temporaries, arguments = found[f"{name} data=1"]
        for spec in ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"):
            ours = found[f"{name} {spec}"]
            # The scoring head counts one block of a loop whatever the rows are.
            assert ours[0] < flops * (0.16 if work.task == "score" else 0.14), (name, spec)
            assert ours[1] < temporaries * 0.3, (name, spec)
            if spec == "fsdp=8":
                assert ours[2] < arguments * 0.2, name
    # Where every row came to every device, a step took two to three times the memory that it takes with data=8.
    for name in WORKS:
        assert found[f"{name} fsdp=8"][1] < 1.6 * found[f"{name} data=8"][1], name


def test_the_abstract_state_is_placed_as_the_real_one():
    code = """
        import jax, jax.numpy as jnp
        from flax import nnx
        from eval.plan.programs import Work, abstract_params, abstract_state
        from sgpt_jax.decoder.build import Build
        from sgpt_jax.decoder.model import Decoder, split
        from sgpt_jax.decoder.sharding import leaf_path, make_mesh
        from plans import TINY
        from train.optimizer import lora_of, make_optimizer, split_params, trainable_mask
        from train.step import init_state
        mesh = make_mesh("data=2,fsdp=2,tensor=2")
        for rule in ("bias", "all"):
            abstract = abstract_params(TINY, Build(jnp.dtype("float32")), mesh)[1]
            _, params = split(Decoder(TINY, Build(jnp.dtype("float32"), rngs=nnx.Rngs(0))))
            params = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, abstract)
            mask = trainable_mask(params, rule)
            trainable, _ = split_params(params, mask)
            real = init_state(trainable, make_optimizer(mask, lambda _: jnp.float32(0)), 0, mesh)
            ours, _, _ = abstract_state(abstract, Work(task="train", rows=8, length=8, trainable=rule), mesh)
            assert jax.tree.structure(real) == jax.tree.structure(ours)
            for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(ours)):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.shape, a.sharding, b.sharding)
        print("same")
    """
    assert run_on_eight(code).stdout.strip() == "same"


BILLIONS = {"gpt-neo-125m": 0.125, "gpt-neo-1.3b": 1.316, "gpt-neo-2.7b": 2.651, "gpt-j-6b": 6.051,
            "bloom-7b1": 7.069, "gpt-neox-20b": 20.55, "llama-3.1-8b": 8.03, "qwen3-0.6b": 0.596,
            "qwen3-4b": 4.022, "qwen3-8b": 8.19, "gemma-3-1b": 0.99989, "embeddinggemma-300m": 0.30286}  # fmt: skip


@pytest.mark.parametrize("name", plan_models.MODELS)
def test_released_models_have_their_number_of_parameters(name):
    parameters, _, _ = plan_estimate.device_bytes(plan_models.find_model(name), "", BFLOAT16, (1, 1, 1))
    assert parameters / 2e9 == pytest.approx(BILLIONS[name], rel=0.005)


@pytest.mark.parametrize(
    ("text", "chip", "count", "shape"),
    [("v5e:2x4", "v5e", 8, "2x4"), ("v5e-8", "v5e", 8, "2x4"), ("v4-8", "v4", 4, "2x2x1"),
     ("v5p-16", "v5p", 8, "2x2x2"),
     ("v6e:4x4", "v6e", 16, "4x4"), ("h100:8", "h100", 8, None), ("a100", "a100", 1, None)],
)  # fmt: skip
def test_targets(text, chip, count, shape):
    target = plan_devices.parse_target(text)
    assert (target.chip_name, target.count, target.shape) == (chip, count, shape)


@pytest.mark.parametrize("text", ["v5e", "v5e:8", "v5e:2x2x2", "v4-9", "v3-8", "h100:0", "h100:x", "tpu", ""])
def test_targets_that_are_none(text):
    with pytest.raises(InputError, match="--topology"):
        plan_devices.parse_target(text)


def test_the_search_prefers_what_fits_with_least_tensor_parallelism():
    config, target = plan_models.find_model("gpt-j-6b"), plan_devices.parse_target("v5e-8")
    plans = list(choosing.search(config, target, arguments()))
    chosen = choosing.choose(plans)
    assert chosen.fits and chosen.sizes[2] == 1
    assert chosen.memory.total <= target.chip.budget
    assert {math.prod(one.sizes) for one in plans} == {8}
    # Twenty billion parameters do not fit as a whole: they have to be split.
    large = plan_models.find_model("gpt-neox-20b")
    chosen = choosing.choose(list(choosing.search(large, target, arguments())))
    assert chosen.fits and chosen.sizes[1] * chosen.sizes[2] > 2
    # More rows take more memory, more splitting less.
    sizes = (1, 8, 1)
    some = [one for one in plans if one.sizes == sizes and one.work.chunk]
    assert [one.memory.total for one in some] == sorted(one.memory.total for one in some)
    found = [
        plan_estimate.device_bytes(config, "all", BFLOAT16, (8 // fsdp, fsdp, 1))[0] for fsdp in (1, 2, 4, 8)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] / found[-1] == pytest.approx(8, rel=0.01)


def test_full_training_of_gpt_j_needs_more():
    result = plan.make_plan("gpt-j-6b", plan_devices.parse_target("v5e-8"), arguments(trainable="all"))
    ours = plan.make_plan("gpt-j-6b", plan_devices.parse_target("v5e-8"), arguments())
    assert ours["fits"] and ours["devices_needed"] == 8
    assert not result["fits"] and result["devices_needed"] == 16
    assert result["memory"]["optimizer"] > 500 * ours["memory"]["optimizer"]


@pytest.mark.parametrize("task", ["train", "encode", "score"])
def test_command_writes_plans_and_their_table(task, tmp_path, capsys):
    decoders.write_checkpoint("llama", tmp_path / "model")
    options = ["--topology", "v5e-8", "h100:2", "--task", task, "--length", "64", "--no-compile"]
    assert (
        main(["plan", "--model", str(tmp_path / "model"), *options, "--output", str(tmp_path / "out")]) == 0
    )
    printed = capsys.readouterr().out
    assert printed.count("fits") >= 2 and "tokens/s at most" in printed
    assert ("--add-biases" in printed) == (task == "train")
    stored = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert [one["topology"] for one in stored] == ["h100:2", "v5e-8"]
    for one in stored:
        parts = [
            one["memory"][part]
            for part in ("parameters", "optimizer", "gradients", "activations", "temporaries")
        ]
        assert sum(parts) == pytest.approx(one["memory"]["total"])
        assert one["seconds"]["step"] == max(
            one["seconds"][part] for part in ("compute", "memory", "exchange")
        )
        assert one["versions"]["jax"] and one["command"]
    table = (tmp_path / "out" / "README.md").read_text()
    assert table.count(f"| {task}") == 2


def test_a_command_goes_on_with_the_plans_that_are_not_there(tmp_path, monkeypatch):
    decoders.write_checkpoint("llama", tmp_path / "model")
    made: list[str] = []
    versions = {"commit": "0123abc"}
    small, model = arguments(length=64), str(tmp_path / "model")
    results = {
        name: plan.make_plan(model, plan_devices.parse_target(name), small) for name in ("v5e-8", "v4-8")
    }
    monkeypatch.setattr(plan, "make_plan", lambda _, to, *__: made.append(to.name) or results[to.name])
    monkeypatch.setattr(plan, "provenance", lambda *_: {"versions": versions, "device": {}})
    command = ["plan", "--model", str(tmp_path / "model"), "--no-compile", "--length", "64"]
    command += ["--output", str(tmp_path / "out"), "--topology", "v5e-8"]
    assert main(command) == 0 and main([*command, "v4-8"]) == 0
    assert made == ["v5e-8", "v4-8"]
    assert main([*command, "v4-8", "--chunk-size", "8"]) == 1 and made == ["v5e-8", "v4-8"]
    for commit in ("4567def", "4567def-dirty", "4567def-dirty"):  # what is not committed may be anything
        versions["commit"] = commit
        assert main(command) == 0
    assert made[2:] == ["v5e-8"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [("--model gpt-5 --topology v5e-8", "known by name"), ("--model gpt-j-6b --topology v9", "--topology"),
     ("--model gpt-j-6b --topology v5e-8 --length 4000", "2048 positions"),
     ("--model gpt-j-6b --topology v5e-8 --mesh fsdp=3", "is for 3 devices, not 8"),
     ("--model gpt-j-6b --topology v5e-8 --mesh fsdp=8 --batch-size 3", "evenly"),
     ("--model gpt-j-6b --topology v5e-8 --trainable ((", "regular expression")],
)  # fmt: skip
def test_refused(options, message, capsys):
    assert main(["plan", *options.split(), "--no-compile"]) == 1
    assert message in capsys.readouterr().err


def test_what_fits_is_one_rule():
    """Whatever batch is asked for, the same number would fit; one more does not, and the limit is stated."""
    target = plan_devices.parse_target("v5e-8")
    options = {"task": "encode", "mesh": "fsdp=8"}
    results = [
        plan.make_plan("gpt-j-6b", target, arguments(batch_size=rows, **options)) for rows in (8, 4096)
    ]
    most = results[0]["largest"]
    assert results[1]["largest"] == most and results[0]["fits"] and not results[1]["fits"]
    for rows, fits in ((most, True), (most + 8, False)):
        result = plan.make_plan("gpt-j-6b", target, arguments(batch_size=rows, **options))
        assert result["fits"] == fits
        words = plan_table.describe(result)
        assert f"by arithmetic {most} would fit" in words
        assert f"may plan with {0.9 * target.chip.usable / 2**30:.2f} (90% of" in words
        assert "s a batch: matmuls" in words


def test_search_is_planned_by_arithmetic_and_compiled(capsys):
    """Bytes of the reference's table: 100 M of dimension 1,024 as bfloat16 are 12.8 GB a chip of v5e-16."""
    options = ["plan", "--task", "search", "--rows", "100000000", "--dim", "1024", "--topology", "v5e-16"]
    assert main([*options, "--no-compile"]) == 0
    text = capsys.readouterr().out
    float32, bfloat16, int8 = text.split("100,000,000 rows")[1:]
    assert "does not fit" in float32 and "as bfloat16 on v5e-16: fits" in bfloat16 and ": fits" in int8
    target = plan_devices.parse_target("v5e-16")
    found = plan_search.plan_of(
        plan_search.Search(100_000_000, 1024, "bfloat16", 512, 100), target, compiles=False
    )
    assert 12.8e9 <= found["layout"]["held"] < 12.9e9
    assert abs(found["milliseconds"]["one_query"] - 12.8e9 / 819e6) < 0.2
    assert found["most_rows"] > 100_000_000
    assert main(["plan", "--task", "search", "--topology", "v5e-16"]) == 1
    assert "--task search needs --rows and --dim" in capsys.readouterr().err
    # What the compiler says; without libtpu only that it is missing.
    small = plan_search.plan_of(
        plan_search.Search(3_000_000, 64, "int8", 48, 10), plan_devices.parse_target("v5e-8"), compiles=True
    )
    if small["compiled"] is None:
        assert "libtpu is not installed" in small["note"]
    else:
        assert small["compiled"]["fits"] and small["compiled"]["largest_of_queries"] > 0


def test_the_largest_array_of_queries_is_found():
    assert (
        plan_search.largest_array("f32[48,1000]{1,0} bf16[144,2,7] s8[5000,64] f32[2,48,600]", 48) == 57_600
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model gpt-j-6b --rows 5 --hits 3", "--rows, --hits: not for --task train"),
        ("--model x --task score --trainable bias --chunk-size 4", "--trainable, --chunk-size: not for --task score"),
        ("--task search --rows 5 --dim 4 --model gpt-j-6b --dtype float32", "--model, --dtype: not for --task search"),
        ("--model gpt-j-6b --lora-rank 4", "--lora-rank is for --trainable lora"),
        ("--model gpt-j-6b --full --no-compile", "--full compiles all layers: not with --no-compile"),
        ("--task encode", "--model is needed for every task but search"),
    ],
)  # fmt: skip
def test_options_of_another_task_are_refused(options, message, capsys):
    assert main(["plan", "--topology", "v5e-8", *options.split()]) == 1
    assert message in capsys.readouterr().err


def test_the_plans_of_a_folder_have_files_of_their_own(tmp_path, capsys):
    def planned(*options):
        return main(
            ["plan", "--topology", "v5e-8", "--no-compile", "--output", str(tmp_path / "out"), *options]
        )

    assert planned("--model", "gpt-neo-125m", "--trainable", "blocks/0/.*") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "gpt-neo-125m_v5e-8_train-blocks_0_._.json",
    ]
    assert planned("--model", "gpt-neo-125m", "--trainable", "blocks/0/.*", "--length", "64") == 1
    assert "is a plan of other options (length): give another --output" in capsys.readouterr().err
    assert planned("--model", "a/tiny", "b/tiny") == 1
    assert "--model has several tiny" in capsys.readouterr().err
