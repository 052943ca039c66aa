"""The losses against plain numpy, written from the definition: loops over rows and candidates."""

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.tokenizer import load_tokenizer
from train.batches import BatchPlan, PackedBatches
from train.data import Example, ListExamples, text_key
from train.losses import LossConfig, contrastive_loss, distillation_loss, total_loss

B, K, E = 5, 3, 8
DRAW = np.random.default_rng(0)
# A common part keeps all cosines close, so that every candidate counts in the loss.
ARRAYS = [(1 + 0.6 * DRAW.normal(size=shape)).astype(np.float32) for shape in ((B, E), (B, E), (B, K, E))]
ALL = np.ones((B, K), bool)


def ids_of(texts):
    return (
        np.array([text_key(t) for t in np.ravel(texts)], np.int64).view(np.int32).reshape(*np.shape(texts), 2)
    )


def distinct():
    return (
        np.array([f"q{i}" for i in range(B)]),
        np.array([f"p{i}" for i in range(B)]),
        np.array([[f"n{i}.{k}" for k in range(K)] for i in range(B)]),
    )


def cosine(a, b):
    a, b = np.float64(a), np.float64(b)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def by_hand(queries, positives, negatives, texts, present, scale=20.0):
    """Mean of -log softmax at the own positive; a candidate is out if it is the query or a positive of its text."""
    losses = []
    for i in range(B):
        q_text = texts[0][i]
        good = {q_text} | {texts[1][j] for j in range(B) if texts[0][j] == q_text}
        logits = [scale * cosine(queries[i], positives[i])]
        for j in range(B):
            if j != i and texts[1][j] not in good:
                logits.append(scale * cosine(queries[i], positives[j]))
            for k in range(K):
                if present[j, k] and texts[2][j, k] not in good:
                    logits.append(scale * cosine(queries[i], negatives[j, k]))
        losses.append(np.log(np.sum(np.exp(logits))) - logits[0])
    return np.mean(losses)


def ours(texts, present, **options):
    return float(contrastive_loss(*ARRAYS, tuple(ids_of(t) for t in texts), present, **options))


def test_in_batch_and_hard_negatives():
    assert ours(distinct(), ALL) == pytest.approx(by_hand(*ARRAYS, distinct(), ALL), rel=1e-5)


def test_no_hard_negatives():
    texts = (*distinct()[:2], distinct()[2][:, :0])
    value = contrastive_loss(
        *ARRAYS[:2],
        ARRAYS[2][:, :0],
        (ids_of(texts[0]), ids_of(texts[1]), np.zeros((B, 0, 2), np.int32)),
        ALL[:, :0],
    )
    assert float(value) == pytest.approx(by_hand(*ARRAYS, distinct(), ~ALL), rel=1e-5)


def test_ragged_negatives_count_only_where_present():
    present = np.arange(K) < np.array([3, 0, 1, 2, 3])[:, None]
    assert ours(distinct(), present) == pytest.approx(by_hand(*ARRAYS, distinct(), present), rel=1e-5)
    # what stands in an absent place has no influence at all
    changed = ARRAYS[2] + 100.0 * ~present[..., None]
    ids = tuple(ids_of(t) for t in distinct())
    assert float(contrastive_loss(*ARRAYS[:2], changed, ids, present)) == ours(distinct(), present)


@pytest.mark.parametrize(
    "place", ["positive twice", "negative is a positive", "query as candidate", "query twice"]
)
def test_a_positive_is_never_a_negative(place):
    queries, positives, negatives = distinct()
    if place == "positive twice":
        positives[3] = positives[1]
    elif place == "negative is a positive":
        negatives[4, 2] = " P1 "  # case and outer white space do not matter
    elif place == "query as candidate":
        positives[2], negatives[0, 0] = queries[0], queries[4]
    else:
        queries[3] = queries[1]
    texts = (queries, positives, negatives)
    expected = by_hand(*ARRAYS, [np.char.lower(np.char.strip(t)) for t in texts], ALL)
    assert ours(texts, ALL) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - by_hand(*ARRAYS, distinct(), ALL)) > 1e-4  # the case would show


def test_repeated_positives_are_not_pushed_apart():
    texts = distinct()
    texts[1][3] = texts[1][1]
    ids = tuple(ids_of(t) for t in texts)

    def loss_of_query_1(positives):
        return contrastive_loss(ARRAYS[0], positives, ARRAYS[2], ids, ALL) - contrastive_loss(
            jnp.asarray(ARRAYS[0]).at[1].set(0.0), positives, ARRAYS[2], ids, ALL
        )

    gradient = jax.grad(loss_of_query_1)(jnp.asarray(ARRAYS[1]))
    assert float(jnp.abs(gradient[3]).max()) < 1e-7 < float(jnp.abs(gradient[1]).max())


def test_both_directions_is_the_mean_of_the_two():
    texts = distinct()
    texts[1][3] = texts[1][1]
    ids = tuple(ids_of(t) for t in texts)
    empty = (ARRAYS[2][:, :0], ALL[:, :0], np.zeros((B, 0, 2), np.int32))
    swapped = contrastive_loss(ARRAYS[1], ARRAYS[0], empty[0], (ids[1], ids[0], empty[2]), empty[1])
    expected = (ours(texts, ALL) + float(swapped)) / 2
    assert ours(texts, ALL, both_directions=True) == pytest.approx(expected, rel=1e-6)


def test_both_directions_with_a_positive_that_is_another_rows_query():
    """Row 3's positive is the text of query 1: neither direction pushes that text from itself."""
    texts = distinct()
    texts[1][3] = texts[0][1]
    queries, positives, _ = ARRAYS
    losses = []
    for i in range(B):  # the query of each positive among all queries, but those of the positive's own text
        others = [j for j in range(B) if j != i and texts[0][j] != texts[1][i]]
        logits = [20 * cosine(positives[i], queries[j]) for j in (i, *others)]
        losses.append(np.log(np.sum(np.exp(logits))) - logits[0])
    assert len(others) == B - 1  # of the last row; row 3 has one less
    expected = (by_hand(*ARRAYS, texts, ALL) + np.mean(losses)) / 2
    assert ours(texts, ALL, both_directions=True) == pytest.approx(expected, rel=1e-5)


def test_a_negative_of_several_lists_counts_once(tmp_path):
    """The first copy, and none of a positive; in whatever order the rows of several processes stand."""
    draw = np.random.default_rng(2)
    source = ListExamples(
        [
            Example("q0", "p0", ("shared", "other", "p3")),
            Example("q1", "p1", ("SHARED",)),
            Example("q2", "p2", ("n2", "shared ", "Other")),
            Example("q3", "p3", ("P1", "n3")),
        ]
    )
    vectors = [(1 + 0.6 * draw.normal(size=(4, *more, E))).astype(np.float32) for more in ((), (), (3,))]
    encoder = TextEncoder(load_tokenizer(decoders.write_tokenizer(tmp_path)), 32, False)

    def part(process):
        plan = BatchPlan(source, 4, seed=0, shuffle=False, no_duplicates=False)
        batch = PackedBatches(plan, encoder, vocab_size=384, symmetric=False, steps=1, process=process)[0]
        return {name: batch[name] for name in ("ids", "negative_mask", "order", "examples")}

    def loss(*processes):
        parts = [part(process) for process in processes]
        rows = [row for each in parts for row in each.pop("examples")]
        batch = jax.tree.map(lambda *some: np.concatenate(some), *parts)
        return float(total_loss(LossConfig(), *(some[rows] for some in vectors), batch))

    whole = part((0, 1))
    first = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]], bool)
    expected = float(contrastive_loss(*vectors, whole["ids"], first))
    assert loss((0, 1)) == pytest.approx(expected, rel=1e-6)
    for parts in ([(0, 2), (1, 2)], [(1, 2), (0, 2)]):
        assert loss(*parts) == pytest.approx(expected, rel=1e-6)
    every = float(contrastive_loss(*vectors, whole["ids"], whole["negative_mask"]))
    assert abs(every - expected) > 1e-3


def test_matryoshka_is_the_mean_over_leading_sizes():
    batch = {"ids": tuple(ids_of(t) for t in distinct()), "negative_mask": ALL, "order": np.arange(B)}
    value = total_loss(LossConfig(matryoshka=(2, 8)), *ARRAYS, batch)
    short = by_hand(*(a[..., :2] for a in ARRAYS), distinct(), ALL)
    assert float(value) == pytest.approx((short + by_hand(*ARRAYS, distinct(), ALL)) / 2, rel=1e-5)


def test_distillation():
    scores = np.random.default_rng(1).normal(size=(B, 1 + K)).astype(np.float32) * 3
    present = np.arange(K) < np.array([3, 1, 2, 1, 3])[:, None]
    margins, divergences = [], []
    for i in range(B):
        own = [20 * cosine(ARRAYS[0][i], ARRAYS[1][i])]
        own += [20 * cosine(ARRAYS[0][i], ARRAYS[2][i, k]) for k in range(K) if present[i, k]]
        teacher = scores[i, : len(own)].astype(np.float64)
        own = np.array(own)
        margins += [((own[0] - s) - (teacher[0] - t)) ** 2 for s, t in zip(own[1:], teacher[1:], strict=True)]
        p, q = (np.exp(x) / np.exp(x).sum() for x in (teacher, own))
        divergences.append(np.sum(p * np.log(p / q)))
    margin, kl = (distillation_loss(*ARRAYS, scores, present, kind=kind) for kind in ("margin", "kl"))
    assert float(margin) == pytest.approx(np.mean(margins), rel=1e-5)
    assert float(kl) == pytest.approx(np.mean(divergences), rel=1e-5)
    batch = {
        "ids": tuple(ids_of(t) for t in distinct()),
        "negative_mask": present,
        "order": np.arange(B),
        "scores": scores,
    }
    both = total_loss(LossConfig(distill="margin", distill_weight=0.5), *ARRAYS, batch)
    assert float(both) == pytest.approx(
        by_hand(*ARRAYS, distinct(), present) + 0.5 * np.mean(margins), rel=1e-5
    )
    none = batch | {"ids": (*batch["ids"][:2], batch["ids"][2][:, :0]), "negative_mask": ALL[:, :0]}
    bare = total_loss(
        LossConfig(distill="kl", near=1.0),
        *ARRAYS[:2],
        ARRAYS[2][:, :0],
        none | {"scores": scores[:, :1]},
    )
    assert float(bare) == pytest.approx(by_hand(*ARRAYS, distinct(), ~ALL), rel=1e-5)
    for kind in ("margin", "kl"):  # without any negative there is nothing to compare, and no NaN
        gradient = jax.grad(lambda q, kind=kind: distillation_loss(q, *ARRAYS[1:], scores, ~ALL, kind=kind))(
            ARRAYS[0]
        )
        assert float(jnp.abs(gradient).max()) < 1e-6


@pytest.mark.parametrize("options", [{"distill": "mse"}, {"matryoshka": (0, 4)}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LossConfig(**options)
