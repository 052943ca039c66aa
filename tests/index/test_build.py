"""A build that is killed at any moment and goes on ends with the same bytes; another corpus or model is refused."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from devices import TESTS
from indexes import encode, streamed, vectors_of

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document, read_corpus
from sgpt_jax.files.lines import write_jsonl
from sgpt_jax.index import build as index_build
from sgpt_jax.index.build import build_index
from sgpt_jax.index.search import Index


def corpus(count):
    return [Document(f"d{number}", f"text of {number}, é" * (number % 5)) for number in range(count)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from sgpt_jax.index import build as index_build
from sgpt_jax.index.files import Manifest
from sgpt_jax.files.corpora import read_corpus
sys.path.insert(0, {tests!r})
from indexes import streamed, vectors_of

index_build.SHARD_ROWS = 512
folder, source, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
random.seed(seed)

@streamed
def slow(texts):
    time.sleep(0.06)  # 47 chunks: longer than the ten attempts together, so that each of them is killed
    return vectors_of(texts)

def attempt(seconds, more=0):
    start = rows()
    pid = os.fork()
    if not pid:
        index_build.build_index(folder, read_corpus(source), slow, dtype="int8", chunk_size=64, metadata={{"m": 1}})
        os._exit(0)
    if seconds is not None:
        while rows() < start + more:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

def rows():
    if not os.path.exists(os.path.join(folder, "manifest.json")):
        return 0
    return Manifest.load(Path(folder)).rows

kills = []
while len(kills) < 10:
    # Half of them after some work, however busy the machine is.
    if attempt(random.uniform(0.01, 0.2), 64 * (len(kills) % 2)) == signal.SIGKILL:
        kills.append(rows())
    else:
        break
print(json.dumps({{"kills": kills, "status": attempt(None)}}))
"""


def test_ten_kills_at_random_moments_change_no_byte(tmp_path):
    source = tmp_path / "corpus.jsonl"
    write_jsonl(source, ({"_id": document.id, "text": document.text} for document in corpus(3000)))
    script = tmp_path / "killer.py"
    script.write_text(KILLER.format(tests=str(TESTS)))
    killed = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, str(script), str(killed), str(source), "10"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == 0, done.stderr
    assert len(result["kills"]) == 10
    assert len({rows for rows in result["kills"] if 0 < rows < 3000}) >= 4  # they did interrupt the work

    code = f"""
        from sgpt_jax.index import build as index_build
        import sys; sys.path.insert(0, {str(TESTS)!r})
        from indexes import encode
        from sgpt_jax.files.corpora import read_corpus
        index_build.SHARD_ROWS = 512
        index_build.build_index({str(tmp_path / "whole")!r}, read_corpus({str(source)!r}), encode,
                                dtype="int8", chunk_size=64, metadata={{"m": 1}})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert files(killed) == files(tmp_path / "whole")
    index = Index.open(killed)
    assert index.ids(range(3000)) == [document.id for document in read_corpus(source)]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_stop_at_every_write_changes_no_byte(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(index_build, "SHARD_ROWS", 6)
    documents = corpus(11)

    def build(name):
        return build_index(tmp_path / name, documents, encode, dtype=dtype, chunk_size=3)

    build("whole")
    expected = files(tmp_path / "whole")
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    calls = 0
    stop_at = -1

    def counted(name):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Stop
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    build("counted")
    total = calls
    assert total > 30
    for step in range(1, total + 1):
        calls, stop_at = 0, step
        name = f"stopped-{step}"
        with pytest.raises(Stop):
            build(name)
        stop_at = -1
        build(name)
        assert files(tmp_path / name) == expected, step


def test_half_written_rows_behind_the_manifest_are_cut_off(tmp_path):
    documents = corpus(20)
    build_index(tmp_path / "whole", documents, encode, chunk_size=4)

    def stop(rows):
        if rows == 8:
            raise Stop

    with pytest.raises(Stop):
        build_index(tmp_path / "i", documents, encode, chunk_size=4, on_progress=stop)
    for path in (tmp_path / "i").iterdir():
        if path.suffix != ".json":
            path.write_bytes(path.read_bytes() + b"half")
    (tmp_path / "i" / ".manifest.json.123.partial").write_text("{")
    build_index(tmp_path / "i", documents, encode, chunk_size=4)
    assert files(tmp_path / "i") == files(tmp_path / "whole")


def interrupted(folder, documents, after, **options):
    """An index with the first ``after`` documents, unfinished."""

    def stop(rows):
        if rows >= after:
            raise Stop

    with pytest.raises(Stop):
        build_index(folder, documents, encode, chunk_size=4, on_progress=stop, **options)


def test_only_the_rest_is_encoded(tmp_path):
    interrupted(tmp_path / "i", corpus(20), 8)
    batches: list[int] = []
    progress: list[int] = []

    @streamed
    def watched(texts):
        batches.append(len(texts))
        return vectors_of(texts)

    build_index(tmp_path / "i", corpus(18), watched, chunk_size=4, on_progress=progress.append)
    assert batches == [4, 4, 2]
    assert progress == [8, 12, 16, 18]
    build_index(tmp_path / "i", corpus(18), watched, chunk_size=4)
    assert batches == [4, 4, 2]


def test_unfinished_index_is_not_opened(tmp_path):
    interrupted(tmp_path / "i", corpus(20), 8)
    with pytest.raises(InputError, match="unfinished \\(8 documents so far\\)"):
        Index.open(tmp_path / "i")


@pytest.mark.parametrize(
    "changed",
    [
        [Document("d0", "other"), *corpus(20)[1:]],
        [Document("other", ""), *corpus(20)[1:]],
        [corpus(20)[1], corpus(20)[0], *corpus(20)[2:]],
        corpus(20)[1:],
        corpus(7),
    ],
)
def test_another_corpus_is_refused(tmp_path, changed):
    interrupted(tmp_path / "i", corpus(20), 8)
    before = files(tmp_path / "i")
    with pytest.raises(InputError, match="the corpus is not the one that this index was begun with"):
        build_index(tmp_path / "i", changed, encode, chunk_size=4)
    assert files(tmp_path / "i") == before


def test_moving_a_character_between_id_and_text_is_a_change(tmp_path):
    interrupted(tmp_path / "i", [Document("ab", "c"), *corpus(20)], 4)
    with pytest.raises(InputError, match="differ"):
        build_index(tmp_path / "i", [Document("a", "bc"), *corpus(20)], encode, chunk_size=4)


def test_finished_index_and_a_corpus_that_grew_or_shrank(tmp_path):
    build_index(tmp_path / "i", corpus(10), encode, chunk_size=4)
    assert len(build_index(tmp_path / "i", corpus(11), encode, chunk_size=4)) == 11
    with pytest.raises(InputError, match="ends after 9 documents"):
        build_index(tmp_path / "i", corpus(9), encode, chunk_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float32' there and 'float16' now"),
        ({"similarity": "dot"}, "similarity is 'cosine' there and 'dot' now"),
        ({"chunk_size": 5}, "chunk_size is 4 there and 5 now"),
        ({"store_texts": False}, "store_texts is True there and False now"),
        ({"metadata": {"model": "b"}}, "model is 'a' there and 'b' now"),
        ({"metadata": {"model": "a", "brackets": True}}, "brackets is None there and True now"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_options_are_refused(tmp_path, options, message, finished):
    same: dict[str, Any] = {"chunk_size": 4, "metadata": {"model": "a"}}
    if finished:
        build_index(tmp_path / "i", corpus(20), encode, **same)
    else:
        interrupted(tmp_path / "i", corpus(20), 8, metadata={"model": "a"})
    with pytest.raises(InputError, match=message):
        build_index(tmp_path / "i", corpus(20), encode, **{**same, **options})


def test_another_dimension_is_refused(tmp_path):
    interrupted(tmp_path / "i", corpus(20), 8)
    with pytest.raises(InputError, match="the encoder gives 8 dimensions, but the index has 16"):
        build_index(
            tmp_path / "i", corpus(20), streamed(lambda texts: vectors_of(texts)[:, :8]), chunk_size=4
        )


def test_column_that_lost_rows_is_noticed_when_going_on(tmp_path):
    interrupted(tmp_path / "i", corpus(20), 8)
    path = next((tmp_path / "i").glob("*.vectors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="vectors: is cut short"):
        build_index(tmp_path / "i", corpus(20), encode, chunk_size=4)


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and not an index"):
        build_index(tmp_path, corpus(3), encode)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(InputError, match="cannot be made"):
        build_index(tmp_path / "notes.txt", corpus(3), encode)
    with pytest.raises(InputError, match="local folder"):
        build_index("gs://bucket/index", corpus(3), encode)


def test_two_writers_at_once(tmp_path):
    @streamed
    def second(texts):
        with pytest.raises(InputError, match="another process is writing"):
            build_index(tmp_path / "i", corpus(3), encode)
        return vectors_of(texts)

    build_index(tmp_path / "i", corpus(3), second)


def test_error_in_the_corpus_keeps_what_is_done(tmp_path):
    def broken():
        yield from corpus(9)
        raise InputError("line 10")

    with pytest.raises(InputError, match="line 10"):
        build_index(tmp_path / "i", broken(), encode, chunk_size=4)
    build_index(tmp_path / "i", corpus(12), encode, chunk_size=4)
    build_index(tmp_path / "whole", corpus(12), encode, chunk_size=4)
    assert files(tmp_path / "i") == files(tmp_path / "whole")


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"dtype": "int4"}, {"similarity": "l2"}])
def test_options_that_do_not_exist(tmp_path, options):
    with pytest.raises(InputError, match="not possible"):
        build_index(tmp_path / "i", corpus(3), encode, **options)
    assert not (tmp_path / "i").exists()
