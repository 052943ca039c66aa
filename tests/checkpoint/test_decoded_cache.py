"""Decoded weights kept on disk: the same bits with and without them, and no trouble ever."""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import decoders
import jax
import numpy as np
import pytest
from gguf_files import write_gguf

from sgpt_jax import BiEncoder, load_decoder, make_mesh
from sgpt_jax.checkpoint import decoded_cache
from sgpt_jax.checkpoint.gguf import GgufFile
from sgpt_jax.decoder.model import split
from sgpt_jax.errors import InputError
from sgpt_jax.folder.source import resolve
from sgpt_jax.load import load_parts, open_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(decoded_cache.VARIABLE, str(folder))
    monkeypatch.setattr(decoded_cache, "MIN_BYTES", 0)
    return folder


@pytest.fixture
def model(tmp_path):
    return write_gguf("llama", tmp_path / "model.gguf")


def leaves(source, dtype="float32"):
    return jax.tree.map(np.asarray, split(load_decoder(source, dtype))[1])


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), a, b))


def forbid_decoding(monkeypatch):
    def tensors(self):
        raise AssertionError("decoded again")

    monkeypatch.setattr(GgufFile, "tensors", tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_time_gives_the_same_bits_without_decoding(cache, model, dtype, monkeypatch):
    first = leaves(model, dtype)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setenv(decoded_cache.VARIABLE, "off")
        assert same(leaves(model, dtype), first)
    forbid_decoding(monkeypatch)
    moved = shutil.copy(model, model.with_name("elsewhere.gguf"))
    for source in (model, moved):
        assert same(leaves(source, dtype), first)


def test_vectors_and_ids_are_the_same(cache, model, monkeypatch):
    texts = ["a b c", "", "some longer text, with 12 numbers"]
    first = BiEncoder.from_pretrained(model)
    forbid_decoding(monkeypatch)
    second = BiEncoder.from_pretrained(model)
    assert first.text.ids(texts) == second.text.ids(texts)
    assert first.encode(texts).tobytes() == second.encode(texts).tobytes()


def test_a_mesh_reads_what_is_kept(cache, model, monkeypatch):
    first = leaves(model)
    forbid_decoding(monkeypatch)
    mesh = make_mesh("data=1,fsdp=1,tensor=1")
    assert same(jax.tree.map(np.asarray, split(load_decoder(model, mesh=mesh))[1]), first)


def test_torch_files_need_torch_once(cache, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    folder = decoders.write_checkpoint("gpt_neo", tmp_path / "model", fmt="bin", shards=2)
    first = leaves(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert same(leaves(folder), first)


def test_a_classifier_is_refused_after_a_re_ranker_has_read_it(cache, tmp_path):
    torch = pytest.importorskip("torch")
    folder = decoders.write_tokenizer(decoders.write_checkpoint("llama", tmp_path / "model", fmt="bin"))
    weights = folder / "pytorch_model.bin"
    head = {"score.weight": torch.ones(1, decoders.config("llama")["hidden_size"])}
    torch.save(torch.load(weights) | head, weights)
    load_parts(open_model(resolve(folder)), "float32", None, score_head=True)
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(InputError, match="score"):
        load_decoder(folder)


def test_safetensors_and_small_files_are_not_kept(cache, model, tmp_path, monkeypatch):
    load_decoder(decoders.write_checkpoint("llama", tmp_path / "folder"))
    monkeypatch.setattr(decoded_cache, "MIN_BYTES", 10_000_000)
    load_decoder(model)
    assert not cache.exists()


def test_a_changed_checkpoint_is_decoded_again(cache, model):
    before = leaves(model)
    facts = os.stat(model)
    content = bytearray(model.read_bytes())
    content[-4] ^= 1  # within the last tensor
    model.write_bytes(content)
    os.utime(model, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert not same(leaves(model), before)


@pytest.mark.parametrize("damage", ["cut short", "no file of this kind", "other leaves"])
def test_damaged_entries_are_replaced(cache, model, damage, tmp_path):
    first = leaves(model)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    if damage == "cut short":
        entry.write_bytes(whole[:-8])
    elif damage == "no file of this kind":
        entry.write_bytes(b"nothing")
    else:
        load_decoder(write_gguf("qwen2", tmp_path / "other.gguf"))
        (other,) = set(cache.iterdir()) - {entry}
        entry.write_bytes(other.read_bytes())
    assert same(leaves(model), first)
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("seed", range(4))
def test_a_file_damaged_at_random_is_not_believed(cache, model, seed):
    first = leaves(model)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    draw = np.random.default_rng(seed)
    for at in (int(draw.integers(2_000)), int(draw.integers(len(whole)))):  # in the header and anywhere
        flipped = whole[:at] + bytes([whole[at] ^ 1 << int(draw.integers(8))]) + whole[at + 1 :]
        zeroed = whole[:at] + bytes(len(whole[at : at + 64])) + whole[at + 64 :]
        for damaged in (flipped, zeroed, whole[:at]):
            entry.write_bytes(damaged)
            assert same(leaves(model), first), at
            entry.unlink()  # the file may stay mapped: the next damage is to another one
            entry.write_bytes(whole)


def test_nothing_is_kept_where_there_is_no_room(cache, model, monkeypatch):
    first = leaves(model)
    shutil.rmtree(cache)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        assert same(leaves(model), first)
        assert not list(cache.iterdir())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert same(leaves(model), first)
        assert not list(cache.iterdir())
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    assert same(leaves(model), first)


def test_an_interruption_leaves_nothing(cache, model, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_decoder(model)
    assert not list(cache.iterdir())


def test_what_is_old_is_removed(cache, model, tmp_path):
    load_decoder(model)
    (entry,) = cache.iterdir()
    killed = cache / "x.1.2.partial"
    killed.touch()
    other = write_gguf("qwen2", tmp_path / "other.gguf")
    load_decoder(other)
    assert killed.exists()  # it could be at work
    for file in (entry, killed):
        os.utime(file, (0, 0))
    load_decoder(write_gguf("llama_tied", tmp_path / "third.gguf"))
    assert not entry.exists()
    assert not killed.exists()
    assert len(list(cache.iterdir())) == 2


def test_use_keeps_an_entry(cache, model):
    load_decoder(model)
    (entry,) = cache.iterdir()
    os.utime(entry, (0, 0))
    load_decoder(model)
    assert entry.stat().st_mtime > 1e9


def test_writers_at_the_same_time(cache, model):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(leaves, [model] * 4))
    assert all(same(found[0], other) for other in found)
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


def test_donated_arrays_do_not_write_to_the_file(cache, model):
    load_decoder(model)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    params = split(load_decoder(model))[1]
    jax.block_until_ready(jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params))
    assert entry.read_bytes() == whole
