"""The command `sgpt` from its arguments to its files, with a tiny decoder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import decoders
import folders
import numpy as np
import pytest
from adapters import write_adapter
from safetensors.numpy import load_file, save_file

import sgpt_jax as sgpt
from sgpt_jax.cli.parser import main
from sgpt_jax.files.runs import read_run


def texts_of(corpus):
    with open(corpus) as lines:
        return [json.loads(line)["text"] for line in lines]


def test_search_finds_what_the_model_says(index, model, corpus, capsys):
    assert main(["search", index, "the heron waits", "-k", "3", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    encoder = sgpt.BiEncoder.from_pretrained(model, brackets=True)
    texts = texts_of(corpus)
    scores = encoder.similarity(encoder.encode_query("the heron waits"), encoder.encode_document(texts))[0]
    best = np.argsort(-scores)[:3]
    assert [hit["_id"] for hit in hits] == [f"d{i}" for i in best]
    assert [hit["text"] for hit in hits] == [texts[i] for i in best]
    np.testing.assert_allclose([hit["score"] for hit in hits], scores[best], rtol=1e-5)


def test_search_of_a_file_of_queries_and_reranking(index, model, corpus, tmp_path, capsys):
    queries = tmp_path / "queries.tsv"
    queries.write_text("q1\tthe ferry crosses\nq2\tnight market\n")
    run = tmp_path / "run.trec"
    assert main(["search", index, "--queries", str(queries), "-k", "5", "-o", str(run)]) == 0
    first = read_run(run)
    assert {query: len(hits) for query, hits in first.items()} == {"q1": 5, "q2": 5}

    reranked = tmp_path / "reranked"
    command = ["rerank", str(run), "--queries", str(queries), "--corpus", corpus, "--model", model]
    assert main([*command, "-o", str(reranked), "--depth", "5"]) == 0
    second = read_run(f"{reranked}.trec")
    assert {query: set(hits) for query, hits in second.items()} == {q: set(hits) for q, hits in first.items()}
    scorer = sgpt.CrossEncoder.from_pretrained(model)
    texts = texts_of(corpus)
    for query, text in (("q1", "the ferry crosses"), ("q2", "night market")):
        pairs = [(text, texts[int(id[1:])]) for id in second[query]]
        np.testing.assert_allclose(list(second[query].values()), scorer.predict(pairs), rtol=1e-4)

    # The same through the index's own hits.
    both = tmp_path / "both.trec"
    arguments = ["--queries", str(queries), "-k", "5", "--rerank", "5", "-o", str(both)]
    assert main(["search", index, *arguments]) == 0
    for query, hits in read_run(both).items():
        assert list(hits) == list(second[query])
    capsys.readouterr()

    # Documents that are not scored are no results.
    assert main(["search", index, "night market", "--rerank", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["hits"]) == 2
    assert main(["search", index, "night market", "--rerank", "2", "-k", "3"]) == 1
    assert "-k 3 asks for more documents than --rerank 2 scores" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of processes")
def test_a_full_disk_is_one_line_and_leaves_nothing(model, corpus, tmp_path):
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from sgpt_jax.cli.parser import main
sys.exit(main(sys.argv[1:]))
"""
    for command, name in ((["embed", corpus], "v.npy"), (["export", model], "m")):
        output = tmp_path / name
        more = ["-o", str(output), *(["--model", model] if command[0] == "embed" else [])]
        done = subprocess.run(
            [sys.executable, "-c", code, *command, *more],
            capture_output=True, text=True, check=False, env=os.environ | {"SGPT_COMPILATION_CACHE": "off"},
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith(f"error: {output}: ") and "File too large" in done.stderr
        assert done.stderr.count("\n") == 1
    assert [
        path.name for path in tmp_path.rglob("*") if path.suffix in (".npy", ".safetensors", ".tmp")
    ] == []


def test_a_listing_escapes_what_a_terminal_would_obey(model, tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"_id": "d\x1b[31m\n0", "text": "night\x00 \x1b]0;evil\x07"}) + "\n")
    assert main(["index", str(corpus), "-o", str(tmp_path / "index"), "--model", model]) == 0
    capsys.readouterr()
    assert main(["search", str(tmp_path / "index"), "a\x1b[1m"]) == 0
    query, hit = capsys.readouterr().out.splitlines()
    assert query == "a\\x1b[1m" and hit.endswith("  d\\x1b[31m\\n0  night\\x00 \\x1b]0;evil\\x07")
    assert main(["search", str(tmp_path / "index"), "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["_id"] == "d\x1b[31m\n0"


def test_info_of_a_model_and_of_an_index(model, index, capsys):
    assert main(["info", model]) == 0
    text = capsys.readouterr().out
    assert "llama, 2 layers" in text and "0 in biases" in text
    assert main(["info", index]) == 0
    text = capsys.readouterr().out
    assert "index of 40 documents" in text and "brackets: True" in text


def test_info_prints_the_measured_recall(model, corpus, tmp_path, capsys):
    folder = str(tmp_path / "int8")
    assert main(["index", corpus, "-o", folder, "--model", model, "--store", "int8"]) == 0
    assert main(["info", folder]) == 0
    assert re.search(r"recall@10 [01]\.\d{4}", capsys.readouterr().out)


def other_model(folder, change):
    """The model of the fixture with all weights multiplied, so that 1 leaves it as it is."""
    decoders.write_tokenizer(decoders.write_checkpoint("llama", folder))
    path = folder / "model.safetensors"
    save_file({name: tensor * np.float32(change) for name, tensor in load_file(path).items()}, path)
    return str(folder)


def test_an_index_knows_its_model(model, index, corpus, tmp_path, capsys):
    other = other_model(tmp_path / "other", 1.5)
    copy = other_model(tmp_path / "copy", 1)  # the same weights in another folder
    capsys.readouterr()
    assert main(["search", index, "night", "--model", other]) == 1
    error = capsys.readouterr().err
    assert "was made with another model: other weights or other settings" in error and error.count("\n") == 1
    assert main(["search", index, "night", "--model", copy]) == 0

    # Training again into the model's folder makes another model of it.
    own = str(tmp_path / "index")
    command = ["index", corpus, "-o", own, "--model", copy, "--chunk-size", "8"]
    assert main(command) == 0
    other_model(tmp_path / "copy", 1.1)
    capsys.readouterr()
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "holds vectors of another model" in error and "another folder, or remove this one first" in error
    assert main(["search", own, "night"]) == 1
    assert "was made with another model" in capsys.readouterr().err
    # A model that moved is the same model.
    other_model(tmp_path / "moved", 1)
    assert main(["index", corpus, "-o", own, "--model", str(tmp_path / "moved"), "--chunk-size", "8"]) == 0
    assert "nothing was left to encode" in capsys.readouterr().out


def test_an_index_of_several_files_grows_loses_documents_and_is_compacted(model, tmp_path, capsys):
    place = tmp_path / "corpus"
    place.mkdir()
    others = tmp_path / "index.counting" / "another call's"
    others.mkdir(parents=True)
    assert main(["index", str(place), "-o", str(tmp_path / "index")]) == 1
    assert others.exists()
    lines = [
        json.dumps({"_id": f"d{n}", "title": f"Bird {n}", "text": f"heron number {n}"}) + "\n"
        for n in range(12)
    ]
    (place / "a.jsonl").write_text("".join(lines[:5]))
    (place / "b.jsonl").write_text("".join(lines[5:9]))
    folder = str(tmp_path / "index")
    assert main(["index", str(place), "-o", folder, "--model", model, "--chunk-size", "4"]) == 0
    (place / "c.jsonl").write_text("".join(lines[9:]))
    assert main(["index", str(place), "-o", folder]) == 0  # the model and the options are the index's
    assert "12 documents" in capsys.readouterr().out
    news = tmp_path / "news.jsonl"
    news.write_text(lines[0] + json.dumps({"_id": "d1", "text": "a ferry"}) + "\n")
    assert main(["index", str(news), "-o", folder, "--add"]) == 0
    assert "(2 records, 1 replaced)\n1 encoded" in capsys.readouterr().out
    (tmp_path / "ids.txt").write_text("d99\n")
    assert main(["index", "-o", folder, "--remove", "d2", "--remove", f"@{tmp_path}/ids.txt"]) == 0
    assert (
        "1 documents removed, 11 left; 1 ids are not in the index, such as 'd99'" in capsys.readouterr().out
    )
    assert main(["info", folder, "--verify"]) == 0
    assert "2 removed documents still take space" in capsys.readouterr().out
    files = list(Path(folder).rglob("*.vectors"))
    assert main(["index", "-o", folder, "--compact"]) == 0
    assert "11 documents" in capsys.readouterr().out
    assert files and not any(path.exists() for path in files)
    assert main(["search", folder, "heron", "-k", "20", "--json"]) == 0
    hits = {hit["_id"]: hit for hit in json.loads(capsys.readouterr().out)["hits"]}
    assert set(hits) == {f"d{n}" for n in range(12)} - {"d2"}
    assert (hits["d5"]["title"], hits["d5"]["snippet"]) == ("Bird 5", "heron number 5")
    assert hits["d1"]["text"] == "a ferry"
    for arguments, message in (
        ([str(news), "-o", folder, "--compact"], "--remove and --compact take none"),
        (["-o", folder], "give a corpus to index or to --add"),
        (["-o", folder, "--compact", "--remove", "x"], "are two commands"),
        ([str(news), "-o", str(tmp_path / "none"), "--add", "--model", model], "is no index yet, to which"),
        ([str(news), "-o", str(tmp_path / "none")], "give the --model"),
        (
            [str(news), "-o", folder, "--add", "--store", "int8"],
            "store is 'float32' there, not 'int8'; leave it out",
        ),
        ([str(place / "a.jsonl"), "-o", folder], "the corpus is not the one"),
        ([str(news), "-", "-o", folder, "--add"], "passes by once"),
        ([str(tmp_path / "ids.txt"), "-o", folder, "--add"], "'d99' has no id of its own"),
    ):
        assert main(["index", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "ids.txt", "index", "news.jsonl"]


@pytest.mark.parametrize("resident", ["float32", "bfloat16", "int8"])
def test_search_with_vectors_on_the_devices_finds_the_same(resident, index, capsys):
    found = []
    for more in ([], ["--resident", resident]):
        assert main(["search", index, "the heron waits", "-k", "7", "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["hits"])
    assert [hit["_id"] for hit in found[0]] == [hit["_id"] for hit in found[1]]
    np.testing.assert_allclose(*([hit["score"] for hit in hits] for hits in found), rtol=1e-5)


def test_info_verifies_an_index(model, index, tmp_path, capsys):
    assert main(["info", index, "--verify"]) == 0
    assert "verified: every file fits its checksum" in capsys.readouterr().out
    broken = tmp_path / "broken"
    shutil.copytree(index, broken)
    for name in ("texts", "vectors"):
        path = next(broken.glob(f"*.{name}"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert main(["info", str(broken), "--verify"]) == 1
    error = capsys.readouterr().err
    assert ".texts: is damaged" in error and ".vectors: is damaged" in error and error.count("\n") == 1
    assert main(["info", model, "--verify"]) == 1
    assert "--verify is for an index" in capsys.readouterr().err


def test_export_is_loaded_by_transformers_rules(model, tmp_path):
    assert main(["export", model, "-o", str(tmp_path / "out"), "--pooling", "mean"]) == 0
    again = sgpt.BiEncoder.from_pretrained(tmp_path / "out")
    expected = sgpt.BiEncoder.from_pretrained(model, pooling="mean")
    assert again.pooling == "mean"
    np.testing.assert_array_equal(again.encode(["a heron"]), expected.encode(["a heron"]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "nowhere/at/all"],
        ["search", "nowhere", "query"],
        ["embed", "nowhere.jsonl", "-o", "out.npy", "--model", "{model}"],
        ["index", "{bad}", "-o", "index", "--model", "{model}"],
        ["index", "{corpus}", "-o", "index", "--model", "{model}", "--max-seq-length", "100000"],
        ["search", "{index}"],
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_1(
    arguments, model, corpus, index, tmp_path, monkeypatch, capsys
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"_id": "1", "text": "fine"}\n{"_id": "2"\n')
    monkeypatch.chdir(tmp_path)
    filled = [part.format(model=model, corpus=corpus, index=index, bad=bad) for part in arguments]
    assert main(filled) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["search", "{index}", "--queries", "q.tsv", "-o", "none/run.trec"],
            "none/run.trec: cannot be opened",
        ),
        (
            ["search", "{index}", "--queries", "spaces.tsv", "-o", "run.trec"],
            "cannot hold the query id 'q 1'",
        ),
        (["search", "{index}", "--queries", "q.tsv", "-o", "q.tsv"], "q.tsv: is also an input"),
        (["search", "{index}", "heron", "--hybrid", "-k", "1001"], "--hybrid joins the best 1000 of each"),
        (["search", "{index}", "heron", "--skip-bad-lines"], "--skip-bad-lines: for a file that is read"),
        (["index", "-o", "{index}", "--compact", "--format", "jsonl"], "--format: for a file that is read"),
        (["index", "-o", "{index}", "--remove", "x", "--format", "csv"], "--format: for a file that is read"),
        (["embed", "q.tsv", "-o", "{here}/q.tsv", "--model", "m"], "q.tsv: is also an input"),
        (
            ["rerank", "q.json", "--queries", "q.tsv", "--corpus", "c", "-o", "q", "--model", "m"],
            "q.json: is also",
        ),
        (
            ["export", "{index}", "-o", "x.faiss", "--dtype", "bfloat16", "--brackets"],
            "--brackets, --dtype: not for",
        ),
        (["export", ".", "-o", "{here}"], "is the model itself"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_work(
    arguments, message, index, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sgpt.BiEncoder, "from_settings", None)
    files = {"q.tsv": "q1\theron\n", "spaces.tsv": "q 1\theron\n", "q.json": '{"q1": {"d1": 1.0}}'}
    for name, content in files.items():
        Path(name).write_text(content)
    assert main([part.format(index=index, here=tmp_path) for part in arguments]) == 1
    assert message in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_killed_index_goes_on_bit_for_bit(model, corpus, tmp_path):
    def command(folder):
        options = ["--model", model, "--chunk-size", "4", "--store", "int8"]
        return [sys.executable, "-m", "sgpt_jax.cli", "index", corpus, "-o", str(folder), *options]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(
        command(tmp_path / "broken"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "broken" / "manifest.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(tmp_path / "broken"), check=True, capture_output=True)
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "broken" / file.name).read_bytes() == file.read_bytes(), file.name


def test_prompts_dimensions_and_adapters_reach_embed_index_and_search(corpus, tmp_path, capsys):
    model = str(folders.write_folder("harrier", tmp_path / "harrier"))
    options = ["--model", model, "--truncate-dim", "8", "--document-prompt", "passage: "]
    output = tmp_path / "vectors.npy"
    assert main(["embed", corpus, "-o", str(output), "--side", "document", *options]) == 0
    encoder = sgpt.BiEncoder.from_pretrained(model, truncate_dim=8)
    wanted = encoder.encode(texts_of(corpus), prompt="passage: ")
    np.testing.assert_allclose(np.load(output), wanted, atol=1e-5)

    folder = str(tmp_path / "index")
    assert main(["index", corpus, "-o", folder, *options]) == 0
    capsys.readouterr()
    # The index knows its dimensions and document prompt; queries may have another prompt each time.
    assert main(["search", folder, "heron", "-k", "1", "--json", "--query-prompt", "web_search_query"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    query = encoder.encode(["heron"], prompt_name="web_search_query")
    np.testing.assert_allclose(hit["score"], encoder.similarity(query, wanted).max(), rtol=1e-4)
    assert main(["search", folder, "heron", "--document-prompt", ""]) == 1
    assert "was made with another model" in capsys.readouterr().err
    assert main(["search", folder, "heron", "--truncate-dim", "9"]) == 1
    capsys.readouterr()

    base = decoders.write_checkpoint("llama", tmp_path / "base")
    decoders.write_tokenizer(base)
    adapter = str(write_adapter("plain", tmp_path / "adapter", base))
    vectors = []
    for arguments in (["--model", str(base), "--adapter", adapter], ["--model", adapter]):
        assert main(["embed", corpus, "-o", str(output), *arguments]) == 0
        vectors.append(np.load(output))
    np.testing.assert_array_equal(*vectors)
    assert main(["info", adapter]) == 0
    assert f"adapter: {adapter}" in capsys.readouterr().out


def test_an_index_has_the_similarity_of_its_folder(corpus, tmp_path, capsys):
    model = folders.write_folder("dense_chain", tmp_path / "dense")
    assert main(["index", corpus, "-o", str(tmp_path / "index"), "--model", str(model)]) == 0
    capsys.readouterr()
    assert main(["search", str(tmp_path / "index"), "heron", "-k", "1", "--json"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    encoder = sgpt.BiEncoder.from_pretrained(model)
    scores = encoder.encode_query("heron") @ encoder.encode_document(texts_of(corpus)).T
    np.testing.assert_allclose(hit["score"], scores.max(), rtol=1e-4)
    settings = json.loads((model / "config_sentence_transformers.json").read_text())
    folders.dump(model / "config_sentence_transformers.json", settings | {"similarity_fn_name": "manhattan"})
    assert main(["index", corpus, "-o", str(tmp_path / "other"), "--model", str(model)]) == 1
    assert "compares vectors by manhattan distance" in capsys.readouterr().err


def test_info_says_what_it_understood(tmp_path, capsys):
    folder = folders.write_folder("embeddinggemma", tmp_path / "gemma")
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    for line in (
        "gemma: gemma3_text, 3 layers, dimension 32",
        "attention: bidirectional, windows of 5 tokens either side, itself included, in 2 of 3 layers",
        "vectors: mean pooling, Dense 32 to 48 (Identity), Dense 48 to 32 (Identity), length 1; similarity cosine",
        "texts: brackets off, max_seq_length 90",
        "prompt document: 'title: none | text: '",
        "ends with '<eos>' (380)",
    ):
        assert line in text
    assert main(["info", str(folders.write_folder("qwen3_reranker", tmp_path / "reranker"))]) == 0
    assert "vectors: none (" in capsys.readouterr().out
