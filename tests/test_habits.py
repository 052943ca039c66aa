"""What users of sentence-transformers write, and what they get."""

import copy
import dataclasses
import types
from unittest import mock

import decoders
import jax
import numpy as np
import pytest

import sgpt_jax as sgpt
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.folder import hub
from sgpt_jax.load import token_limit
from sgpt_jax.packing import stream
from sgpt_jax.precision import quantize_embeddings

TEXTS = [f"a heron number {i} waits" + " in the shallow water" * (i % 4) for i in range(24)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = decoders.write_checkpoint("gpt_neo", tmp_path_factory.mktemp("habits") / "neo")
    return sgpt.BiEncoder.from_pretrained(decoders.write_tokenizer(folder))


@pytest.fixture(scope="module")
def scorer(model):
    return sgpt.CrossEncoder.from_pretrained(model.source["model"])


def test_names_of_sentence_transformers(model):
    ours = model.encode(TEXTS, normalize=True, truncate_dim=8)
    theirs = model.encode(
        TEXTS,
        batch_size=32,
        normalize_embeddings=True,
        truncate_dim=8,
        show_progress_bar=False,
        convert_to_numpy=True,
        convert_to_tensor=False,
        device=None,
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(
        model.encode_query(TEXTS[:2], normalize_embeddings=True).shape, (2, model.dimension)
    )


def test_batch_size_bounds_the_texts_of_a_batch(model, monkeypatch):
    sizes = []
    count = stream.vector_indices
    monkeypatch.setattr(
        stream, "vector_indices", lambda plan, room: sizes.append(len(plan.texts)) or count(plan, room)
    )
    vectors = model.encode(TEXTS)
    free, sizes[:] = max(sizes), []
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=3), vectors, atol=1e-5)
    assert max(sizes) <= 3 < free and sum(sizes) == len(TEXTS)
    with pytest.raises(InputError, match="batch_size must be positive, not 0"):
        model.encode(TEXTS, batch_size=0)
    for tokens in (0, -1):
        with pytest.raises(InputError, match=f"batch_tokens must be positive, not {tokens}"):
            model.encode(TEXTS, batch_tokens=tokens)


@pytest.mark.parametrize("limit", ["8", 8.5, True])
def test_a_limit_is_a_whole_number(model, limit):
    with pytest.raises(InputError, match=f"max_seq_length must be a whole number, not {limit!r}"):
        token_limit(model.decoder.config, limit)


@pytest.mark.parametrize(
    ("argument", "value", "instead"),
    [
        ("convert_to_tensor", True, "torch.from_numpy"),
        ("convert_to_numpy", False, "jax.numpy.asarray"),
        ("output_value", "token_embeddings", "model.decoder"),
        ("device", "cuda", "mesh="),
        ("nonsense", 1, "no argument 'nonsense'$"),
    ],
)
def test_what_is_left_out_names_what_to_use(model, argument, value, instead):
    with pytest.raises(TypeError, match=instead):
        model.encode(TEXTS, **{argument: value})


def test_loading_as_sentence_transformers_does(model):
    with pytest.raises(TypeError, match="from_pretrained\\(source\\) loads a model"):
        sgpt.BiEncoder("Muennighoff/SGPT-125M-weightedmean-nli-bitfit")
    with pytest.raises(TypeError, match="never run"):
        sgpt.BiEncoder.from_pretrained("somewhere", trust_remote_code=True)
    with pytest.raises(TypeError, match="max_seq_length"):
        sgpt.CrossEncoder.from_pretrained("somewhere", max_length=512)
    with pytest.raises(AttributeError, match="here it is dimension"):
        model.get_sentence_embedding_dimension()
    assert dataclasses.replace(model, name="other").name == "other"


def test_precision():
    vectors = np.array([[-1, 0.5, 2, 0, 1, 1, -1, 1, 3], [1, 0.5, -2, 1, 1, -1, 1, 1, -3]], np.float32)
    np.testing.assert_array_equal(
        quantize_embeddings(vectors, "ubinary"), [[0b01101101, 0b10000000], [0b11011011, 0]]
    )
    np.testing.assert_array_equal(quantize_embeddings(vectors, "binary"), [[-19, 0], [91, -128]])
    exact = np.array([[0, 255, 7], [255, 0, 7], [100.5, 3, 7]], np.float32)
    np.testing.assert_array_equal(
        quantize_embeddings(exact, "int8"), [[-128, 127, -128], [127, -128, -128], [-28, -125, -128]]
    )
    ranges = np.array([[-2.0] * 9, [2.0] * 9])
    assert quantize_embeddings(vectors[:1], "uint8", ranges)[0, [0, 7, 8]].tolist() == [63, 191, 255]
    assert quantize_embeddings([[0.5]], "uint8", [[0], [1]]).tolist() == [[127]]
    with pytest.raises(InputError, match="one vector has none"):
        quantize_embeddings(vectors[:1], "int8")


@pytest.mark.parametrize(
    ("vectors", "ranges", "message"),
    [
        (np.zeros((3, 8), np.int8), None, r"vectors must be float32 \[n, D\], not int8 \[3, 8\]"),
        (np.zeros(8, np.float32), None, r"not float32 \[8\]"),
        (np.zeros((3, 8), np.float32), np.zeros((2, 4)), r"ranges must be finite, \[2, 8\]"),
        (np.zeros((3, 8), np.float32), np.full((2, 8), np.nan), "ranges must be finite"),
    ],
)
def test_vectors_and_ranges_of_another_kind(vectors, ranges, message):
    with pytest.raises(InputError, match=message):
        quantize_embeddings(vectors, "int8", ranges)


def test_precision_of_encode(model):
    vectors = model.encode(TEXTS)
    packed = model.encode(TEXTS, precision="binary")
    assert packed.dtype == np.int8 and packed.shape == (len(TEXTS), model.dimension // 8)
    np.testing.assert_array_equal(packed, quantize_embeddings(vectors, "binary"))
    assert model.encode("one", precision="ubinary").shape == (model.dimension // 8,)
    with pytest.raises(InputError, match="precision must be one of float32, int8"):
        model.encode(TEXTS, precision="float16")


def test_precision_equals_sentence_transformers():
    util = pytest.importorskip("sentence_transformers.util")
    vectors = np.random.RandomState(0).standard_normal((150, 21)).astype(np.float32)
    for precision in ("float32", "int8", "uint8", "binary", "ubinary"):
        theirs = util.quantize_embeddings(vectors, precision)
        ours = quantize_embeddings(vectors, precision)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs, err_msg=precision)


def test_reranking(scorer):
    pairs = [(f"query {i % 3}", text) for i, text in enumerate(TEXTS[:9])]
    scores = scorer.predict(pairs, batch_size=2, show_progress_bar=False, convert_to_numpy=True)
    np.testing.assert_allclose(scores, scorer.predict(pairs), rtol=1e-5)
    hits = scorer.rank("herons", TEXTS[:3], return_documents=True, top_k=2)
    assert [hit["text"] for hit in hits] == [TEXTS[hit["corpus_id"]] for hit in hits]
    with pytest.raises(TypeError, match="scores are log-probabilities"):
        scorer.predict(pairs, apply_softmax=True)
    for top_k in (1.5, True):
        with pytest.raises(InputError, match="top_k must be a whole number"):
            scorer.rank("herons", TEXTS[:3], top_k=top_k)
    assert "log-probability, sum" in repr(scorer) and "on cpu" in repr(scorer) and len(repr(scorer)) < 200


def test_documents_to_rank_are_found_by_place(scorer):
    """Whatever a series says of its own order."""
    pd = pytest.importorskip("pandas")
    for series in (pd.Series(TEXTS[:3], index=[2, 0, 9]), (text for text in TEXTS[:3])):
        hits = scorer.rank("herons", series, return_documents=True)
        assert [hit["text"] for hit in hits] == [TEXTS[hit["corpus_id"]] for hit in hits]


def test_fields_that_are_replaced_are_checked(model):
    positions = decoders.config("gpt_neo")["max_position_embeddings"]
    text = copy.copy(model.text)
    with pytest.raises(AttributeError, match="brackets"):
        text.brackets = True
    text.max_seq_length = positions + 1
    for change, message in (
        ({"similarity_name": "cos"}, "similarity_name must be one of cosine, dot, euclidean, manhattan"),
        ({"truncate_dim": 0}, "truncate_dim 0: the model's vectors have 32 dimensions"),
        ({"truncate_dim": 33}, "truncate_dim 33"),
        ({"text": text}, f"but the model has {positions} positions"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(model, **change)
    changed = dataclasses.replace(model, text=copy.copy(model.text), truncate_dim=7)
    assert changed.encode("a").shape == (7,)
    changed.text.max_seq_length = positions + 1
    with pytest.raises(InputError, match=f"but the model has {positions} positions"):
        changed.encode("a")


def test_a_mesh_of_ones_own(model):
    """One that is set around a call changes nothing; one to load a model on needs the axes of `make_mesh`."""
    plain = model.encode(TEXTS[:3])
    with jax.set_mesh(jax.make_mesh((1,), ("batch",))):
        np.testing.assert_allclose(model.encode(TEXTS[:3]), plain, atol=1e-6)
    for mesh in (jax.make_mesh((1,), ("x",)), "data=1"):
        with pytest.raises(InputError, match=r"mesh must be one of sgpt_jax\.make_mesh, with the axes data"):
            sgpt.BiEncoder.from_pretrained(model.source["model"], mesh=mesh)


def test_push_to_hub(model, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["create"] = options
            return types.SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **options):
            calls["upload"] = repo_id, sorted(path.name for path in folder_path.iterdir()), options
            calls["card"] = (folder_path / "README.md").read_text()
            return types.SimpleNamespace(pr_url=None, commit_url="https://hub/commit")

    monkeypatch.setattr(hub.huggingface_hub, "HfApi", Api)
    assert model.push_to_hub("heron", private=True, token="t") == "https://hub/commit"
    repo, files, options = calls["upload"]
    assert repo == "me/heron" and {"model.safetensors", "modules.json", "README.md"} <= set(files)
    assert calls["token"] == "t" and calls["create"] == {"private": True, "exist_ok": False}
    assert options["create_pr"] is False and "# heron" in calls["card"]

    for error in (OSError, RuntimeError):  # httpx's are no OSErrors
        monkeypatch.setattr(Api, "create_repo", mock.Mock(side_effect=error("no network")))
        with pytest.raises(InputError, match="heron: cannot be pushed to the hub: no network"):
            model.push_to_hub("heron")


def test_an_index_from_python(model, tmp_path, capsys):
    records = [
        TEXTS[0],
        {"_id": "b", "title": "A title", "text": "of a ferry"},
        {"docid": 7, "contents": "night market"},
    ]
    index = sgpt.index_corpus(tmp_path / "i", records, model.with_prompts(document="text: "), store="float16")
    assert index.ids([0, 1, 2]) == ["0", "b", "7"] and index.texts([1]) == ["A title of a ferry"]
    assert "3 documents, dimension 32, float16" in repr(index)
    scores, rows = index.search(model.encode_query(["a night market"]), k=2)
    assert scores.shape == rows.shape == (1, 2)
    from sgpt_jax.cli.parser import main  # the folder alone is enough for the command

    assert main(["search", str(tmp_path / "i"), "a ferry", "-k", "1"]) == 0
    assert "document_prompt" in index.metadata and "a ferry" in capsys.readouterr().out
    with pytest.raises(InputError, match="document 1: the record has no `text`"):
        sgpt.index_corpus(tmp_path / "j", ["a", {"_id": "x", "title": "t"}], model)
    for wrong, message in (
        ({"texts": 1}, "texts must be True, False or None, not 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"chunk_size": 1.5}, "chunk_size must be a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            sgpt.index_corpus(tmp_path / "k", ["a"], model, **wrong)
    assert not (tmp_path / "k").exists()


def test_keys_and_names_of_columns_are_no_texts(model, tmp_path):
    pd = pytest.importorskip("pandas")
    for wrong in ({"a": "night market", "b": "ferry"}, pd.DataFrame({"text": ["night market"]})):
        for call in (
            model.encode,
            lambda texts: sgpt.index_corpus(tmp_path / "i", texts, model),
            lambda texts: sgpt.CrossEncoder.rank(None, "heron", texts),
        ):
            with pytest.raises(
                TypeError, match=rf"expected a list of \w+, not a {type(wrong).__name__}: pass"
            ):
                call(wrong)
    assert not (tmp_path / "i").exists()
    column = pd.DataFrame({"text": ["night market"]})["text"]
    assert sgpt.index_corpus(tmp_path / "i", column, model).texts([0]) == ["night market"]


def test_an_index_from_python_has_each_id_once(model, tmp_path):
    records = [
        {"_id": "a", "title": "A title", "text": "of a ferry"},
        {"id": "a", "title": "A title", "text": "of a ferry"},  # said twice
        Document("b", "night market"),
        "a text\ud83d",
        {"_id": "b", "text": "night market"},
    ]
    index = sgpt.index_corpus(tmp_path / "i", records, model)
    assert index.ids([0, 1, 2]) == ["a", "b", "3"] and len(index) == 3
    sgpt.index_corpus(tmp_path / "i", [Document("c", "bay"), Document("c", "bay")], model, add=True)
    assert len(sgpt.Index.open(tmp_path / "i")) == 4
    with pytest.raises(InputError, match="'another text' has no id of its own, and its number 3 would stand"):
        sgpt.index_corpus(tmp_path / "i", [*records[:3], "another text"], model, add=True)
    for wrong, message in (
        (
            [records[0], {"_id": "a", "text": "A title of a ferry"}],
            "document 1: id 'a' is document 0 with different",
        ),
        (["x", {"_id": "0", "text": "a"}], "document 1: id '0' is document 0 with different content"),
        ([Document("\ud83d", "x")], "lone surrogate"),
    ):
        with pytest.raises(InputError, match=message):
            sgpt.index_corpus(tmp_path / "j", wrong, model)
