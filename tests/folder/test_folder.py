"""What model folders say, and what we write for sentence-transformers."""

import json
from importlib import metadata, util

import decoders
import numpy as np
import pytest
from etils import epath
from gguf_files import write_gguf

from sgpt_jax import load_decoder
from sgpt_jax.decoder.modules import Normalize
from sgpt_jax.errors import InputError
from sgpt_jax.folder.card import write_model_card
from sgpt_jax.folder.settings import ModelSettings, read_settings, write_settings
from sgpt_jax.folder.source import resolve
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.tokenizer import load_tokenizer, save_tokenizer

OLD = "sentence_transformers.models."
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}


def dump(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), "utf-8")


def st_folder(folder, kinds=("Transformer", "Pooling"), pooling=None, bert=None, saved=None, new=False):
    """A model folder (without weights) in the layout of sentence-transformers 2 or 6."""
    types_of = [NEW.get(kind, OLD + kind) if new else OLD + kind for kind in kinds]
    paths = ["" if i == 0 else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    dump(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (path, kind) in enumerate(zip(paths, types_of, strict=True))
        ],
    )
    dump(folder / "config.json", {"model_type": "gpt_neo", "_name_or_path": "EleutherAI/gpt-neo-125M"})
    dump(folder / "1_Pooling/config.json", seven("weightedmean_tokens") if pooling is None else pooling)
    dump(folder / "sentence_bert_config.json", {"max_seq_length": 300, "do_lower_case": False} | (bert or {}))
    if saved is not None:
        dump(folder / "config_sentence_transformers.json", saved)
    return folder


def seven(*active):
    names = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    return {"word_embedding_dimension": 48} | {f"pooling_mode_{name}": name in active for name in names}


# Reading settings


def test_a_released_bracket_model(tmp_path):
    folder = st_folder(tmp_path / "SGPT-125M-weightedmean-msmarco-specb-bitfit")
    assert read_settings(folder) == ModelSettings("weightedmean", True, 300)
    assert read_settings(folder.rename(tmp_path / "plain")) == ModelSettings("weightedmean", None, 300)


def test_a_plain_folder_and_a_gguf_file_say_nothing(tmp_path):
    dump(tmp_path / "model/config.json", {"model_type": "llama"})
    dump(tmp_path / "model/tokenizer_config.json", {"model_max_length": 1024})
    assert read_settings(write_gguf("llama", tmp_path / "model.gguf")) == ModelSettings()
    assert read_settings(tmp_path / "model") == ModelSettings()


def test_specb_turns_brackets_on_wherever_the_name_is(tmp_path):
    plain = st_folder(tmp_path / "model")
    assert read_settings(plain, "Muennighoff/SGPT-SpecB").brackets
    cached = st_folder(tmp_path / "models--org--name-specb" / "snapshots" / "0123abc")
    assert read_settings(cached).brackets
    named = st_folder(tmp_path / "other")
    dump(named / "config.json", {"_name_or_path": "org/x-specb-y"})
    assert read_settings(named).brackets
    assert read_settings(st_folder(tmp_path / "a-specb", saved={"sgpt_brackets": False})).brackets is False
    assert read_settings(st_folder(tmp_path / "b", saved={"sgpt_brackets": True})).brackets is True
    parent = st_folder(tmp_path / "specb-experiments" / "base")
    assert read_settings(parent).brackets is None


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(
    ("key", "mode"),
    [
        ("weightedmean_tokens", "weightedmean"),
        ("mean_tokens", "mean"),
        ("lasttoken", "lasttoken"),
        ("cls_token", "cls"),
        ("max_tokens", "max"),
        ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    ],
)
def test_pooling_modes_in_both_spellings(key, mode, new, tmp_path):
    pooling = {"embedding_dimension": 48, "pooling_mode": mode, "include_prompt": True} if new else seven(key)
    kinds = ("Transformer", "Pooling", "Normalize") if new else ("Transformer", "Pooling")
    settings = read_settings(st_folder(tmp_path, kinds, pooling, new=new))
    assert settings == ModelSettings(mode, None, 300, (Normalize(),) if new else ())


def test_no_active_pooling_mode_means_mean(tmp_path):
    assert read_settings(st_folder(tmp_path, pooling=seven())).pooling == "mean"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": {"pooling_mode": "median"}}, "'median'"),
        ({"pooling": {"pooling_mode": []}}, r"pooling_mode is \[\]"),
        (
            {"kinds": ("Transformer", "Pooling", "Router")},
            r"module 2 is sentence_transformers\.models\.Router",
        ),
        ({"kinds": ("Transformer", "Pooling", "Dense")}, r"names 2_Dense, but .*config.json is not there"),
        ({"kinds": ("Transformer",)}, "no Pooling module"),
        ({"kinds": ("Transformer", "Normalize", "Pooling")}, "module 1"),
        ({"kinds": ("Transformer", "WeightedMeanPooling")}, "WeightedMeanPooling"),
        ({"kinds": ("Pooling", "Transformer")}, "module 0"),
        ({"kinds": ("Transformer", "Pooling", "Pooling")}, "module 2 is .*one Pooling"),
        ({"bert": {"do_lower_case": True}}, "do_lower_case"),
        ({"bert": {"max_seq_length": 0}}, "max_seq_length is 0"),
        ({"bert": {"max_seq_length": "300"}}, "max_seq_length is '300'"),
        ({"saved": {"model_type": "CrossEncoder"}}, "CrossEncoder"),
        ({"saved": {"truncate_dim": "64"}}, "truncate_dim is '64'"),
        ({"saved": {"similarity_fn_name": "hamming"}}, "similarity_fn_name 'hamming'"),
        ({"saved": {"default_prompt_name": "q"}}, "default_prompt_name 'q' is none of the prompts"),
        ({"bert": {"transformer_task": "text-generation"}}, "transformer_task 'text-generation'"),
        ({"bert": {"query_length": 32}}, "query_length 32"),
        ({"bert": {"query_expansion": {"strategy": "fixed"}}}, "query_expansion"),
        ({"bert": {"processing_kwargs": {"text": {"add_special_tokens": False}}}}, "processing_kwargs"),
        ({"bert": {"config_kwargs": {"is_causal": False}}}, "is_causal among the arguments"),
        ({"bert": {"modality_config": {"text": {"method_output_name": "logits"}}}}, "modality_config takes"),
    ],
)
def test_what_would_give_other_vectors_is_refused(changes, message, tmp_path):
    folder = st_folder(tmp_path, **changes)
    if changes.get("kinds") == ("Transformer", "Pooling", "Pooling"):
        dump(folder / "2_Pooling/config.json", seven("mean_tokens"))
    with pytest.raises(InputError, match=message):
        read_settings(folder)


def test_foreign_modules_and_moved_transformers_are_refused(tmp_path):
    folder = st_folder(tmp_path)
    dump(folder / "modules.json", [{"path": "", "type": "custom_st.Transformer"}])
    with pytest.raises(InputError, match="custom_st"):
        read_settings(folder)
    dump(folder / "modules.json", [{"path": "0_Transformer", "type": OLD + "Transformer"}])
    with pytest.raises(InputError, match="0_Transformer"):
        read_settings(folder)


@pytest.mark.parametrize("path", ["../1_Pooling", "/etc", "C:\\x", "a/../../b"])
def test_modules_stay_inside_their_folder(path, tmp_path):
    folder = st_folder(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    dump(folder / "modules.json", [modules[0], modules[1] | {"path": path}])
    with pytest.raises(InputError, match="leads out of the folder"):
        read_settings(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": 5}, "pooling_mode is 5"),
        ("config_sentence_transformers.json", {"prompts": ["q: "]}, "prompts"),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "prompts"),
        ("config_sentence_transformers.json", {"default_prompt_name": ["x"]}, "default_prompt_name"),
        ("sentence_bert_config.json", [1], "not a JSON object"),
    ],
)
def test_values_of_other_types(file, content, message, tmp_path):
    folder = st_folder(tmp_path)
    dump(folder / file, content)
    with pytest.raises(InputError, match=message):
        read_settings(folder)


def test_deep_json_is_no_crash(tmp_path):
    folder = st_folder(tmp_path)
    (folder / "modules.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="not valid JSON"):
        read_settings(folder)


def test_a_folder_of_one_gguf_file_is_that_file(tmp_path):
    file = write_gguf("llama", tmp_path / "model.GGUF")
    assert (resolve(tmp_path).path, resolve(tmp_path).name) == (file, tmp_path.name)
    assert load_decoder(tmp_path).config == load_decoder(file).config
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"several GGUF files.*model.GGUF, other.gguf"):
        resolve(tmp_path)
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in (1, 2):
        (parts / f"x-0000{number}-of-00002.gguf").write_bytes(b"GGUF")
    assert resolve(parts).path == parts / "x-00001-of-00002.gguf"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(tmp_path).path == tmp_path


@pytest.mark.parametrize("content", ["", "[]", "{}", '[{"type": 1, "path": ""}]', '["Pooling"]'])
def test_a_broken_modules_file(content, tmp_path):
    folder = st_folder(tmp_path)
    (folder / "modules.json").write_text(content, "utf-8")
    with pytest.raises(InputError, match=r"modules\.json"):
        read_settings(folder)


def test_the_limit_of_sentence_transformers_6_is_the_tokenizers(tmp_path):
    folder = st_folder(tmp_path)
    dump(folder / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
    dump(folder / "tokenizer_config.json", {"model_max_length": 75})
    assert read_settings(folder).max_seq_length == 75
    dump(folder / "tokenizer_config.json", {"model_max_length": 1000000000000000019884624838656})
    assert read_settings(folder).max_seq_length is None
    dump(folder / "tokenizer_config.json", {"max_len": 60})
    assert read_settings(folder).max_seq_length == 60


@pytest.mark.parametrize("key", ["processor_kwargs", "tokenizer_args"])
def test_a_limit_handed_to_the_tokenizer_comes_first(key, tmp_path):
    folder = st_folder(tmp_path, bert={key: {"model_max_length": 8}})
    dump(folder / "tokenizer_config.json", {"model_max_length": 75})
    assert read_settings(folder).max_seq_length == 8


@pytest.mark.parametrize("value", [None, 0, False])
def test_a_prompt_that_is_not_pooled(value, tmp_path):
    folder = st_folder(tmp_path, pooling=seven("mean_tokens") | {"include_prompt": value})
    assert not read_settings(folder).include_prompt


def test_normalize_is_for_the_texts_vector(tmp_path):
    folder = st_folder(tmp_path, kinds=("Transformer", "Pooling", "Normalize"))
    assert read_settings(folder).modules == (Normalize(),)
    config = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    dump(folder / "2_Normalize/config.json", config)
    assert read_settings(folder).modules == (Normalize(),)
    for key in config:
        dump(folder / "2_Normalize/config.json", config | {key: "token_embeddings"})
        with pytest.raises(InputError, match=f"{key} is 'token_embeddings'"):
            read_settings(folder)


@pytest.mark.parametrize(
    "saved",
    [
        {"prompts": {"query": "", "document": ""}, "default_prompt_name": None},
        {"prompts": {"query": "q: ", "passage": "p: "}},
        {"prompts": {"x": "x: ", "y": ""}, "default_prompt_name": "x"},
        {"prompts": {"x": "x: "}, "default_prompt_name": "query"},
        {},
    ],
)
def test_all_prompts_are_kept(saved, tmp_path):
    settings = read_settings(st_folder(tmp_path, saved=saved))
    assert settings.prompts == (saved.get("prompts") or None)
    assert settings.default_prompt_name == saved.get("default_prompt_name")


def test_what_nobody_knows_is_named(tmp_path):
    folder = st_folder(tmp_path, bert={"tomorrow": 1}, saved={"later": 2})
    with pytest.warns(UserWarning, match=r"ignored what is not known here: (tomorrow|later)") as notes:
        read_settings(folder)
    assert len(notes) == 2


def dense(folder, config, **tensors):
    dump(folder / "2_Dense/config.json", config)
    decoders.write_arrays(
        {k.replace("_", "."): v for k, v in tensors.items()}, folder / "2_Dense/model.safetensors"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_features": 4}, "the weights are .* the config wants"),
        ({"bias": False}, "the config wants"),
        ({"use_residual": True}, "the config wants"),
        ({"activation_function": "torch.nn.modules.activation.PReLU"}, "PReLU' is not supported"),
        ({"activation_function": None}, "activation_function None"),
        ({"module_output_name": "scores"}, "module_output_name is 'scores'"),
    ],
)
def test_dense_modules(change, message, tmp_path):
    folder = st_folder(tmp_path, kinds=("Transformer", "Pooling", "Dense"))
    weight, bias = np.ones((3, 48), np.float32), np.ones(3, np.float32)
    config = {"in_features": 48, "out_features": 3}
    dense(folder, config, linear_weight=weight, linear_bias=bias)
    (layer,) = read_settings(folder).modules
    assert (layer.activation, layer.residual, layer.weight.shape) == ("Tanh", False, (3, 48))
    dense(folder, config | change, linear_weight=weight, linear_bias=bias)
    with pytest.raises(InputError, match=message):
        read_settings(folder)
    (folder / "2_Dense/model.safetensors").unlink()
    dump(folder / "2_Dense/config.json", config)
    with pytest.raises(InputError, match=r"no model\.safetensors or pytorch_model\.bin"):
        read_settings(folder)
    dump(folder / "2_Dense/config.json", config | {"activation_function": "my_code.Swish"})
    dense(folder, config | {"activation_function": "my_code.Swish"}, linear_weight=weight, linear_bias=bias)
    with pytest.warns(UserWarning, match=r"my_code\.Swish is code of its own; Tanh is used"):
        assert read_settings(folder).modules[0].activation == "Tanh"


# Writing settings


def test_the_files_are_exactly_these(tmp_path):
    settings = ModelSettings("weightedmean", True, 300, (Normalize(),), {"query": "q: "})
    write_settings(tmp_path, settings, 768)
    files = {str(p.relative_to(tmp_path)): p.read_text("utf-8") for p in tmp_path.rglob("*") if p.is_file()}
    version = metadata.version("sgpt-jax")
    expected = (decoders.FIXTURES / "hub/settings.txt").read_text("utf-8").replace("VERSION", version)
    assert "".join(f"--- {name}\n{files[name]}" for name in sorted(files)) == expected
    assert (tmp_path / "2_Normalize").is_dir()


@pytest.mark.parametrize("mode", ["weightedmean", "cls+mean", "mean+cls"])
@pytest.mark.parametrize("brackets", [True, False])
def test_what_is_written_is_read_again(mode, brackets, tmp_path):
    prompts = {"query": "q: ", "document": "d: ", "other": "t: "}
    modules = () if brackets else (Normalize(), Normalize())
    default, similarity = ("other", "dot") if brackets else (None, "manhattan")
    settings = ModelSettings(
        mode, brackets, 75, modules, prompts, default, brackets, 5 if brackets else None, similarity
    )
    write_settings(epath.Path(tmp_path / "new/folder-specb"), settings, 8)
    assert read_settings(tmp_path / "new/folder-specb") == settings


def test_unknown_pooling_is_not_written(tmp_path):
    with pytest.raises(InputError, match="median"):
        write_settings(tmp_path / "model", ModelSettings("median"), 8)
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(
    util.find_spec("torch") is None or util.find_spec("sentence_transformers") is None,
    reason="needs torch and sentence-transformers",
)
@pytest.mark.parametrize(
    ("mode", "normalize", "prompts"),
    [
        ("weightedmean", False, None),
        ("weightedmean", True, {"query": "find: "}),
        ("mean", False, None),
        ("lasttoken", False, None),
        ("cls", True, None),
    ],
)
def test_sentence_transformers_loads_what_we_write(mode, normalize, prompts, tmp_path):
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    decoders.write_checkpoint("gpt_neo", tmp_path, model_class="base")
    save_tokenizer(load_tokenizer(decoders.write_tokenizer(tmp_path / "tokenizer")), tmp_path)
    modules = (Normalize(),) if normalize else ()
    write_settings(tmp_path, ModelSettings(mode, False, 24, modules, prompts), 48)
    write_model_card(tmp_path, read_settings(tmp_path), 48)
    texts = ["a short text", "a longer text about the herons of the river " * 4, "x"]
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode_query(texts)

    decoder = AutoModel.from_pretrained(tmp_path).eval()
    encoder = TextEncoder(load_tokenizer(tmp_path), 24, prompts=prompts)
    with pytest.warns(UserWarning, match="1 of 3"):
        ids = encoder.ids(texts, "query")
    for vector, row in zip(theirs, ids, strict=True):
        with torch.no_grad():
            hidden = decoder(torch.tensor([row])).last_hidden_state[0].numpy()
        weights = {
            "weightedmean": np.arange(1, len(row) + 1),
            "mean": np.ones(len(row)),
            "lasttoken": np.eye(len(row))[-1],
            "cls": np.eye(len(row))[0],
        }[mode]
        expected = weights @ hidden / weights.sum()
        size = np.linalg.norm(expected)
        assert vector @ expected / size / np.linalg.norm(vector) > 0.99999
        np.testing.assert_allclose(np.linalg.norm(vector), 1 if normalize else size, rtol=1e-4)
