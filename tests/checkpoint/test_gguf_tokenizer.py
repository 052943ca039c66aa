"""Tokenizers built from GGUF files, against the reference tokenizers."""

import json

import decoders
import gguf
import pytest
from transformers import AutoTokenizer

from sgpt_jax.checkpoint import gguf_reader, gguf_tokenizer
from sgpt_jax.errors import InputError
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.tokenizer import load_tokenizer, save_tokenizer

FIXTURES = decoders.FIXTURES / "text"
ODD = json.loads((FIXTURES / "smollm2_ids.json").read_text("utf-8"))["texts"]


def write_vocabulary(path, model, tokens, types, *, pre=None, merges=None, scores=None, fields=None):
    """A GGUF file with a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for name, value in (fields or {}).items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_gguf(path, pre="gpt-2", extra=(), **fields):
    """The tests' byte-level BPE with `<|endoftext|>` (control), `<think>` (user-defined) and `extra` tokens."""
    vocab, merges = decoders.bpe()
    tokens = [*vocab, "<|endoftext|>", "<think>", *extra]
    types = [1] * len(vocab) + [3, 4] + [1] * len(extra)
    fields = {"bos_token_id": len(vocab), "eos_token_id": len(vocab)} | fields
    return write_vocabulary(
        path, "gpt2", tokens, types, pre=pre, merges=[" ".join(m) for m in merges], fields=fields
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    data = json.loads((FIXTURES / "smollm2_ids.json").read_text("utf-8"))
    tokens = [data["tokens"].get(str(i), f"[other{i}]") for i in range(data["vocab_size"])]
    types = [3 if i in set(data["control"]) else 1 for i in range(len(tokens))]
    path = tmp_path_factory.mktemp("smollm2") / "model.gguf"
    fields = data["special"] | {"add_bos_token": False}
    return write_vocabulary(
        path, "gpt2", tokens, types, pre="smollm", merges=data["merges"], fields=fields
    ), data


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    data = json.loads((FIXTURES / "sentencepiece_ids.json").read_text("utf-8"))
    rows = [data["tokens"].get(str(i), [f"[other{i}]", -1e9, 5]) for i in range(data["vocab_size"])]
    tokens, scores, types = (list(column) for column in zip(*rows, strict=True))
    path = tmp_path_factory.mktemp("sentencepiece") / "model.gguf"
    fields = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write_vocabulary(path, "llama", tokens, types, scores=scores, fields=fields), data


def test_smollm2_ids_equal_the_reference(smollm2):
    path, data = smollm2
    tokenizer = load_tokenizer(path)
    assert tokenizer(data["texts"])["input_ids"] == data["ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"]) == [1, 0]
    # transformers' own GGUF loading differs only where its missing digit rule shows.
    differing = [
        t for t, a, b in zip(data["texts"], data["ids"], data["transformers_gguf_ids"], strict=True) if a != b
    ]
    assert len(differing) == 3
    assert all(any(c.isnumeric() for c in text) for text in differing)


def test_sentencepiece_ids_equal_the_library(sentencepiece):
    path, data = sentencepiece
    tokenizer = load_tokenizer(path)
    ids = tokenizer(data["texts"])["input_ids"]
    for text, ours, theirs in zip(data["texts"], ids, data["ids"], strict=True):
        assert ours == theirs, text
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == data["texts"][1]
    assert tokenizer("<s>")["input_ids"] == [1, 1]


@pytest.mark.parametrize("name", ["smollm2", "sentencepiece"])
def test_a_saved_gguf_tokenizer_loads_with_the_same_ids(name, request, tmp_path):
    path, data = request.getfixturevalue(name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    save_tokenizer(load_tokenizer(path), tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    for loaded in (AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)):
        assert loaded(data["texts"])["input_ids"] == data["ids"]
        assert loaded.eos_token_id == 2


def test_a_saved_qwen2_tokenizer_loads_with_the_same_ids(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}), "utf-8")
    tokenizer = load_tokenizer(small_gguf(tmp_path / "model.gguf", "qwen2"))
    save_tokenizer(tokenizer, tmp_path)
    texts = [*ODD, "<|endoftext|> x", "a<think>b"]
    assert load_tokenizer(tmp_path)(texts)["input_ids"] == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ĠIT", "'", "S", "Ġ", "Ġ12345", "Ċ", "Ġx", '."', "Ċ", "Ċ", "y"]),
        ("default", ["ĠIT", "'", "S", "Ġ", "Ġ12345", "Ċ", "Ġx", '."', "Ċ", "Ċ", "y"]),
        ("smollm", ["ĠIT", "'", "S", "ĠĠ", "1", "2", "3", "4", "5", "Ċ", "Ġx", '."', "Ċ", "Ċ", "y"]),
        ("qwen2", ["ĠIT", "'S", "Ġ", "Ġ", "1", "2", "3", "4", "5", "Ċ", "Ġx", '."ĊĊ', "y"]),
        ("llama-bpe", ["ĠIT", "'S", "Ġ", "Ġ", "123", "45", "Ċ", "Ġx", '."ĊĊ', "y"]),
    ],
)
def test_each_pre_tokenizer_has_its_own_rule(pre, pieces, tmp_path):
    tokenizer = load_tokenizer(small_gguf(tmp_path / "model.gguf", pre))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(" IT'S  12345\n x.\"\n\ny")
    assert [piece for piece, _ in cut] == pieces


def test_llama_bpe_takes_whole_pieces_and_adds_bos(tmp_path):
    extra = ["Ġheronry"]  # no merges lead to it
    whole = load_tokenizer(small_gguf(tmp_path / "llama.gguf", "llama-bpe", extra))
    merged = load_tokenizer(small_gguf(tmp_path / "gpt2.gguf", "gpt-2", extra))
    eos = whole.eos_token_id
    assert whole(" heronry")["input_ids"] == [eos, eos + 2]
    assert len(merged(" heronry")["input_ids"]) > 1
    assert merged("a")["input_ids"][0] != eos
    silent = load_tokenizer(
        small_gguf(tmp_path / "no.gguf", "llama-bpe", add_bos_token=False, add_eos_token=True)
    )
    assert silent("a")["input_ids"] == [silent.convert_tokens_to_ids("a"), eos]


def test_qwen2_composes_characters_and_the_others_do_not(tmp_path):
    forms = ["caf\u00e9", "cafe\u0301"]
    composed, apart = load_tokenizer(small_gguf(tmp_path / "q.gguf", "qwen2"))(forms)["input_ids"]
    assert composed == apart
    composed, apart = load_tokenizer(small_gguf(tmp_path / "g.gguf", "gpt-2"))(forms)["input_ids"]
    assert composed != apart


def test_special_tokens_of_a_gguf_file(tmp_path):
    tokenizer = load_tokenizer(small_gguf(tmp_path / "model.gguf"))
    eos, think = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<think>"])
    assert tokenizer("a<think>a<|endoftext|>")["input_ids"][1::2] == [think, eos]
    assert tokenizer.added_tokens_decoder[eos].special
    assert not tokenizer.added_tokens_decoder[think].special
    assert tokenizer.decode([eos, think], skip_special_tokens=True) == "<think>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, "pre 'tekken' is not supported"),
        ({"model": "t5"}, "model 't5' is not supported"),
        ({"model": "llama"}, "scores"),
        ({"merges": None}, "merges"),
        ({"merges": ["a b", "b c"]}, "joins tokens that the file does not have: 'b c'"),
        ({"tokens": ["a", "a", "b"]}, "twice"),
        ({"fields": {"eos_token_id": 9}}, "eos_token_id is 9"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_built(changes, message, tmp_path):
    given = {
        "model": "gpt2",
        "tokens": ["a", "b", "ab"],
        "types": [1, 1, 1],
        "pre": "gpt-2",
        "merges": ["a b"],
    }
    with pytest.raises(InputError, match=message):
        load_tokenizer(write_vocabulary(tmp_path / "model.gguf", **(given | changes)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer.ggml.tokens", [1, 2]), ("tokenizer.ggml.tokens", 3), ("tokenizer.ggml.merges", "a b"),
        ("tokenizer.ggml.token_type", 1), ("tokenizer.ggml.pre", [1]), ("tokenizer.ggml.eos_token_id", "x"),
        ("tokenizer.ggml.add_bos_token", [True]), ("tokenizer.chat_template", 1),
    ],
)  # fmt: skip
def test_fields_of_another_type_are_named(name, value, tmp_path, monkeypatch):
    path = small_gguf(tmp_path / "model.gguf")
    file = gguf_reader.open_gguf(path)
    changed = gguf_reader.Gguf(file.metadata | {name: value}, file.tensors)
    monkeypatch.setattr(gguf_tokenizer, "open_gguf", lambda _: changed)
    with pytest.raises(InputError, match=f"{name} is of another type"):
        load_tokenizer(path)


def test_gguf_files_without_a_tokenizer(tmp_path):
    (tmp_path / "not.gguf").write_bytes(b"no GGUF file at all, but long enough to be read as one")
    with pytest.raises(InputError, match=r"not\.gguf"):
        load_tokenizer(tmp_path / "not.gguf")
    with pytest.raises(InputError, match=r"gone\.gguf"):
        load_tokenizer(tmp_path / "gone.gguf")


def test_brackets_need_a_token_each(tmp_path):
    tokens, types = ["a", "b", "ab", "[", "]", "{"], [1] * 6
    path = write_vocabulary(tmp_path / "x.gguf", "gpt2", tokens, types, pre="gpt-2", merges=["a b"])
    with pytest.raises(InputError, match="'}' as one token"):
        TextEncoder(load_tokenizer(path), 8, True)
