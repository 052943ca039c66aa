"""The bi-encoder against the published recipe in torch, and every promise about inputs and batches."""

import dataclasses
import json
import warnings

import decoders
import jax
import numpy as np
import pytest
from gguf_files import write_gguf

import sgpt_jax as sgpt
from sgpt_jax.checkpoint import bias_sets as biases
from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.decoder.config import RotaryConfig
from sgpt_jax.decoder.model import split
from sgpt_jax.decoder.positions import rotary_frequencies
from sgpt_jax.errors import InputError
from sgpt_jax.packing import rows
from sgpt_jax.reports import EncodeReport

RECIPE = json.loads((decoders.FIXTURES / "sgpt/texts.json").read_text("utf-8"))
VECTORS = np.load(decoders.FIXTURES / "sgpt/vectors.npz")
TEXTS = RECIPE["texts"]
LIMIT = RECIPE["max_seq_length"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = decoders.write_checkpoint("gpt_neo", tmp_path_factory.mktemp("neo"), model_class="base")
    return decoders.write_tokenizer(path)


@pytest.fixture(scope="module")
def model(folder):
    return sgpt.BiEncoder.from_pretrained(folder, brackets=True, max_seq_length=LIMIT)


def quiet(encode, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode(*arguments, **options)


def assert_same(ours, theirs, tolerance=1e-5):
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("mode", ["weightedmean", "mean", "lasttoken", "cls"])
def test_vectors_equal_the_recipe_in_torch(folder, mode):
    model = sgpt.BiEncoder.from_pretrained(folder, pooling=mode, max_seq_length=LIMIT)
    assert_same(quiet(model.encode, TEXTS), VECTORS[f"plain/{mode}"])


def test_bracket_ids_and_vectors_equal_the_recipe(tmp_path):
    folder = decoders.write_checkpoint("gpt_neo", tmp_path, model_class="base")
    decoders.write_tokenizer(folder, placeholders=True)
    model = sgpt.BiEncoder.from_pretrained(folder, brackets=True, max_seq_length=LIMIT)
    for side, encode in (("query", model.encode_query), ("document", model.encode_document)):
        assert quiet(model.text.ids, TEXTS, side) == RECIPE["ids"][side]
        assert_same(quiet(encode, TEXTS), VECTORS[f"{side}/weightedmean"])


def test_tokenizers_with_bos(tmp_path):
    folder = decoders.write_checkpoint("llama", tmp_path, model_class="base")
    decoders.write_tokenizer(folder, bos=True)
    model = sgpt.BiEncoder.from_pretrained(folder, max_seq_length=LIMIT)
    assert quiet(model.text.ids, TEXTS) == RECIPE["ids"]["bos"]
    assert_same(quiet(model.encode, TEXTS), VECTORS["bos/weightedmean"])
    model = sgpt.BiEncoder.from_pretrained(folder, max_seq_length=LIMIT, brackets=True)
    assert quiet(model.text.ids, TEXTS, "query") == RECIPE["ids"]["bos_query"]
    assert_same(quiet(model.encode_query, TEXTS), VECTORS["bos_query/weightedmean"])


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("llama", "float32"), ("llama_tied", "float16"), ("qwen2", "float32"), ("qwen3", "float32")],
)
def test_gguf_equals_the_folder(variant, dtype, tmp_path):
    folder = decoders.write_checkpoint(variant, tmp_path / "folder")
    decoders.write_tokenizer(folder)
    ours = sgpt.BiEncoder.from_pretrained(write_gguf(variant, tmp_path / "model.gguf", dtype=dtype))
    theirs = sgpt.BiEncoder.from_pretrained(folder)
    # Qwen2's tokenizer composes characters and splits digits, which the folder's does not.
    texts = TEXTS if variant != "qwen2" else ["A heron waits in the shallow water.", "x", "", '["quoted"]']
    assert ours.text.ids(texts) == theirs.text.ids(texts)
    assert_same(ours.encode(texts), theirs.encode(texts), 1e-5 if dtype == "float32" else 2e-2)


def test_gguf_with_published_llama3_frequencies(tmp_path):
    file = open_checkpoint(write_gguf("llama", tmp_path / "model.gguf"))
    plain = rotary_frequencies(RotaryConfig(dim=64, base=500_000.0))
    for factor in (8.0, 32.0):
        scaled = RotaryConfig(dim=64, base=500_000.0, scaling="llama3", factor=factor)
        settings = file._llama3_scaling(plain / rotary_frequencies(scaled), 500_000.0)
        assert (settings["rope_type"], settings["factor"]) == ("llama3", factor)
    with pytest.raises(InputError, match="none of the published"):
        open_checkpoint(write_gguf("llama3", tmp_path / "other.gguf"))


def test_a_vector_does_not_depend_on_its_batch(model):
    together = quiet(model.encode_document, TEXTS)
    backwards = quiet(model.encode_document, TEXTS[::-1], batch_tokens=64)[::-1]
    alone = np.stack([quiet(model.encode_document, text) for text in TEXTS])
    assert_same(backwards, together)
    assert_same(alone, together)


def test_bfloat16_vectors_are_close_in_any_batch(folder):
    exact = quiet(sgpt.BiEncoder.from_pretrained(folder).encode, TEXTS, normalize=True)
    model = sgpt.BiEncoder.from_pretrained(folder, dtype="bfloat16")
    together = quiet(model.encode, TEXTS, normalize=True)
    alone = quiet(model.encode, TEXTS, normalize=True, batch_tokens=16)
    assert together.dtype == np.float32
    assert (together * alone).sum(axis=1).min() > 0.9995
    assert (together * exact).sum(axis=1).min() > 0.999


def test_shapes_and_types(model):
    assert model.encode([]).shape == (0, model.dimension)
    assert model.encode("one text").shape == (model.dimension,)
    assert model.encode(["a", "b"]).dtype == np.float32
    assert model.similarity(model.encode(["a", "b"]), model.encode("a")).shape == (2, 1)
    np.testing.assert_allclose(np.linalg.norm(model.encode(["a", ""], normalize=True), axis=1), 1, rtol=1e-6)
    assert np.isfinite(model.encode(["", " ", "\n"])).all()


@pytest.mark.parametrize("bad", [None, float("nan"), b"bytes", {"text": "x"}])
def test_what_is_not_a_str_is_refused_with_its_index(model, bad):
    with pytest.raises(TypeError, match="1"):
        model.encode(["fine", bad])


def test_similarity_is_the_cosine(model):
    a, b = np.array([[3.0, 0, 0], [0, 0, 0]]), np.array([[1.0, 1, 0], [-2, 0, 0]])
    np.testing.assert_allclose(model.similarity(a, b), [[np.sqrt(0.5), -1], [0, 0]], atol=1e-6)


def test_a_thousand_lengths_compile_few_programs(tmp_path):
    folder = decoders.write_checkpoint("bloom", tmp_path)
    decoders.write_tokenizer(folder)
    model = sgpt.BiEncoder.from_pretrained(folder, max_seq_length=1024)
    texts = ["x" * length for length in range(1, 1001)]
    lengths = {len(ids) for ids in model.text.ids(texts)}
    assert len(lengths) > 300
    order = np.random.RandomState(0).permutation(1000)
    jax.clear_caches()
    vectors = model.encode([texts[i] for i in order])
    assert rows.embed.of(split(model.decoder)[0])._cache_size() <= 12
    some = [0, 17, 500, 999]
    assert_same(vectors[some], model.encode([texts[order[i]] for i in some]))


def test_saved_models_come_back(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = sgpt.BiEncoder.from_pretrained(tmp_path / "saved")
    assert (again.pooling, again.text.brackets, again.text.max_seq_length) == ("weightedmean", True, LIMIT)
    np.testing.assert_array_equal(quiet(again.encode_query, TEXTS), quiet(model.encode_query, TEXTS))
    assert (tmp_path / "saved" / "README.md").exists()


def test_sentence_transformers_gives_the_same_vectors(folder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = [text for text in TEXTS if text.strip() and "\ud83d" not in text]
    for mode in ("weightedmean", "mean", "lasttoken"):
        model = sgpt.BiEncoder.from_pretrained(folder, pooling=mode, max_seq_length=LIMIT)
        model.save_pretrained(tmp_path / mode)
        theirs = sentence_transformers.SentenceTransformer(str(tmp_path / mode), device="cpu").encode(texts)
        ours = quiet(model.encode, texts, normalize=True)
        theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
        assert (ours * theirs).sum(axis=1).min() > 0.99999


def test_limits(folder):
    positions = decoders.config("gpt_neo")["max_position_embeddings"]
    assert sgpt.BiEncoder.from_pretrained(folder).text.max_seq_length == positions
    with pytest.raises(InputError, match=f"{positions} positions"):
        sgpt.BiEncoder.from_pretrained(folder, max_seq_length=positions + 1)
    with pytest.raises(InputError, match="pooling must be one of"):
        sgpt.BiEncoder.from_pretrained(folder, pooling="median")
    with pytest.raises(InputError):
        sgpt.BiEncoder.from_pretrained(folder / "nowhere")


def test_token_ids_outside_the_embedding_are_refused(folder, tmp_path):
    model = sgpt.BiEncoder.from_pretrained(folder)
    model.text.tokenizer.add_tokens(["heron"])  # one more id than the embedding has rows
    size = decoders.VOCAB_SIZE
    while len(model.text.tokenizer) <= size:
        model.text.tokenizer.add_tokens([f"filler{len(model.text.tokenizer)}"])
    word = model.text.tokenizer.convert_ids_to_tokens(size)
    with pytest.raises(InputError, match=str(size)):
        model.encode([f"a {word}"])


def test_a_bias_set_brings_its_settings(folder, tmp_path):
    model = sgpt.BiEncoder.from_pretrained(folder)
    _, params = split(model.decoder)
    values = {name: np.asarray(leaf) + 0.5 for name, leaf in biases.bias_leaves(params).items()}
    header = {
        "base_model": "tiny",
        "base_sha256": biases.weights_sha256(params),
        "pooling": "mean",
        "brackets": True,
    }
    biases.save_bias_set(tmp_path / "set.safetensors", biases.BiasSet(values, header))
    changed = sgpt.BiEncoder.from_pretrained(folder, biases=tmp_path / "set.safetensors")
    assert (changed.pooling, changed.text.brackets) == ("mean", True)
    assert np.abs(changed.encode(["a"]) - model.encode(["a"])).max() > 0.1
    changed.save_pretrained(tmp_path / "merged")
    merged = sgpt.BiEncoder.from_pretrained(tmp_path / "merged")
    np.testing.assert_array_equal(merged.encode_query(["a heron"]), changed.encode_query(["a heron"]))


def test_a_stream_of_texts(model):
    """Each chunk gets the vectors that it gets alone, empty ones too; the counts add up, and nothing is warned of."""
    chunks = [TEXTS[:3], [], TEXTS[3:9], ["a"], TEXTS]
    report = EncodeReport()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = list(
            model.encode_chunks(iter(chunks), side="document", normalize=True, batch_tokens=64, report=report)
        )
    assert [len(result) for result in results] == [len(chunk) for chunk in chunks]
    for chunk, result in zip(chunks, results, strict=True):
        alone = quiet(model.encode_document, chunk, normalize=True, batch_tokens=64)
        np.testing.assert_array_equal(result, alone)
    ids = [row for chunk in chunks for row in quiet(model.text.ids, chunk, "document")]
    assert (report.texts, report.tokens) == (len(ids), sum(map(len, ids)))
    assert 0 < report.cut <= sum(len(row) == LIMIT for row in ids)
    assert report.tokens_padded >= report.tokens and report.seconds >= report.waited > 0
    before = dataclasses.replace(report)
    assert list(model.encode_chunks(iter([]), report=report)) == []
    assert before.texts == report.texts and before.seconds < report.seconds  # counts are added


def test_an_error_in_a_stream_of_texts(model):
    def chunks():
        yield ["a heron"]
        yield ["a", 3]

    results = model.encode_chunks(chunks())
    with pytest.raises(TypeError, match="text 1"):
        list(results)
