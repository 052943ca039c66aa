"""Folders of today's embedders in their published layout, against what sentence-transformers gives for them."""

import json
import warnings
from importlib import util

import decoders
import folders
import numpy as np
import pytest
from folders import DOCUMENTS, EMBEDDERS, LONG_DOCUMENT, QUERIES, expected, write_folder

import sgpt_jax as sgpt
from sgpt_jax.errors import InputError
from sgpt_jax.families import read_config
from sgpt_jax.families.own_code import own_code_of, without_own_code

# Folders that say nothing get weightedmean here; sentence-transformers goes by their architecture.
PLAIN = {
    "plain_causal": {"pooling": "lasttoken", "max_seq_length": 192},
    "plain_bidirectional": {"pooling": "mean", "max_seq_length": 192},
}
NAMES = [name for name in EMBEDDERS if name != "chat_embedder"]
needs_sentence_transformers = pytest.mark.skipif(
    util.find_spec("torch") is None or util.find_spec("sentence_transformers") is None,
    reason="needs torch and sentence-transformers",
)


def quiet(call, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


def load(folder, **options):
    """The model; folders that state a limit beyond their positions, as sentence-transformers takes it, get these."""
    config = next(file for file in (folder / "base/config.json", folder / "config.json") if file.exists())
    limit = (
        json.loads((folder / "sentence_bert_config.json").read_text("utf-8")).get("max_seq_length")
        if (folder / "sentence_bert_config.json").exists()
        else None
    )
    stated = json.loads(config.read_text("utf-8"))
    if limit and limit > stated.get("max_position_embeddings", limit):
        folders.dump(config, stated | {"max_position_embeddings": limit})
    return quiet(sgpt.BiEncoder.from_pretrained, folder, **options)


def assert_near(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    cosines = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert cosines.min() > 0.99999
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


def assert_expected(model, wanted):
    assert_near(model.encode_query(QUERIES), wanted["queries"])
    assert_near(model.encode_document(DOCUMENTS), wanted["documents"])
    assert_near(model.encode(QUERIES), wanted["plain"])
    assert_near(quiet(model.encode, [LONG_DOCUMENT]), wanted["long"], 1e-4)
    for key in wanted:
        if key.startswith("prompt:"):
            assert_near(model.encode(QUERIES, prompt_name=key.removeprefix("prompt:")), wanted[key])
    assert model.text.ids(QUERIES[:1], prompt="")[0] == wanted["ids"].tolist()
    # Many texts share rows: prompts are left out of each.
    together = model.encode_query([*QUERIES * 20])
    assert_near(together.reshape(20, *wanted["queries"].shape)[7], wanted["queries"])


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_those_of_sentence_transformers(name, tmp_path):
    model = load(write_folder(name, tmp_path / name), **PLAIN.get(name, {}))
    wanted = expected(name)
    assert_expected(model, {key: value for key, value in wanted.items() if not key.startswith("eos/")})
    if "similarity" in wanted:
        similarities = model.similarity(wanted["queries"], wanted["documents"])
        np.testing.assert_allclose(similarities, wanted["similarity"], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_written_back(name, tmp_path):
    """The folder that `save_pretrained` writes gives the same vectors, prompts and settings."""
    model = load(write_folder(name, tmp_path / name), **PLAIN.get(name, {}))
    quiet(model.save_pretrained, tmp_path / "saved")
    again = sgpt.BiEncoder.from_pretrained(tmp_path / "saved")  # without a warning
    assert again.text.prompts == model.text.prompts
    assert (again.text.default_prompt_name, again.include_prompt, again.truncate_dim, again.similarity_name) == (
        model.text.default_prompt_name, model.include_prompt, model.truncate_dim, model.similarity_name,
    )  # fmt: skip
    np.testing.assert_array_equal(again.encode_query(QUERIES), model.encode_query(QUERIES))
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text("utf-8"))


@needs_sentence_transformers
@pytest.mark.parametrize(
    "name", ["embeddinggemma", "gritlm", "gte_qwen2", "pooling_all", "pooling_two", "dense_chain"]
)
def test_sentence_transformers_reads_what_is_written(name, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = load(write_folder(name, tmp_path / name))
    quiet(model.save_pretrained, tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    wanted = expected(name)
    assert_near(theirs.encode_query(QUERIES), wanted["queries"])
    assert_near(theirs.encode_document(DOCUMENTS), wanted["documents"])
    assert theirs.similarity_fn_name == model.similarity_name
    assert theirs.prompts == model.text.prompts


def test_an_adapter_beside_modules_json(tmp_path):
    folder = folders.write_adapter_embedder(tmp_path / "adapter")
    assert_expected(load(folder), expected("adapter_embedder"))


def test_prompts(tmp_path):
    model = load(write_folder("e5_mistral", tmp_path / "e5"))
    named = model.text.prompts["web_search_query"]
    wanted = expected("e5_mistral")["prompt:web_search_query"]
    assert_near(model.encode(QUERIES, prompt=named), wanted)
    assert_near(model.encode_query(QUERIES, prompt_name="web_search_query"), wanted)
    assert_near(model.with_prompts(query="web_search_query").encode_query(QUERIES), wanted)
    assert_near(model.with_prompts(document=named).encode_document(QUERIES), wanted)
    assert model.text.prompts["query"] == ""
    # The prompt itself wins over its name, as in sentence-transformers.
    assert_near(model.encode(QUERIES, prompt=named, prompt_name="sts_query"), wanted)
    with pytest.raises(
        InputError, match=r"no prompt 'passage'; this model has: query, document, web_search_query"
    ):
        model.encode(QUERIES, prompt_name="passage")
    (chunk,) = model.with_prompts(query=named).encode_chunks([QUERIES], side="query")
    assert_near(chunk, wanted)


def test_dimensions(tmp_path):
    model = load(write_folder("dense_chain", tmp_path / "dense"))
    whole = load(tmp_path / "dense", truncate_dim=24)
    assert (model.dimension, whole.dimension) == (10, 24)
    np.testing.assert_array_equal(whole.encode(QUERIES)[:, :10], model.encode(QUERIES))
    np.testing.assert_array_equal(whole.encode(QUERIES, truncate_dim=3), model.encode(QUERIES)[:, :3])
    lengths = np.linalg.norm(model.encode(QUERIES, truncate_dim=3, normalize=True), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    for call in (
        lambda: load(tmp_path / "dense", truncate_dim=25),
        lambda: load(tmp_path / "dense", truncate_dim="8"),
        lambda: model.encode(QUERIES, truncate_dim=11),
    ):
        with pytest.raises(InputError, match="truncate_dim"):
            call()
    with pytest.raises(InputError, match="a Dense module takes vectors of 32 dimensions, but gets 64"):
        load(tmp_path / "dense", pooling="mean+cls")
    normalised = load(write_folder("qwen3_embedding", tmp_path / "qwen3"), truncate_dim=8)
    assert np.linalg.norm(normalised.encode(QUERIES), axis=1).max() < 0.9  # cut after Normalize


def test_a_folder_of_code_is_known_with_a_message(tmp_path):
    with pytest.warns(
        UserWarning, match="GritLM, whose own code is not run: attention is bidirectional, pooling is mean"
    ):
        model = sgpt.BiEncoder.from_pretrained(write_folder("gritlm", tmp_path / "gritlm"))
    assert model.decoder.config.bidirectional and not model.decoder.config.windows
    config = json.loads((tmp_path / "gritlm/config.json").read_text("utf-8"))
    folders.dump(tmp_path / "gritlm/config.json", config | {"sliding_window": 4, "auto_map": None})
    causal = sgpt.BiEncoder.from_pretrained(tmp_path / "gritlm")
    assert not causal.decoder.config.bidirectional and causal.pooling == "weightedmean"
    for change, message in (
        (
            {"auto_map": {"AutoModel": "nvidia/NV-Embed-v2--modeling_nvembed.NVEmbedModel"}},
            "NV-Embed.*latent attention",
        ),
        ({"auto_map": {"AutoModel": "modeling_x.Other"}}, "auto_map names code of its own"),
    ):
        folders.dump(tmp_path / "gritlm/config.json", config | change)
        with pytest.raises(InputError, match=message):
            sgpt.BiEncoder.from_pretrained(tmp_path / "gritlm")


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({"auto_map": {"AutoModel": "McGill-NLP/X--modeling_mistral_encoder.MistralEncoderModel"}}, "mistral"),
        ({"model_type": "llama_bidirec", "auto_map": {"AutoModel": "llama_bidirectional_model.X"}}, "llama"),
        ({"model_type": "bidirectional_pplx_qwen3", "use_bidirectional_attention": True, "head_dim": 8}, "qwen3"),
    ],
)  # fmt: skip
def test_other_known_code(change, family):
    config = decoders.config("mistral") | change
    found = without_own_code(config, own_code_of(config))
    assert found["model_type"] == family and "auto_map" not in found
    assert quiet(read_config, found).bidirectional


def test_the_mask_as_an_option(tmp_path):
    """What the folder would say with its own keys, and of code that is not known; saved as it was asked for."""
    folder = write_folder("kalm", tmp_path / "kalm")
    wanted, config = expected("kalm"), json.loads((folder / "config.json").read_text("utf-8"))
    folders.dump(
        folder / "config.json", config | {"is_causal": True, "auto_map": {"AutoModel": "modeling_x.Other"}}
    )
    with pytest.raises(InputError, match="say which: --bidirectional or --no-bidirectional"):
        load(folder)
    model = load(folder, bidirectional=True)
    assert_near(model.encode_query(QUERIES), wanted["queries"])
    assert (
        model.source["bidirectional"] and not load(folder, bidirectional=False).decoder.config.bidirectional
    )
    quiet(model.save_pretrained, tmp_path / "saved")
    again = sgpt.BiEncoder.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(QUERIES), model.encode(QUERIES))
    with pytest.raises(InputError, match="bidirectional attention is not supported in this family"):
        sgpt.BiEncoder.from_pretrained(
            decoders.write_checkpoint("gpt_neo", tmp_path / "neo"), bidirectional=True
        )
    with pytest.raises(InputError, match=r"a gemma3_text .* cannot be made causal"):
        load(write_folder("embeddinggemma", tmp_path / "gemma"), bidirectional=False)


def test_a_decoder_that_does_not_lie_on_top_is_named(tmp_path):
    folder = write_folder("kalm", tmp_path)
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    (folder / "config.json").unlink()
    for first, message in (
        ({"path": "0_Transformer"}, "the decoder lies in 0_Transformer; move its files to the top"),
        (
            {"type": "sentence_transformers.base.modules.router.Router"},
            r"module 0 is \S+\.Router, which is not",
        ),
    ):
        folders.dump(folder / "modules.json", [modules[0] | first, *modules[1:]])
        with pytest.raises(InputError, match=message):
            sgpt.BiEncoder.from_pretrained(folder)


def test_flags_that_disagree_with_the_tokenizer_are_named(tmp_path):
    with pytest.warns(UserWarning, match="add_eos_token is true, but tokenizer.json adds none"):
        sgpt.BiEncoder.from_pretrained(write_folder("e5_mistral", tmp_path / "e5"))
    folder = write_folder("qwen3_embedding", tmp_path / "qwen3")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    folders.dump(folder / "tokenizer_config.json", settings | {"add_eos_token": False})
    with pytest.warns(
        UserWarning, match=r"add_eos_token is false, but tokenizer.json adds \['<\|endoftext\|>'\]"
    ):
        sgpt.BiEncoder.from_pretrained(folder)


def test_templates_and_scoring_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r'"message" in modality_config .* chat template'):
        load(write_folder("chat_embedder", tmp_path / "chat"))
    with pytest.raises(InputError, match="a CrossEncoder model is no bi-encoder"):
        load(write_folder("qwen3_reranker", tmp_path / "reranker"))
    settings = tmp_path / "reranker/config_sentence_transformers.json"
    settings.unlink()
    with pytest.raises(InputError, match=r"logit_score\.LogitScore, which is not supported"):
        load(tmp_path / "reranker")


def test_a_short_repr(tmp_path):
    model = load(write_folder("embeddinggemma", tmp_path / "gemma"))
    assert repr(model) == (
        "BiEncoder(gemma: gemma3_text, 3 layers, bidirectional, dimension 32, mean pooling, Dense 32 to 48 (Identity), "
        "Dense 48 to 32 (Identity), length 1, 90 tokens, float32 on cpu)"
    )
    assert len(repr(model.decoder)) < 300
