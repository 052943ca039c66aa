"""The cross-encoder against torch pair by pair, in every batch composition; tokens, cuts, odd inputs, memory."""

import dataclasses
import itertools
import json
import warnings

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_eight
from etils import epath
from flax import nnx

from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.cross_encoder import CrossEncoder, NaNScoreError
from sgpt_jax.decoder import log_probs
from sgpt_jax.decoder.batch import Batch, Targets
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.model import Decoder, merge, split
from sgpt_jax.errors import InputError
from sgpt_jax.packing.layout import lay_out, plan_batches
from sgpt_jax.packing.shared import lay_out_targets, row_room, shared_rows
from sgpt_jax.query_scoring import log_probs_of_targets, sum_log_probs
from sgpt_jax.reports import ScoreReport
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.pairs import DEFAULT_PROMPT, SEARCH_ENDPOINT_PROMPT, Prompt, tokenise_pairs
from sgpt_jax.text.tokenizer import load_tokenizer

CASES = json.loads((decoders.FIXTURES / "cross_encoder/cases.json").read_text("ascii"))
with np.load(decoders.FIXTURES / "cross_encoder/scores.npz") as stored:
    TORCH = dict(stored)
# One of each way to have positions, with windows where there are any: learned, rotary, ALiBi.
POSITIONS = ("gpt_neo", "mistral", "bloom")
HERON = "A heron waits in the shallow water. It folds its neck and stands."


def plan_of(case):
    return case["prompt"], case["front"], case["max_seq_length"]


PLANS = {
    plan: [case_number for case_number, case in enumerate(CASES) if plan_of(case) == plan]
    for plan in dict.fromkeys(map(plan_of, CASES))
}


def prompt_of(plan):
    prompt = Prompt.parse(plan[0])
    return dataclasses.replace(prompt, prefix=plan[1] + prompt.prefix)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(decoders.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def decoder_of(tmp_path_factory):
    loaded = {}

    def load(variant):
        if variant not in loaded:
            folder = decoders.write_checkpoint(variant, tmp_path_factory.mktemp(variant))
            loaded[variant] = load_checkpoint(open_checkpoint(epath.Path(folder)))
        return loaded[variant]

    return load


def encoder(decoder, tokenizer, prompt=DEFAULT_PROMPT, length=192, reduction="sum"):
    prompt = prompt if isinstance(prompt, Prompt) else Prompt.parse(prompt)
    return CrossEncoder(decoder, TextEncoder(tokenizer, length), prompt, reduction)


def pairs_of(numbers):
    return [(CASES[number]["query"], CASES[number]["document"]) for number in numbers]


def predict(model, pairs, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.predict(pairs, **options)


def without_sharing(model, pairs):
    """Scores where every pair has a context, and so a row, of its own."""
    tokens = tokenise_pairs(model.text, model.prompt, *zip(*pairs, strict=True))
    alone = dataclasses.replace(
        tokens,
        contexts=[tokens.contexts[context] for context, _ in tokens.pairs],
        pairs=[(index, query) for index, (_, query) in enumerate(tokens.pairs)],
    )
    return sum_log_probs(log_probs_of_targets(model.decoder, model.text, alone, mesh=None), len(alone.pairs))[
        tokens.indices
    ]


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan[0][:12]!r}-{plan[2]}")
def test_token_ids_are_the_references(plan, tokenizer):
    for number in PLANS[plan]:
        case = CASES[number]
        text = TextEncoder(tokenizer, case["max_seq_length"])
        tokens = tokenise_pairs(text, prompt_of(plan), [case["query"]], [case["document"]])
        assert tokens.lengths[0] == case["query_tokens"]
        assert tokens.queries_cut[0] == (case["query_cut"] > 0)
        if case["query_tokens"]:
            assert tokens.documents_cut[0] == (case["document_cut"] > 0)
            assert tokens.contexts[0] + tokens.queries[0] == case["ids"]
        else:
            assert tokens.indices[0] == -1 and not tokens.pairs


@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_scores_equal_torch(variant, tokenizer, decoder_of):
    plan = list(PLANS)[1]  # the default prompt, without room for every text; with room for all of them: below
    model = encoder(decoder_of(variant), tokenizer, prompt_of(plan), plan[2])
    assert_close(predict(model, pairs_of(PLANS[plan])), TORCH[variant][PLANS[plan]])


@pytest.mark.parametrize("variant", ["gpt_neo", "llama"])
def test_scores_equal_torch_with_other_prompts(variant, tokenizer, decoder_of):
    for plan in itertools.islice(PLANS, 2, None):
        model = encoder(decoder_of(variant), tokenizer, prompt_of(plan), plan[2])
        assert_close(predict(model, pairs_of(PLANS[plan])), TORCH[variant][PLANS[plan]])


@pytest.mark.parametrize("variant", POSITIONS)
def test_scores_do_not_depend_on_the_batch(variant, tokenizer, decoder_of):
    plan = next(iter(PLANS))
    numbers = PLANS[plan]
    model = encoder(decoder_of(variant), tokenizer, prompt_of(plan), plan[2])
    expected = TORCH[variant][numbers]
    assert_close(np.concatenate([predict(model, pairs_of([number])) for number in numbers]), expected)
    order = np.random.RandomState(1).permutation(len(numbers)).tolist()
    shuffled = pairs_of([numbers[i] for i in order + order])
    for batch_tokens in (1, 700):
        assert_close(predict(model, shuffled, batch_tokens=batch_tokens), expected[order + order])


@pytest.mark.parametrize("variant", POSITIONS)
def test_queries_of_one_document_share_its_pass(variant, tokenizer, decoder_of, monkeypatch):
    model = encoder(decoder_of(variant), tokenizer)
    words = ["the", "birds", "wade", "in", "shallow", "water", "and", "fold", "long", "grey", "necks"]
    draw = np.random.RandomState(2)
    queries = [" ".join(draw.choice(words, draw.randint(1, 6))) for _ in range(70)]
    pairs = [(query, document) for query in queries for document in (HERON, "Boats.")]
    alone = without_sharing(model, pairs)
    assert_close(alone[:4], np.concatenate([model.predict([pair]) for pair in pairs[:4]]))
    # Rows become longer than a text may be; positions do not.
    monkeypatch.setattr("sgpt_jax.packing.shared.row_room", lambda *_: 1000)
    together = ScoreReport()
    assert_close(model.predict(pairs, report=together), alone)
    assert together.tokens > 2 * model.text.max_seq_length
    assert together.tokens < together.tokens_alone / 3
    assert together.tokens_saved == together.tokens_alone - together.tokens
    # Documents whose queries need several rows.
    monkeypatch.setattr("sgpt_jax.packing.shared.row_room", lambda *_: 100)
    split_up = ScoreReport()
    assert_close(model.predict(pairs, report=split_up), alone)
    assert together.tokens < split_up.tokens < split_up.tokens_alone


ON_EIGHT_DEVICES = """
import sys
import numpy as np
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.sharding import make_mesh

documents = ["A heron waits in the shallow water.", "Boats.", "The bay in winter, when the ferry rests."]
pairs = [(query, document) for query in ("birds", "ferry times", "b", "which", "ice") for document in documents]
alone = CrossEncoder.from_pretrained(sys.argv[1]).predict(pairs)
for spec in ("data=8", "data=2,fsdp=2,tensor=2"):
    spread = CrossEncoder.from_pretrained(sys.argv[1], mesh=make_mesh(spec)).predict(pairs)
    np.testing.assert_allclose(spread, alone, rtol=1e-4)
"""


def test_scores_on_a_mesh(tmp_path):
    decoders.write_checkpoint("llama", tmp_path)
    decoders.write_tokenizer(tmp_path)
    run_on_eight(ON_EIGHT_DEVICES, tmp_path)


@pytest.mark.parametrize("prefix", [1, 20, 300])
def test_room_of_a_row_is_where_a_query_token_costs_least(prefix):
    config = DecoderConfig(
        vocab_size=384, embed_dim=768, num_layers=1, num_heads=12, num_kv_heads=12, head_dim=64,
        mlp_dim=4 * 768, max_positions=None, positions="alibi",
    )  # fmt: skip
    room = row_room(prefix, config)

    def cost(x):  # multiplications of the weights and of attention in a layer, per token after the prefix
        return (12 * 768**2 * (prefix + x) + 2 * 768 * (prefix + x) ** 2) / x

    assert cost(room) < min(cost(room // 2), cost(room * 2))
    assert row_room(3000, config) < 500  # attention scores would take too much memory


@pytest.mark.parametrize("entries", [5, 383, 384])
def test_vocabulary_blocks(entries, tokenizer, decoder_of, monkeypatch):
    monkeypatch.setattr(log_probs, "HEAD_ENTRIES", entries)
    jax.clear_caches()  # programs with other blocks
    plan = next(iter(PLANS))
    for variant in ("gpt2", "gptj"):  # a tied head; an untied one with a bias
        model = encoder(decoder_of(variant), tokenizer, prompt_of(plan), plan[2])
        assert_close(predict(model, pairs_of(PLANS[plan])), TORCH[variant][PLANS[plan]])


def test_memory_does_not_hold_all_logits():
    positions, vocabulary = 1024, 50_257
    config = DecoderConfig(
        vocab_size=vocabulary, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
        max_positions=positions, positions="learned",
    )  # fmt: skip
    structure, params = split(nnx.eval_shape(lambda: Decoder(config, Build(jnp.float32, rngs=nnx.Rngs(0)))))
    array = jax.ShapeDtypeStruct((1, positions), jnp.int32)
    program = log_probs.score_tokens.lower(
        structure, params, Batch(array, array, array), Targets(array, array), mesh=None
    )
    used = program.compile().memory_analysis().temp_size_in_bytes
    assert used < positions * vocabulary * 4 / 3


def random_rows(share):
    """400 pairs of 40 prefixes and 90 continuations, as token ids. Without sharing, each has a prefix of its own."""
    draw = np.random.RandomState(3)
    pairs = list(
        dict.fromkeys((int(draw.randint(40) ** 1.3) % 40, int(draw.randint(90))) for _ in range(400))
    )
    prefixes = [draw.randint(1, 380, draw.randint(1, 200)).tolist() for _ in range(40)]
    continuations = [draw.randint(1, 380, draw.choice([1, 2, 30])).tolist() for _ in range(90)]
    config = DecoderConfig(
        vocab_size=384, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=128,
        max_positions=None, positions="alibi",
    )  # fmt: skip
    if not share:
        prefixes = [prefixes[prefix] for prefix, _ in pairs]
        pairs = [(index, continuation) for index, (_, continuation) in enumerate(pairs)]
    rows = shared_rows(pairs, list(map(len, prefixes)), list(map(len, continuations)), config)
    return pairs, prefixes, continuations, rows


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("batch_tokens", "num_shards"), [(2048, 1), (4096, 4), (1, 2)])
def test_plans_hold_every_pair_once_in_few_shapes(share, batch_tokens, num_shards):
    pairs, prefixes, continuations, rows = random_rows(share)
    assert sorted(index for row in rows for index in row.texts) == list(range(len(pairs)))
    assert share == (len(rows) < len(pairs))
    plans = plan_batches(rows, batch_tokens=batch_tokens, row_multiple=num_shards)
    assert sorted(index for plan in plans for index in plan.texts) == list(range(len(pairs)))
    # Only the last batch has fewer rows than fit: a shape for each length, and one more.
    for plan in plans[:-1]:
        assert plan.num_rows == max(1, batch_tokens // (plan.length * num_shards)) * num_shards
    shapes = {(plan.num_rows, plan.length) for plan in plans}
    assert len(shapes) <= len({plan.length for plan in plans}) + 1
    assert len(shapes) <= 4 * np.log2(max(row.length for row in rows)) + 1
    read = [continuations[continuation][:-1] for _, continuation in pairs]
    for plan in plans:
        assert plan.num_rows % num_shards == 0
        assert plan.padded_tokens <= max(batch_tokens, num_shards * plan.length)
        batch = lay_out(plan, read, 0, prefixes)
        targets, owners = lay_out_targets(plan, pairs, prefixes, continuations, num_shards)
        assert sorted(set(owners[owners >= 0].tolist())) == sorted(plan.texts)
        for shard in range(num_shards):
            shard_rows = slice(shard * plan.num_rows // num_shards, (shard + 1) * plan.num_rows // num_shards)
            ids, positions, segments = (
                array[shard_rows].ravel() for array in (batch.input_ids, batch.positions, batch.segments)
            )
            used = owners[shard] >= 0
            assert not used[used.sum() :].any() and (targets.token_ids[shard] >= 0).tolist() == used.tolist()
            for index in set(owners[shard][used].tolist()):
                prefix, tokens = prefixes[pairs[index][0]], continuations[pairs[index][1]]
                states = targets.states[shard][owners[shard] == index]
                assert targets.token_ids[shard][owners[shard] == index].tolist() == tokens
                # The first target is predicted by the end of the prefix, which begins the same row.
                start = states[0] + 1 - len(prefix)
                assert start % plan.length == 0
                assert ids[start : states[0] + 1].tolist() == prefix
                assert positions[start : states[0] + 1].tolist() == list(range(len(prefix)))
                assert not segments[start : states[0] + 1].any()
                assert ids[states[1:]].tolist() == tokens[:-1]
                assert positions[states].tolist() == list(
                    range(len(prefix) - 1, len(prefix) - 1 + len(tokens))
                )
                assert len(set(segments[states[1:]])) <= 1 and (segments[states[1:]] > 0).all()


def test_rank_is_best_first_and_stable(tokenizer, decoder_of):
    model = encoder(decoder_of("llama"), tokenizer)
    documents = ["Boats.", HERON, "Boats.", "A heron.", "Boats."]
    scores = model.predict([("wading birds", document) for document in documents])
    ranked = model.rank("wading birds", documents)
    assert [hit["corpus_id"] for hit in ranked] == sorted(range(5), key=lambda i: -scores[i])
    assert [hit["score"] for hit in ranked] == sorted(scores.tolist(), reverse=True)
    boats = [hit["corpus_id"] for hit in ranked if hit["corpus_id"] in (0, 2, 4)]
    assert boats == [0, 2, 4]
    assert model.rank("wading birds", documents, top_k=2) == ranked[:2]
    assert model.rank("wading birds", documents, top_k=9) == ranked
    assert model.rank("wading birds", []) == []
    json.dumps(ranked)
    with pytest.raises(TypeError, match="not one str"):
        model.rank("wading birds", HERON)
    with pytest.raises(InputError, match="top_k"):
        model.rank("wading birds", documents, top_k=0)


def test_one_warning_counts_what_was_changed(tokenizer, decoder_of):
    model = encoder(decoder_of("gpt2"), tokenizer, length=64)
    pairs = [
        ("", HERON),
        ("birds " * 60, HERON),
        ("birds", HERON * 5),
        ("birds", HERON * 6),
        ("birds", "Boats."),
    ]
    report = ScoreReport()
    with pytest.warns(UserWarning) as caught:
        scores = model.predict(pairs, report=report)
    (warning,) = caught
    assert "of 5 pairs" in str(warning.message)
    assert warning.filename == __file__
    assert (report.pairs, report.queries_empty, report.queries_cut, report.documents_cut) == (5, 1, 1, 3)
    assert scores[0] == 0 and np.all(scores[1:] < 0) and scores.dtype == np.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict([("birds", "Boats."), ("birds", "")])


def test_empty_calls(tokenizer, decoder_of):
    model = encoder(decoder_of("gpt2"), tokenizer)
    assert model.predict([]).shape == (0,) and model.predict([]).dtype == np.float32
    assert predict(model, [("", ""), ("", HERON)]).tolist() == [0, 0]


@pytest.mark.parametrize(
    "bad", [("q",), "qd", ("q", None), ("q", b"d"), ("q", "d", "d"), {"q": "d"}, (1, "d")]
)
def test_what_is_no_pair(bad, tokenizer, decoder_of):
    with pytest.raises(TypeError, match="pair 1 "):
        encoder(decoder_of("gpt2"), tokenizer).predict([("q", "d"), bad])


def test_nan_is_refused(tokenizer, decoder_of):
    structure, params = split(decoder_of("gpt2"))
    damaged = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    with pytest.raises(NaNScoreError, match="pair 1 is NaN") as caught:
        predict(encoder(merge(structure, damaged), tokenizer), [("", "d"), ("q", "d")])
    assert caught.value.index == 1


def test_prompts(tokenizer, decoder_of):
    for template in ("no place", "{} twice {}", "{doc}"):
        with pytest.raises(InputError, match=r"this one has [02]"):
            Prompt.parse(template)
    assert Prompt.parse("{a} {{ {} }}") == Prompt("{a} {{ ", " }}")
    shown = Prompt.parse("Document:\n{}\nQuery:\n").with_examples(
        [("{} a", "b"), ("c", "d")], instruction="Find.\n"
    )
    assert shown.prefix == "Find.\nDocument:\n{} a\nQuery:\nb\nDocument:\nc\nQuery:\nd\nDocument:\n"
    assert shown.suffix == "\nQuery:\n"
    with pytest.raises(InputError, match="the prompt takes"):
        encoder(decoder_of("gpt2"), tokenizer, DEFAULT_PROMPT, length=26)
    with pytest.raises(InputError, match="192 positions"):
        encoder(decoder_of("gpt2"), tokenizer, length=193)
    with pytest.raises(InputError, match="reduction"):
        encoder(decoder_of("gpt2"), tokenizer, reduction="median")


def test_reductions(tokenizer, decoder_of):
    pairs = [("wading birds", HERON), ("boats", HERON), ("boats", "Boats sail."), ("", HERON), ("boats", "")]
    queries = [query for query, _ in pairs]
    prompt = SEARCH_ENDPOINT_PROMPT
    sums, means, endpoint = (
        predict(encoder(decoder_of("llama"), tokenizer, prompt, reduction=kind), pairs)
        for kind in ("sum", "mean", "search-endpoint")
    )
    counts = [len(tokenizer.encode(" " + query)) if query else 1 for query in queries]
    assert_close(means, sums / counts)
    empty = predict(
        encoder(decoder_of("llama"), tokenizer, prompt, reduction="mean"), [(query, "") for query in queries]
    )
    np.testing.assert_allclose(endpoint, 100 * (means - empty), rtol=1e-4, atol=1e-3)
    assert endpoint[3] == endpoint[4] == 0


def test_a_checkpoint_without_head_is_refused(tmp_path):
    decoders.write_checkpoint("llama", tmp_path, model_class="base")
    decoders.write_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no language-model head"):
        CrossEncoder.from_pretrained(tmp_path)


def test_from_pretrained(tmp_path):
    decoders.write_checkpoint("bloom", tmp_path)
    decoders.write_tokenizer(tmp_path)
    plan = next(iter(PLANS))
    model = CrossEncoder.from_pretrained(str(tmp_path), max_seq_length=192)
    assert_close(predict(model, pairs_of(PLANS[plan])), TORCH["bloom"][PLANS[plan]])
    assert CrossEncoder.from_pretrained(tmp_path, prompt="{} ").text.max_seq_length == 2048
    with pytest.raises(InputError, match="max_seq_length 0"):
        CrossEncoder.from_pretrained(tmp_path, max_seq_length=0)
    half = CrossEncoder.from_pretrained(tmp_path, dtype="bfloat16", max_seq_length=192)
    close = predict(half, pairs_of(PLANS[plan]))
    np.testing.assert_allclose(close, TORCH["bloom"][PLANS[plan]], rtol=0.05)
