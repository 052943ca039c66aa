"""Tokenizers of folders, the rules for ids, and batch plans."""

import json
import warnings

import decoders
import pytest

from sgpt_jax.errors import InputError
from sgpt_jax.text.encoder import TextEncoder, check_ids
from sgpt_jax.text.tokenizer import load_tokenizer, save_tokenizer

ODD = json.loads((decoders.FIXTURES / "text/smollm2_ids.json").read_text("utf-8"))["texts"]
SPECIAL = "<|endoftext|> x <|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return decoders.write_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory):
    return load_tokenizer(decoders.write_tokenizer(tmp_path_factory.mktemp("bos"), bos=True))


# Folders


def test_a_saved_tokenizer_always_has_a_pad_token(tokenizer, tmp_path):
    assert tokenizer.pad_token is None
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).pad_token == tokenizer.eos_token
    assert tokenizer.pad_token is None


def test_folders_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neo"}', "utf-8")
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such model folder"):
        load_tokenizer(tmp_path / "gone")


@pytest.mark.parametrize("fast_file", [True, False])
def test_released_folders_with_added_tokens_json(fast_file, tmp_path):
    """The released bracket models list `[SOS]` and `{SOS}` there; they stay tokens of a text, no more."""
    vocab, merges = decoders.bpe()
    size = len(vocab)
    added = {"[SOS]": size + 1, "{SOS}": size + 2}
    if fast_file:
        decoders.write_tokenizer(tmp_path, placeholders=True)
        added = {name: load_tokenizer(tmp_path).convert_tokens_to_ids(name) for name in added}
    files = {
        "vocab.json": json.dumps(vocab | {"<|endoftext|>": size}),
        "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n",
        "added_tokens.json": json.dumps(added),
        "special_tokens_map.json": json.dumps(
            {f"{n}_token": "<|endoftext|>" for n in ("bos", "eos", "unk", "pad")}
        ),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 2048}),
        "config.json": json.dumps({"model_type": "gpt_neo"}),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, "utf-8")
    encoder = TextEncoder(load_tokenizer(tmp_path), 16, True)
    (opening, closing), a = encoder.ids([""], "document")[0], vocab["a"]
    assert (opening, closing) == (vocab["{"], vocab["}"])
    assert encoder.ids(["[SOS]a{SOS}"], "document") == [[opening, added["[SOS]"], a, added["{SOS}"], closing]]
    assert encoder.ids(["[SOS]a"], "query")[0][1:-1] == [added["[SOS]"], a]


# Ids


@pytest.mark.parametrize("limit", [5, 12, 500])
@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_ids_without_brackets_are_those_of_the_tokenizer(name, limit, request):
    tokenizer = request.getfixturevalue(name)
    texts = [t for t in [*ODD, SPECIAL, "  kept  "] if t.strip()]
    expected = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert TextEncoder(tokenizer, limit).ids(texts) == expected
        assert TextEncoder(tokenizer, limit).ids(texts, "query") == expected
        assert TextEncoder(tokenizer, limit, True).ids(texts) == expected


@pytest.mark.parametrize("limit", [6, 12, 500])
@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize(("side", "pair"), [("query", "[]"), ("document", "{}")])
def test_brackets_go_around_what_the_tokenizer_gives(side, pair, name, limit, request):
    """The recipe of the SGPT README: the tokenizer's ids, one bracket id put in front and one after."""
    tokenizer = request.getfixturevalue(name)
    texts = [t for t in [*ODD, SPECIAL, "  x  ", "[", "]]", "{}", '"x', "[a] {b}"] if t.strip()]
    opening, closing = (tokenizer.encode(bracket, add_special_tokens=False) for bracket in pair)
    rows = tokenizer([t.strip() for t in texts], truncation=True, max_length=limit - 2)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = TextEncoder(tokenizer, limit, True).ids(texts, side)
    assert ids == [opening + row + closing for row in rows]
    assert max(map(len, ids)) <= limit


@pytest.mark.parametrize("text", ["", " ", "\n\t \u2003\u2028"])
@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_empty_texts(name, text, request):
    tokenizer = request.getfixturevalue(name)
    encoder = TextEncoder(tokenizer, 8, True)
    brackets = [tokenizer.convert_tokens_to_ids(c) for c in "[]{}"]
    assert encoder.ids([text]) == [[tokenizer.eos_token_id]]
    assert encoder.ids([text], "query") == [brackets[:2]]
    assert encoder.ids([text], "document") == [brackets[2:]]


def test_cut_texts_are_counted_in_one_warning(tokenizer):
    encoder = TextEncoder(tokenizer, 4, True)
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than 4 tokens") as caught:
        encoder.ids(["q" * 40, "q", "z" * 50], "query")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(encoder.ids(["qz"], "query")[0]) == 4  # fills the room exactly
        encoder.plain_ids(["q" * 5000])  # and no warning of transformers' either


def test_the_tokenizers_truncation_side_is_kept(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.truncation_side = "left"
    with pytest.warns(UserWarning, match="1 of 1"):
        (ids,) = TextEncoder(tokenizer, 3).ids(["qjz0123"])
    assert ids == tokenizer("123")["input_ids"]


def test_padding_and_truncation_inside_tokenizer_json_have_no_effect(tokenizer, folder):
    other = load_tokenizer(folder)
    other.backend_tokenizer.enable_truncation(3)
    other.backend_tokenizer.enable_padding(length=9)
    texts = ["a longer text than three tokens", "b"]
    assert TextEncoder(other, 50).ids(texts) == TextEncoder(tokenizer, 50).ids(texts)
    other.backend_tokenizer.enable_truncation(3)
    assert TextEncoder(other, 50, True).plain_ids(texts) == TextEncoder(tokenizer, 50).plain_ids(texts)


@pytest.mark.parametrize("bad", [None, float("nan"), b"x", {"text": "x"}, 3, ["x"]])
def test_what_is_not_a_str_is_named_by_its_index(tokenizer, bad):
    encoder = TextEncoder(tokenizer, 8)
    for call in (encoder.ids, encoder.plain_ids):
        with pytest.raises(TypeError, match="text 2 is"):
            call(["a", "b", bad])
        with pytest.raises(TypeError, match="list of texts"):
            call("one text")


def test_surrogates(tokenizer):
    encoder = TextEncoder(tokenizer, 50)
    assert encoder.ids(["a\ud83d b", "\ud83d\ude42"]) == encoder.ids(["a\ufffd b", "🙂"])
    assert encoder.plain_ids(["\ude42"]) == encoder.plain_ids(["\ufffd"])


def test_no_unicode_normalisation(tokenizer):
    composed, apart = TextEncoder(tokenizer, 50).ids(["\u00e9", "e\u0301"])
    assert composed != apart


def test_plain_ids_are_neither_stripped_nor_cut_nor_given_special_tokens(bos_tokenizer):
    texts = ["", "  two  ", "q" * 99, *ODD]
    expected = bos_tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert TextEncoder(bos_tokenizer, 8, True).plain_ids(texts) == expected


def test_prompts_go_before_every_text_of_their_side(tokenizer):
    encoder = TextEncoder(
        tokenizer, 50, prompts={"query": "query: ", "any": "text: "}, default_prompt_name="any"
    )
    assert encoder.ids(["a", ""], "query") == encoder.plain_ids(["query: a", "query: "])
    assert encoder.ids(["a"]) == encoder.plain_ids(["text: a"])
    assert encoder.ids(["a"], "document") == encoder.plain_ids(["a"])


@pytest.mark.parametrize("prompt", ["query: ", "\n\nq: ", " ", ""])
def test_the_length_of_a_prompt_within_brackets_is_that_of_what_is_there(tokenizer, prompt):
    encoder = TextEncoder(tokenizer, 50, brackets=True)
    (row,) = encoder.ids(["(x"], "query", prompt=prompt)
    (text,) = encoder.plain_ids(["(x]"])
    length = encoder.prompt_length(prompt, "query")
    assert row[length:][-len(text) :] == text
    (before,) = encoder.plain_ids([prompt.lstrip()])
    assert length == (len(before) + 1 if before else 0)


def test_no_texts(tokenizer):
    assert TextEncoder(tokenizer, 8).ids([]) == []
    assert TextEncoder(tokenizer, 8).plain_ids([]) == []


def test_many_texts_keep_their_order(tokenizer):
    texts = [str(i) for i in range(10_000)]
    assert TextEncoder(tokenizer, 50).ids(texts) == tokenizer(texts)["input_ids"]


def test_pad_id(folder):
    tokenizer = load_tokenizer(folder)
    assert TextEncoder(tokenizer, 8).pad_id == tokenizer.eos_token_id
    tokenizer.pad_token = "!"
    assert TextEncoder(tokenizer, 8).pad_id == tokenizer.convert_tokens_to_ids("!")
    tokenizer.pad_token = tokenizer.eos_token = None
    encoder = TextEncoder(tokenizer, 8)
    assert (encoder.pad_id, encoder.ids([""])) == (0, [[0]])


def test_encoders_that_cannot_work(tokenizer, bos_tokenizer):
    assert TextEncoder(tokenizer, 3, True).ids(["q"], "query")[0][1:-1] == tokenizer("q")["input_ids"]
    for bad, limit, brackets in ((tokenizer, 0, False), (tokenizer, 2, True), (bos_tokenizer, 3, True)):
        with pytest.raises(InputError, match="leaves no room"):
            TextEncoder(bad, limit, brackets)
    with pytest.raises(ValueError, match="side"):
        TextEncoder(tokenizer, 8).ids(["a"], "passage")


def test_check_ids():
    check_ids([[0, 4], [], [3]], 5)
    for bad in (5, -1):
        with pytest.raises(InputError, match=f"text 1 has token id {bad}, outside the model's 5"):
            check_ids([[0], [1, bad]], 5)
