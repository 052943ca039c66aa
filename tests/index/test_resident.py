"""Vectors on the devices: the answers of blocks from disk and of numpy in float64, on one device and on eight."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from devices import run_on_eight
from indexes import streamed

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.index import build as index_build
from sgpt_jax.index import device_top_k, resident
from sgpt_jax.index import held as on_devices
from sgpt_jax.index.build import build_index
from sgpt_jax.index.change import remove_documents
from sgpt_jax.index.search import Index
from sgpt_jax.index.topk import chunk_top_k

HELD = ["float32", "bfloat16", "int8"]
STORED = ["float32", "float16", "int8"]


def table(vectors):
    return streamed(lambda texts: vectors[[int(text) for text in texts]])


def build(folder, vectors, **options):
    # Ids whose order is neither that of the rows nor its reverse.
    documents = [Document(f"d{row * 7919 % 10007}", str(row)) for row in range(len(vectors))]
    build_index(folder, documents, table(vectors), **options)
    return [document.id for document in documents]


def same_up_to_rounding(index, queries, k, scores, rows):
    """Whether rows are in the order of float64 scores of the stored vectors, but for differences of float32."""
    stored = index.vectors(range(len(index))).astype(np.float64)
    exact = queries.astype(np.float64) @ stored.T
    best = -np.sort(-exact, axis=1)[:, :k]
    found = np.take_along_axis(exact, rows, axis=1)
    np.testing.assert_allclose(found, best, rtol=0, atol=2e-6 * np.abs(exact).max())
    np.testing.assert_allclose(scores, found, rtol=0, atol=2e-6 * np.abs(exact).max())
    assert all(len(set(some)) == k for some in rows.tolist())


def ranked(scores, ids, k):
    return sorted(range(len(ids)), key=lambda row: (scores[row], ids[row]), reverse=True)[:k]


def check_everything(folder, mesh):
    """All stores held as all dtypes, k from 1 to more than a device has; ties within and across shards."""
    index_build.SHARD_ROWS = 300
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((1300, 24)).astype(np.float32)
    vectors[:, :2] *= 6
    queries = draw.standard_normal((11, 24)).astype(np.float32)
    for stored in STORED:
        build(folder / stored, vectors, dtype=stored, similarity="dot", chunk_size=50)
        blocks = Index.open(folder / stored)
        for held in HELD:
            index = Index.open(folder / stored, mesh=mesh, resident=held)
            assert index._resident is not None and index._resident.dtype == held
            for k in (1, 10, 400, 1300, 5000):
                scores, rows = index.search(queries, k)
                assert scores.shape == rows.shape == (11, min(k, 1300))
                same_up_to_rounding(index, queries, min(k, 1300), scores, rows)
                expected = blocks.search(queries, k)
                np.testing.assert_allclose(scores, expected[0], rtol=0, atol=3e-6 * np.abs(expected[0]).max())
    # Small integers: scores are exact and often equal, across blocks, devices and shards.
    whole = draw.integers(-1, 2, (1300, 6)).astype(np.float32)
    whole[draw.integers(0, 1300, 200)] = 0
    queries = draw.integers(-1, 2, (19, 6)).astype(np.float32)
    queries[3] = 0
    ids = build(folder / "ties", whole, similarity="dot", chunk_size=50)
    exact = queries @ whole.T
    for held in HELD:
        index = Index.open(folder / "ties", mesh=mesh, resident=held)
        for k in (1, 7, 170, 1299, 1300):
            scores, rows = index.search(queries, k)
            for query in range(len(queries)):
                expected = ranked(exact[query], ids, k)
                assert rows[query].tolist() == expected, (held, k, query)
                assert scores[query].tolist() == exact[query, expected].tolist()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(index_build, "SHARD_ROWS", 300)
    monkeypatch.setattr(on_devices, "CPU_ELEMENTS", (6000,))  # 5 blocks of 256 rows and 24 dimensions


def test_one_device_gives_the_answers_of_blocks_and_of_numpy(tmp_path, small_blocks):
    check_everything(tmp_path, None)


@pytest.mark.parametrize("held", HELD)
def test_programs_of_64_bits_find_the_same(held, tmp_path):
    vectors = np.random.default_rng(3).standard_normal((40, 8)).astype(np.float32)
    build(tmp_path / "i", vectors, similarity="dot")
    index = Index.open(tmp_path / "i", resident=held)
    with jax.enable_x64(True):
        scores, rows = index.search(vectors[:2], 3)
    assert rows.tolist() == index.search(vectors[:2], 3)[1].tolist() and scores.dtype == np.float32


def test_eight_devices_give_the_answers_of_blocks_and_of_numpy(tmp_path):
    code = """
        import sys
        from pathlib import Path
        import jax
        import index.test_resident as tests
        from sgpt_jax.decoder.sharding import make_mesh
        from sgpt_jax.index import held
        assert len(jax.devices()) == 8
        held.CPU_ELEMENTS = (1500,)
        tests.check_everything(Path(sys.argv[1]), make_mesh("data=2,fsdp=4"))
    """
    run_on_eight(code, tmp_path)


def test_many_blocks_skip_chunks_that_cannot_matter(tmp_path, monkeypatch):
    """More chunks a block than are looked into, best rows late and early: all three cases of a block."""
    monkeypatch.setattr(on_devices, "CPU_ELEMENTS", (4 * 8192,))
    draw = np.random.default_rng(1)
    vectors = draw.standard_normal((40_000, 4)).astype(np.float32)
    vectors[30_000:38_000] *= 3
    build(tmp_path / "i", vectors, similarity="dot", chunk_size=8192)
    index = Index.open(tmp_path / "i", resident="float32")
    queries = draw.standard_normal((9, 4)).astype(np.float32)
    for k in (1, 50, 100):
        same_up_to_rounding(index, queries, k, *index.search(queries, k))


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("held", ["bfloat16", "int8"])
def test_rows_of_few_bits_meet_float32_queries_at_full_precision(tmp_path, monkeypatch, held, three):
    draw = np.random.default_rng(2)
    vectors = draw.standard_normal((500, 64)).astype(np.float32)
    build(tmp_path / "i", vectors, dtype="int8" if held == "int8" else "float32", similarity="dot")
    index = Index.open(tmp_path / "i", resident=held)
    monkeypatch.setattr(index._resident._held, "_three_parts", three)
    queries = draw.standard_normal((5, 64)).astype(np.float32)
    scores, rows = map(np.asarray, index._resident._held.start(queries, 500))
    stored = index.vectors(range(500))
    if held == "bfloat16":
        stored = stored.astype(on_devices.HELD["bfloat16"]).astype(np.float64)
    exact = np.take_along_axis(queries.astype(np.float64) @ stored.T, rows[:5], axis=1)
    np.testing.assert_allclose(scores[:5], exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_three_bfloat16_parts_are_a_float32():
    values = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    parts = device_top_k.split_in_three(values).astype(np.float64)
    np.testing.assert_array_equal(parts.sum(axis=0), values)
    assert device_top_k.split_in_three(values).dtype == on_devices.HELD["bfloat16"]


@pytest.mark.parametrize("k", [1, 5, 130, 600])
def test_top_k_by_chunk_maxima_has_the_values_of_top_k(k):
    draw = np.random.default_rng(4)
    scores = draw.integers(0, 50, (6, 1024)).astype(np.float32)
    scores[2] = 7
    maxima = scores.reshape(6, -1, 128).max(axis=2)
    found, columns = map(np.asarray, chunk_top_k(jax.numpy.asarray(scores), jax.numpy.asarray(maxima), k, 8))
    np.testing.assert_array_equal(found, -np.sort(-scores, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(scores, columns, axis=1), found)
    assert all(len(set(some)) == k for some in columns.tolist())


def test_what_does_not_fit_is_searched_in_blocks_with_the_arithmetic(tmp_path, monkeypatch, caplog):
    vectors = np.random.default_rng(5).standard_normal((300, 8)).astype(np.float32)
    build(tmp_path / "i", vectors)
    monkeypatch.setattr(resident, "free_memory", lambda device: 10_000)
    index = Index.open(tmp_path / "i", resident="bfloat16")
    assert index._resident is None
    (message,) = [record.message for record in caplog.records]
    assert "as bfloat16 on 1 devices, each would hold 384 rows of 16 bytes" in message
    assert "searched in blocks from disk, with the same results" in message
    expected = Index.open(tmp_path / "i").search(vectors[:3], 5)
    for ours, theirs in zip(index.search(vectors[:3], 5), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_unknown_dtype_and_damage_are_refused(tmp_path):
    vectors = np.random.default_rng(6).standard_normal((300, 8)).astype(np.float32)
    build(tmp_path / "i", vectors)
    with pytest.raises(InputError, match="resident must be one of float32, bfloat16, int8, not 'float64'"):
        Index.open(tmp_path / "i", resident="float64")
    path = next((tmp_path / "i").glob("*.vectors"))
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="vectors: is damaged"):
        Index.open(tmp_path / "i", resident="int8")


def test_blocks_are_large_where_there_is_memory():
    sizes, gigabyte = on_devices.ACCELERATOR_ELEMENTS, 1 << 30
    rows = [
        on_devices.Layout.fitting(10_000_000, 768, "bfloat16", 1, free * gigabyte, sizes).rows
        for free in (70, 25, 10)
    ]
    assert rows[0] * 768 > 1 << 28 > rows[1] * 768 and rows[1] == rows[2]
    assert on_devices.Layout.fitting(10_000_000, 768, "bfloat16", 1, 10 * gigabyte, sizes).fits(20 * gigabyte)
    assert not on_devices.Layout.fitting(10_000_000, 768, "bfloat16", 1, 10 * gigabyte, sizes).fits(
        10 * gigabyte
    )


@pytest.mark.parametrize("held", HELD)
def test_scores_are_never_of_all_rows(tmp_path, small_blocks, held):
    """No buffer of the compiled program has the size of queries times rows of a device."""
    vectors = np.random.default_rng(7).standard_normal((1300, 24)).astype(np.float32)
    build(tmp_path / "i", vectors)
    held_rows = Index.open(tmp_path / "i", resident=held)._resident
    queries, kept, mesh = 32, 11, held_rows._mesh
    blocks, rows = held_rows._layout.blocks, held_rows._layout.rows
    assert blocks * rows >= 1300 and blocks > 4
    best = device_top_k.nothing(mesh, 1, queries, kept)
    vectors_held, factors, _ = held_rows._held._blocks[0]
    arguments = (np.zeros((1, queries, 24), np.float32), np.zeros(queries, np.float32), vectors_held, factors)
    compiled = device_top_k.look.lower(mesh, best, *arguments, np.zeros(3, np.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * queries * rows * 4 + rows * 24 * 4
    assert 4 * queries * rows * 4 + rows * 24 * 4 < queries * 1300 * 4 * 4


TOGETHER = """
import argparse, json, sys
import numpy as np
from sgpt_jax.index import held as on_devices
from sgpt_jax.index.search import Index
from sgpt_jax.runtime import processes

folder, address, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
with processes.session(argparse.Namespace(distributed=False, coordinator=address, processes=2, process=number)):
    on_devices.CPU_ELEMENTS = (6000,)
    queries, answers = np.load(folder + "/queries.npy"), []
    for held in ("float32", "bfloat16", "int8"):
        index = Index.open(folder + "/i", resident=held)
        assert index._resident is not None and index._resident._held.mesh.devices.size == 2
        share = queries[:4] if number == 0 else queries[4:]
        answers.append([part.tolist() for part in index.search(share, 300)])
        asked = queries[:2] if number == 1 else queries[:0]  # only one of them is asked
        assert len(index.search(asked, 3)[0]) == len(asked)
    with open(f"{folder}/{number}.json", "w") as stream:
        json.dump(answers, stream)
"""


def test_two_processes_hold_a_share_each_and_answer_their_own_queries(tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "SHARD_ROWS", 300)
    draw = np.random.default_rng(8)
    vectors = draw.standard_normal((700, 24)).astype(np.float32)
    ids = build(tmp_path / "i", vectors, similarity="dot", chunk_size=50)
    remove_documents(tmp_path / "i", ids[5:400:7])
    queries = draw.standard_normal((7, 24)).astype(np.float32)
    np.save(tmp_path / "queries.npy", queries)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), address, str(number)], env=environment
        )
        for number in range(2)
    ]
    assert [process.wait() for process in started] == [0, 0]
    shares = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    scores, rows = Index.open(tmp_path / "i").search(queries, 300)
    for held in range(3):
        for part, expected in enumerate((scores, rows)):
            found = np.concatenate([np.array(share[held][part]) for share in shares])
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
