"""Texts that a decoder writes for documents, and the prompt for a query. Arrays: decoder/test_generation.py."""

import dataclasses

import decoders
import numpy as np
import pytest

from sgpt_jax.decoder.generation import Sampling
from sgpt_jax.errors import InputError
from sgpt_jax.folder.source import resolve
from sgpt_jax.generate import Generated, _read, _stops, _tokenise, check_writer, generate, query_prompt
from sgpt_jax.load import load_parts, open_model
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.pairs import Prompt

PROMPT = Prompt("Document:\n", "\nQuery:")
DOCUMENTS = ["the heron waits", "a ferry crosses the bay twice a day, and three people stay", "", "market"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A decoder and its tokenizer."""
    folder = decoders.write_checkpoint("llama", tmp_path_factory.mktemp("generate") / "tiny")
    decoders.write_tokenizer(folder)
    parts = load_parts(open_model(resolve(folder)), "float32", None)
    return parts.decoder, TextEncoder(parts.tokenizer, 128)


def test_a_text_is_the_same_alone(writer):
    options = {"sampling": Sampling(1.5), "max_new_tokens": 12}
    found = generate(*writer, PROMPT, DOCUMENTS, seeds=range(5, 9), **options)
    for number in (0, 2):
        (alone,) = generate(*writer, PROMPT, DOCUMENTS[number : number + 1], seeds=[5 + number], **options)
        assert alone.text == found[number].text
        assert alone.log_prob == pytest.approx(found[number].log_prob, abs=1e-4)
    assert len({one.text for one in found}) > 1
    assert all("\n" not in one.text for one in found)
    assert generate(*writer, PROMPT, []) == []


def test_a_text_ends_with_its_line(writer):
    """Or a special token, or a row of the embedding that is no token."""
    _, text = writer
    stops = _stops(text.tokenizer, 400)
    newline = text.plain_ids(["\n"])[0]
    assert stops[newline].all()
    assert stops[decoders.EOS_ID]
    assert stops[len(text.tokenizer) :].all()
    words = text.plain_ids(["a ferry crosses the bay"])[0]
    assert not stops[words].any()
    tokens, log_probs = np.array([*words, *newline, -1, -1]), -np.arange(len(words) + 3.0)
    found = _read(text.tokenizer, tokens, log_probs, stops)
    assert found == Generated("a ferry crosses the bay", -len(words) / 2, True)
    assert _read(text.tokenizer, tokens[: len(words)], log_probs, stops).finished is False


def test_what_is_read_of_a_prompt(writer):
    """The whole text's tokens, cut at the document's end; the common ones stand apart."""
    _, text = writer
    (whole,) = text.plain_ids(["Document:\n" + DOCUMENTS[1] + "\nQuery:"])
    (after,) = text.plain_ids(["\nQuery:"])
    prefix, rows = _tokenise(text, PROMPT, DOCUMENTS, 100, None, None)
    assert prefix + rows[1] == whole
    assert all(row[-len(after) :] == after for row in rows)
    _, short = _tokenise(text, PROMPT, DOCUMENTS, 100, 3, None)
    assert short[1] == rows[1][:3] + after
    assert short[3][-len(after) :] == after
    room = len(prefix) + len(after) + 5
    assert len(_tokenise(text, PROMPT, DOCUMENTS, room, None, None)[1][1]) == 5 + len(after)
    with pytest.raises(InputError, match="leaves no room for a document"):
        _tokenise(text, PROMPT, DOCUMENTS, room - 5, None, None)
    assert _tokenise(text, Prompt("", ""), ["", "market"], 100, None, None)[1][0] == [text.eos_id]


def test_prompts(writer):
    tokenizer = writer[1].tokenizer
    examples = [("A heron waits.", "how herons fish"), ("Glue sets.", "when glue sets")]
    plain = query_prompt(tokenizer, examples, "Ask.")
    assert plain.prefix == (
        "Document: A heron waits.\nRelevant query: how herons fish\n\n"
        "Document: Glue sets.\nRelevant query: when glue sets\n\nDocument: "
    )
    assert plain.suffix == "\nRelevant query:"
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% if not enable_thinking %}<no>{% endif %}{% endif %}"
        )
        chat = query_prompt(tokenizer, examples[:1], "Ask.")
        assert (
            chat.prefix == "<user>Ask.\n\nA heron waits.<assistant>how herons fish<user>Ask.\n\n"
            and chat.suffix == "<assistant><no>"
        )
        tokenizer.chat_template = "{{ messages[0].content }}"
        with pytest.raises(InputError, match="does not show the document once"):
            query_prompt(tokenizer, examples, "Ask.")
    finally:
        tokenizer.chat_template = None


def test_who_cannot_write(writer):
    decoder, text = writer
    with pytest.raises(InputError, match="without a language-model head"):
        check_writer(dataclasses.replace(decoder.config, head="none"))
    with pytest.raises(InputError, match="bidirectional"):
        check_writer(dataclasses.replace(decoder.config, bidirectional=True))
    with pytest.raises(InputError, match="max_new_tokens"):
        generate(decoder, text, PROMPT, DOCUMENTS, max_new_tokens=0)
    with pytest.raises(TypeError, match="document 1 is int"):
        generate(decoder, text, PROMPT, ["a", 1])


def test_longrope_stays_within_its_original_context(tmp_path):
    """Beyond it, every token of the text would be rotated otherwise, those in the cache too."""
    folder = decoders.write_tokenizer(decoders.write_checkpoint("phi3_longrope_long", tmp_path / "phi3"))
    parts = load_parts(open_model(resolve(folder)), "float32", None)
    with pytest.raises(InputError, match="leaves no room"):
        generate(parts.decoder, TextEncoder(parts.tokenizer, 128), PROMPT, ["a"], max_new_tokens=4)
