"""Damage to any file of an index, or any value of its manifest, is one clear error: never another result."""

import copy
import json
import random
import zlib

import numpy as np
import pytest
from indexes import encode, vectors_of

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import dump_json
from sgpt_jax.index import build as index_build
from sgpt_jax.index.build import build_index
from sgpt_jax.index.checksum import checksum
from sgpt_jax.index.search import Index

DOCUMENTS = [Document(f"d{n}", f"text {n}, \u00e9" * (1 + n % 5)) for n in range(70)]
QUERIES = vectors_of(["a", "b", "c"])


@pytest.fixture
def index(request, tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "SHARD_ROWS", 48)
    build_index(tmp_path / "i", DOCUMENTS, encode, chunk_size=16, dtype=request.param, metadata={"m": "x"})
    return tmp_path / "i"


def everything(folder):
    """All that an index can be asked for."""
    index = Index.open(folder)
    scores, rows = index.search(QUERIES, 70)
    everywhere = range(len(index))
    return [
        scores,
        rows,
        index.vectors(everywhere),
        index.ids(everywhere),
        index.texts(everywhere),
        index.hits(scores[0], rows[0]),
        index.info(),
    ]


def damages(content, draw):
    """(what was done, the damaged bytes): cut, zeroed, flipped, mixed up."""
    size = len(content)
    for _ in range(3):
        at = draw.randrange(size)
        yield f"cut at {at}", content[:at]
        end = min(size, at + draw.randint(1, 40))
        yield f"zeroed from {at} to {end}", content[:at] + bytes(end - at) + content[end:]
    for _ in range(8):
        at, bit = draw.randrange(size), draw.randrange(8)
        yield f"bit {bit} of byte {at}", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    yield "zeroed", bytes(size)
    yield "reversed", content[::-1]
    yield "random", draw.randbytes(size)
    yield "gone", None


@pytest.mark.parametrize("index", ["float32", "float16", "int8"], indirect=True)
def test_damage_to_any_file_is_named(index):
    draw = random.Random(1)
    names = sorted(path.name for path in index.iterdir())
    tried = 0
    for name in names:
        content = (index / name).read_bytes()
        for what, damaged in damages(content, draw):
            if damaged == content or (
                name == "manifest.json" and damaged and damaged.strip() == content.strip()
            ):
                continue
            tried += 1
            (index / name).unlink()
            if damaged is not None:
                (index / name).write_bytes(damaged)
            with pytest.raises(InputError) as error:
                everything(index)
                pytest.fail(f"{name}: {what}")
            assert name in str(error.value), (what, str(error.value))
            with pytest.raises(InputError) as error:
                Index.open(index).verify()
            assert name in str(error.value)
            (index / name).write_bytes(content)
    assert tried > 15 * len(names) - 10
    Index.open(index).verify()
    everything(index)


@pytest.mark.parametrize("index", ["int8"], indirect=True)
def test_every_value_of_the_manifest_has_a_type(index):
    path = index / "manifest.json"
    good = json.loads(path.read_text())
    strange = [None, True, -1, 2**60, 0.5, float("nan"), "x", "no", [], [1], {}, {"a": 1}]
    holders = [(), ("shards", 0)]
    for holder in holders:
        keys = good if not holder else good["shards"][0]
        for key in keys:
            for value in [*strange, "missing"]:
                bad = copy.deepcopy(good)
                target = bad if not holder else bad["shards"][0]
                if value == "missing":
                    del target[key]
                elif target[key] == value and type(target[key]) is type(value):
                    continue
                else:
                    target[key] = value
                path.write_text(json.dumps(bad))
                with pytest.raises(InputError, match=r"manifest\.json: is damaged"):
                    everything(index)


@pytest.mark.parametrize("index", ["float32"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": "x"}, "similarity must be one of cosine, dot, not 'x'"),
        ({"store_texts": "no"}, "store_texts must be true or false, not 'no'"),
        ({"recall": [1]}, "recall must be null, or shares"),
        ({"chunk_size": 0}, "chunk_size must be an integer from 1"),
        ({"metadata": []}, "metadata must be a JSON object"),
        ({"fingerprint": "xyz"}, "fingerprint must be 40 hexadecimal digits"),
        ({"calibration": 5}, "calibration is 5 for dtype float32"),
        ({"shard_size": 50}, "shard_size 50 is no multiple of chunk_size 16"),
        ({"more": 1}, "the key 'more' is unknown"),
        ({"metadata": {"m": "y"}}, "its checksum does not fit it"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_named(index, change, message):
    path = index / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        Index.open(index)


def test_a_manifest_nested_too_deeply(tmp_path):
    (tmp_path / "manifest.json").write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match="is damaged"):
        Index.open(tmp_path)


@pytest.mark.parametrize("name", ["json", "npz", "recall.npz", "calibration.npy", "manifest.json"])
def test_damage_while_an_index_is_being_built(tmp_path, name):
    """A build goes on over damage only where it ends with the same bytes."""

    def stop(rows):
        if rows == 32:
            raise KeyboardInterrupt

    def start(folder, **options):
        return build_index(folder, DOCUMENTS, encode, chunk_size=16, dtype="int8", **options)

    start(tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    draw = random.Random(2)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "broken", on_progress=stop)
    safe = {path.name: path.read_bytes() for path in (tmp_path / "broken").iterdir()}
    target = next(file for file in sorted(safe) if file.endswith(name) and (name in safe or file[0] == "0"))
    for what, damaged in damages(safe[target], draw):
        folder = tmp_path / what.replace(" ", "-")
        folder.mkdir()
        for file, content in safe.items():
            (folder / file).write_bytes(content)
        (folder / target).unlink()
        if damaged is not None:
            (folder / target).write_bytes(damaged)
        try:
            start(folder)
        except InputError as error:
            assert str(folder) in str(error)
            continue
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected, what


def test_an_index_of_an_earlier_version_is_read_with_one_note(tmp_path, caplog):
    build_index(tmp_path / "i", DOCUMENTS, encode, chunk_size=16)
    before = everything(tmp_path / "i")
    path = tmp_path / "i" / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("crc32", "fingerprint", "calibration"):
        del manifest[key]
    del manifest["shards"][0]["checks"]
    path.write_text(json.dumps(manifest | {"format": "sgpt-jax index 2"}))
    next((tmp_path / "i").glob("*.checks")).unlink()
    caplog.clear()
    after = everything(tmp_path / "i")
    assert [record.message for record in caplog.records if "earlier version" in record.message] == [
        f"{tmp_path / 'i'}: was made by an earlier version, without checksums and without the fingerprint of its "
        "model: damage and another model go unnoticed. Index again to have both"
    ]
    for one, other in zip(before[:-1], after[:-1], strict=True):
        np.testing.assert_array_equal(one, other)
    Index.open(tmp_path / "i").check_model("a" * 40)
    with pytest.raises(InputError, match="without checksums"):
        Index.open(tmp_path / "i").verify()
    with pytest.raises(InputError, match="holds an index of an earlier version"):
        build_index(tmp_path / "i", DOCUMENTS, encode, chunk_size=16)


def test_checksums_see_every_small_change():
    draw = np.random.default_rng(3)
    data = draw.integers(0, 256, (1 << 20) + 777, dtype=np.uint8)
    right = checksum(data)
    assert right == checksum(data.tobytes()) and checksum(b"") == 0 and checksum(b"abc") == zlib.crc32(b"abc")
    for _ in range(60):
        changed = data.copy()
        at = draw.integers(0, len(data), draw.integers(1, 4))
        changed[at] ^= (1 << draw.integers(0, 8, len(at))).astype(np.uint8)
        # two words of the same row of a block that change places, and two that lose and gain the same bit
        if (changed != data).any():
            assert checksum(changed) != right
    words = data[: 1 << 20].view("<u8")
    for one, other in ((0, 1), (0, 2048), (5, 70_000)):
        swapped = words.copy()
        swapped[[one, other]] = swapped[[other, one]]
        moved = words.copy()
        moved[one] += np.uint64(4)
        moved[other] -= np.uint64(4)
        for changed in (swapped, moved):
            assert checksum(changed) != checksum(words)


@pytest.mark.parametrize("index", ["float32"], indirect=True)
def test_only_what_is_read_is_checked(index):
    path = index / "000000000048-000000000096.texts"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    opened = Index.open(index)
    opened.search(QUERIES, 3)
    assert opened.texts([0, 63]) == [DOCUMENTS[0].text, DOCUMENTS[63].text]
    for _ in range(2):
        with pytest.raises(InputError, match=r"texts: is damaged: what it holds for documents 64 to 69"):
            opened.texts([64])


def test_the_checksum_of_a_manifest_is_of_its_values(tmp_path):
    build_index(tmp_path / "i", DOCUMENTS[:3], encode)
    value = json.loads((tmp_path / "i" / "manifest.json").read_text())
    found = value.pop("crc32")
    assert found == zlib.crc32(dump_json(value, None))
