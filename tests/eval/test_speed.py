"""The speed command on tiny decoders: that every run does the same work, and what the result says; no times."""

import importlib.util
import inspect
import json
import sys
import types

import decoders
import eval_cases
import jax
import numpy as np
import pytest

from eval.__main__ import main
from eval.plan.models import MODELS
from eval.speed import benchmark as speed_rounds
from eval.speed import models as speed_models
from eval.speed.encode import encode_benchmark
from eval.speed.search import held_benchmark, search_benchmark
from sgpt_jax import BiEncoder


@pytest.fixture(autouse=True)
def small_matmuls(monkeypatch):
    monkeypatch.setattr(speed_rounds, "CPU_MATMULS", (4, 64))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(eval_cases.small_beir(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = decoders.write_checkpoint("llama", tmp_path_factory.mktemp("model"))
    return str(decoders.write_tokenizer(folder))


def run(tmp_path, *arguments):
    output = tmp_path / "speed.json"
    assert main(["speed", *map(str, arguments), "--rounds", "2", "--output", str(output)]) == 0
    return json.loads(output.read_text())


def check(part, runs):
    assert set(part["ways"]) == set(runs)
    assert all(len(run["seconds"]) == 2 and run["of_datasheet"] is None for run in part["ways"].values())


def test_figures_of_a_benchmark(monkeypatch):
    """By a clock that the runs set forward themselves."""
    clock = [0.0]

    def timed(first, *later):
        seconds = iter((first, *later))

        def run():
            clock[0] += next(seconds)
            return first

        return run

    monkeypatch.setattr(speed_rounds.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(speed_rounds, "_matmul", lambda dtype: (timed(9.0, 1.0, 2.0, 1.0), 100.0))
    benchmark = speed_rounds.Benchmark(
        work={"texts": 6, "tokens": 60},
        unit="tokens",
        runs={"ours": timed(7.0, 2.0, 2.0, 3.0), "peer": timed(4.0, 3.0, 5.0, 3.0)},
        flops={"": 80.0, "peer": 90.0},
        dtype="float32",
        compare=lambda found: {"first": found},
    )
    result = speed_rounds.measure(benchmark, 3)
    assert result["matrix_product_flops"] == 100.0
    assert result["agreement"] == {"first": {"ours": 7.0, "peer": 4.0, "matmul": 9.0}}
    ours, peer = result["ways"]["ours"], result["ways"]["peer"]
    assert (ours["seconds"], ours["median_seconds"], ours["compile_seconds"]) == ([2.0, 2.0, 3.0], 2.0, 5.0)
    assert (ours["tokens_per_second"], ours["flops_per_second"], ours["of_matrix_product"]) == (
        30.0,
        40.0,
        0.4,
    )
    assert (peer["ours_over"], peer["of_matrix_product"], peer["compile_seconds"]) == (1.5, 0.3, 1.0)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", None), ("NVIDIA L4", 121e12), ("NVIDIA L40", None),
     ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("cpu", None)],
)  # fmt: skip
def test_published_peaks(kind, peak, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert speed_rounds.datasheet_peak() == peak


def test_encode(model, data, tmp_path, capsys):
    pytest.importorskip("sentence_transformers")
    result = run(tmp_path, "encode", "--model", model, "--data", data, "--texts", 9)
    part = result["encode"]
    check(part, ["ours", "torch", "sentence-transformers"])
    assert part["work"]["texts"] == 9
    assert len(part["agreement"]) == 2
    assert max(part["agreement"].values()) < 1e-4
    assert part["torch"]["threads"] == speed_rounds.threads()
    assert {"command", "versions", "device", "threads"} <= set(result)
    assert "9 texts" in capsys.readouterr().out


@pytest.mark.parametrize("pooling", ["mean", "lasttoken", "cls"])
def test_torch_pools_as_the_model_does(model, data, pooling):
    pytest.importorskip("torch")
    encoder = BiEncoder.from_pretrained(model, pooling=pooling)
    runs = encode_benchmark(encoder, ["a b", "c", "some longer text"]).runs
    np.testing.assert_allclose(runs["torch"](), runs["ours"](), atol=1e-4)


def test_bfloat16_encode(model, data, tmp_path):
    pytest.importorskip("sentence_transformers")
    part = run(tmp_path, "encode", "--model", model, "--data", data, "--texts", 5, "--dtype", "bfloat16")
    assert part["encode"]["dtype"] == "bfloat16"
    assert max(part["encode"]["agreement"].values()) < 0.1


def test_score(model, data, tmp_path):
    pytest.importorskip("torch")
    part = run(tmp_path, "score", "--model", model, "--data", data, "--pairs", 5)["score"]
    check(part, ["ours", "ours, pairs alone", "torch, one by one", "torch, batches"])
    assert max(part["agreement"].values()) < 1e-4
    assert part["work"]["pairs"] == 5
    assert part["tokens"]["shared"] <= part["tokens"]["alone"]
    assert part["compiled_memory_mib"]["scores"] > 0


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])  # without biases, and with some
def test_train(name, data, tmp_path):
    pytest.importorskip("torch")
    model = decoders.write_tokenizer(decoders.write_checkpoint(name, tmp_path / "model"))
    part = run(tmp_path, "train", "--model", model, "--data", data, "--batch-size", 3)["train"]
    pytest.importorskip("sentence_transformers")
    check(part, ["ours", "ours, all weights", "torch", "sentence-transformers"])
    losses = list(part["agreement"].values())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)
    sizes = part["compiled_memory_mb"]
    assert sizes["ours"]["moments"] < 0.1 * sizes["ours, all weights"]["moments"]


def test_search(tmp_path):
    pytest.importorskip("faiss")
    pytest.importorskip("usearch")
    part = run(tmp_path, "search", "--vectors", 1500, "--queries", 7, "--results", 3)["search"]
    check(part, ["ours", "ours, resident", "numpy", "faiss", "usearch"])
    assert set(part["agreement"].values()) == {1.0}
    assert part["work"] == {"vectors": 1500, "queries": 7, "results": 3}


@pytest.mark.parametrize("held", ["bfloat16", "int8"])
def test_search_of_vectors_that_are_made_on_the_device(held, tmp_path):
    part = run(tmp_path, "search", "--held", held, "--vectors", 3000, "--queries", 7, "--results", 5)[
        "search"
    ]
    peers = ["torch"] if held == "bfloat16" and importlib.util.find_spec("torch") else []
    check(part, ["ours", "rows read once", *peers])
    assert part["bytes"] >= 3000 * 768 * (2 if held == "bfloat16" else 1) and part["blocks"] == 1
    assert all(share > 0.8 for share in part["agreement"].values())  # torch's queries are rounded


def test_held_vectors_are_found_as_numpy_finds_them():
    benchmark = held_benchmark(20_000, 6, 4, "bfloat16", alone=True)
    found = benchmark.runs["ours"]()
    inside = inspect.getclosurevars(benchmark.runs["ours"]).nonlocals
    queries, held = inside["queries"], inside["held"]
    rows = np.concatenate([np.asarray(vectors, np.float64) for vectors, *_ in held._blocks])[:20_000]
    assert found.tolist() == np.argsort(-(queries @ rows.T), axis=1)[:, :4].tolist()


@pytest.mark.parametrize(("part", "size"), [("encode", ["--texts", 5]), ("train", ["--batch-size", 3])])
def test_int8_weights_beside_the_dtype(part, size, model, data, tmp_path):
    options = ["--model", model, "--data", data, *size, "--weights", "int8", "--alone"]
    result = run(tmp_path, part, *options)[part]
    check(result, ["ours", "ours, int8 weights"])
    if part == "encode":
        assert 0 < max(result["agreement"].values()) < 0.1
    else:
        losses = list(result["agreement"].values())
        assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_start(model, data, capsys):
    assert main(["speed", "start", "--model", model, "--data", data, "--rounds", "1", "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)["start"]["ways"]
    assert {"ours", "ours, import", "ours, --help"} <= set(ways)
    assert ways["ours, --help"]["median_seconds"] < ways["ours"]["median_seconds"]


AGAIN = ["speed", "search", "--vectors", "200", "--rounds", "1", "--against"]


@pytest.mark.parametrize(("factor", "code"), [(1e-3, 0), (1e6, 1)])
def test_a_release_is_held_against_the_one_before(factor, code, tmp_path, capsys):
    """A thousandth of what it was ahead of its peers is surely reached, a million times it is not."""
    before = run(tmp_path, "search", "--vectors", 200)
    for figures in before["search"]["ways"].values():
        figures["ours_over"] *= factor
    (tmp_path / "before.json").write_text(json.dumps(before))
    assert main([*AGAIN, str(tmp_path / "before.json")]) == code
    assert ("times numpy, " in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"work": {"vectors": 300}}, "work of search was"),
        ({"dtype": "bfloat16"}, "dtype of search was bfloat16, and is float32 now"),
        ({"ways": {}}, "no peer was measured in both"),
    ],
)
def test_figures_of_something_else_are_not_compared(change, message, tmp_path, capsys):
    before = run(tmp_path, "search", "--vectors", 200)
    before["search"] |= change
    (tmp_path / "before.json").write_text(json.dumps(before))
    assert main([*AGAIN, str(tmp_path / "before.json")]) == 1
    assert message in capsys.readouterr().err


def test_what_is_no_benchmark_is_refused_before_the_rounds(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    assert main(["speed", "search", "--against", str(tmp_path / "list.json")]) == 1
    assert "not a JSON object" in capsys.readouterr().err


def test_what_is_not_installed_is_left_out_by_name(model, data, tmp_path, monkeypatch, capsys):
    for name in ("torch", "faiss", "usearch", "usearch.index"):
        monkeypatch.setitem(sys.modules, name, None)
    benchmark = encode_benchmark(BiEncoder.from_pretrained(model), ["a b"])
    assert set(benchmark.runs) == {"ours"}
    assert set(benchmark.left_out) == {"torch", "sentence-transformers"}
    assert set(search_benchmark(200, 5, 5, str(tmp_path), alone=False).left_out) == {"faiss", "usearch"}
    assert main(["speed", "search", "--vectors", "200", "--rounds", "1"]) == 0
    assert "left out: faiss: faiss is not installed" in capsys.readouterr().out


def test_a_part_that_cannot_run_does_not_stop_the_others(data, tmp_path, capsys):
    folder = decoders.write_checkpoint("qwen3", tmp_path / "headless", model_class="base")
    decoders.write_tokenizer(folder)
    arguments = ["--model", str(folder), "--data", data, "--texts", "5", "--batch-size", "2"]
    result = run(tmp_path, *arguments, "--vectors", "200", "--pairs", "2")
    assert list(result["left_out"]) == ["score"]
    assert {"encode", "train", "search"} <= set(result)
    assert main(["speed", "score", *arguments, "--pairs", "2"]) == 1


def test_a_model_that_transformers_has_not(data, tmp_path):
    pytest.importorskip("torch")
    folder = decoders.write_tokenizer(
        decoders.write_checkpoint("gptj", tmp_path / "gptj", model_class="base")
    )
    part = run(tmp_path, "encode", "--model", folder, "--data", data, "--texts", 3)["encode"]
    assert "transformers has no gptj config" in part["left_out"]["torch"]


SMALL = {
    "hidden_size": 64, "n_embd": 64, "num_layers": 2, "n_layer": 2, "num_hidden_layers": 2, "num_heads": 4,
    "n_head": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8,
    "intermediate_size": 96, "max_position_embeddings": 64, "n_positions": 64,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip


@pytest.mark.parametrize("shape", list(MODELS))
def test_a_shape_needs_no_checkpoint(shape, data, tmp_path, monkeypatch):
    files = tmp_path / "tokenizer"
    files.mkdir()
    vocab, merges = decoders.bpe()
    vocab = {**vocab, "<|endoftext|>": len(vocab)}
    small = MODELS[shape] | {key: size for key, size in SMALL.items() if key in MODELS[shape]}
    monkeypatch.setitem(MODELS, shape, small | {"vocab_size": len(vocab)})
    (files / "vocab.json").write_text(json.dumps(vocab))
    (files / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    common = ("encode", "--shape", shape, "--data", data, "--texts", 5)
    part = run(tmp_path, *common, "--tokenizer", files)["encode"]
    assert part["work"]["tokens"] > 5
    assert all(why.endswith("is not installed") for why in part["left_out"].values())
    assert all(value < 1e-4 for value in part["agreement"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode"], "give a model"),
        (["encode", "--model", "x", "--shape", "gpt-neo-125m"], "give a model"),
        (["encode", "--shape", "gpt-neo-125m"], "no tokenizer"),
        (["score", "--model", "x", "--weights", "int8"], "is for encode and train"),
        (["encode", "--model", "x", "--held", "int8"], "--held is for search"),
        (["encode", "--model", "x", "--pairs", "4", "--queries", "5"], "--pairs, --queries: not for encode"),
        (["search", "--model", "x", "--texts", "4"], "--model, --texts: not for search"),
        (["search", "--held", "int8", "--vectors", "100000000000"], " GB and "),
    ],
)
def test_wrong_options(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("SGPT_DATA", raising=False)
    assert main(["speed", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_texts_are_mixed_and_enough(data):
    found = speed_models.open_data(data)
    texts = speed_models.mixed_texts(found, 10)
    assert texts[4] == "cat"
    assert texts[9] == "dog bark"
    with pytest.raises(ValueError, match="texts, not 100"):
        speed_models.mixed_texts(found, 100)
