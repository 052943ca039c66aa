"""Greedy as transformers (fixtures/generation/make.py), the shared prefix, what a token is drawn from."""

import json
from pathlib import Path

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_eight

from sgpt_jax.decoder.generation import GREEDY, Sampling, choose, generate_tokens, read_prefix
from sgpt_jax.decoder.model import split
from sgpt_jax.errors import InputError

WRITTEN = json.loads((decoders.FIXTURES / "generation/greedy.json").read_text())
PROMPTS = WRITTEN.pop("prompts")


def write(decoder, prompts, *, shared=0, width=32, sampling=GREEDY, seeds=(0, 1, 2), stops=(), mesh=None):
    """Tokens [B, 10] and log-probabilities; the first `shared` tokens of all prompts are read once."""
    structure, params = split(decoder)
    prefix = read_prefix(structure, params, np.array([prompts[0][:shared]], np.int32)) if shared else None
    rest = [ids[shared:] for ids in prompts]
    ids = np.array([[0] * (width - len(row)) + row for row in rest], np.int32)
    lengths, drawn = np.array([len(row) for row in rest], np.int32), np.array(seeds, np.uint32)
    table = np.zeros(decoders.VOCAB_SIZE, bool)
    table[list(stops)] = True
    return generate_tokens(
        structure, params, prefix, ids, lengths, drawn, table, steps=10, sampling=sampling, mesh=mesh
    )


@pytest.mark.parametrize("variant", list(WRITTEN))
def test_greedy_is_transformers(variant, tmp_path):
    """Prompts of different lengths in one batch; positions, windows, biases and factors of each family."""
    decoder = decoders.load(decoders.write_checkpoint(variant, tmp_path))
    tokens, log_probs = write(decoder, PROMPTS)
    np.testing.assert_array_equal(tokens, WRITTEN[variant]["ids"])
    np.testing.assert_allclose(log_probs, WRITTEN[variant]["log_probs"], atol=1e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return decoders.load(decoders.write_checkpoint("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def alone(tiny):
    """Greedy, after a prefix of 12 tokens that was not shared."""
    return write(tiny, [PROMPTS[2][:12] + ids for ids in PROMPTS], width=48)


def test_a_shared_prefix_changes_nothing(tiny, alone):
    shared = write(tiny, [PROMPTS[2][:12] + ids for ids in PROMPTS], shared=12)
    np.testing.assert_array_equal(shared[0], alone[0])
    np.testing.assert_allclose(shared[1], alone[1], atol=1e-5)


def test_a_text_ends_with_its_stop(tiny, alone):
    """The others go on, and a row that is there for the shape does not count."""
    end = int(alone[0][1, 2])
    tokens, log_probs = write(tiny, [PROMPTS[2][:12] + ids for ids in PROMPTS], width=48, stops=[end])
    for found, scores, whole in zip(np.array(tokens), np.array(log_probs), np.array(alone[0]), strict=True):
        length = whole.tolist().index(end) + 1 if end in whole else 10
        assert found.tolist() == [*whole[:length], *[-1] * (10 - length)]
        assert (scores[length:] == 0).all()
    structure, params = split(tiny)
    nothing = np.zeros((2, 16), np.int32)
    table = np.zeros(decoders.VOCAB_SIZE, bool)
    found = generate_tokens(
        structure, params, None, nothing, np.zeros(2, np.int32), np.zeros(2, np.uint32), table, steps=10,
        sampling=GREEDY,
    )  # fmt: skip
    assert (np.array(found[0]) == -1).all()


def test_draws_do_not_depend_on_the_batch(tiny):
    sampling = Sampling(temperature=2.0, top_k=40, top_p=0.9)
    together = np.array(write(tiny, PROMPTS, sampling=sampling, seeds=(5, 6, 7))[0])
    turned = np.array(write(tiny, PROMPTS[::-1], sampling=sampling, seeds=(7, 6, 5), width=48)[0])
    np.testing.assert_array_equal(turned[::-1], together)
    others = np.array(write(tiny, PROMPTS, sampling=sampling, seeds=(6, 5, 7))[0])
    assert (others[:2] != together[:2]).any(axis=1).all()
    np.testing.assert_array_equal(others[2], together[2])
    # Nor is the draw of every step the same: hot, it would take the same rank each time.
    hot = np.array(write(tiny, PROMPTS, sampling=Sampling(1e6, top_k=decoders.VOCAB_SIZE))[0])[2]
    whole = jnp.array([PROMPTS[2] + hot.tolist()])
    logits = tiny.logits(tiny(whole, jnp.ones_like(whole)))[0, len(PROMPTS[2]) - 1 : -1]
    ranks = (logits > logits[jnp.arange(10), hot][:, None]).sum(axis=-1)
    assert len(set(ranks.tolist())) > 5


def test_what_a_token_is_drawn_from():
    """What top-k and then top-p leave, as often as the softmax says."""
    logits = jnp.tile(jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15])), (4000, 1))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(temperature=1.0, **options):
        drawn = choose(logits, keys, Sampling(temperature, **options))
        return np.bincount(drawn, minlength=5) / 4000

    np.testing.assert_allclose(shares(), [0.1, 0.4, 0.05, 0.3, 0.15], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 4 / 7, 0, 3 / 7, 0], atol=0.03)
    # 0.7 is before the third, 0.85 before the fourth.
    np.testing.assert_allclose(shares(top_p=0.8), np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85, atol=0.03)
    # Of four, 0.42, 0.32, 0.16 and 0.11, the first three come to 0.89. Of all they come to 0.85.
    assert (shares(top_k=4, top_p=0.88) > 0).tolist() == [False, True, False, True, True]
    np.testing.assert_allclose(shares(100.0), [0.2] * 5, atol=0.03)
    np.testing.assert_array_equal(shares(5.0, top_p=1e-9), [0, 1, 0, 0, 0])
    np.testing.assert_array_equal(shares(0.0), [0, 1, 0, 0, 0])


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_is_checked(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Sampling(**options)


def test_on_a_mesh(tmp_path):
    """Rows and weights over eight devices: the same tokens."""
    code = """
        import sys
        sys.path.append(sys.argv[2])
        import decoders, jax, numpy as np
        import sgpt_jax as sgpt
        from sgpt_jax.decoder.sharding import batch_sharding
        from test_generation import GREEDY, PROMPTS, generate_tokens, read_prefix, split
        folder = decoders.write_checkpoint("qwen3_window", sys.argv[1])
        mesh = sgpt.make_mesh("data=2,fsdp=2,tensor=2")
        ids = np.array([row[:5] for row in PROMPTS] + [[0] * 5], np.int32)
        lengths, seeds = np.array([5, 5, 5, 0], np.int32), np.zeros(4, np.uint32)
        found = []
        for there in (None, mesh):
            structure, params = split(sgpt.load_decoder(folder, mesh=there))
            prefix = read_prefix(structure, params, np.array([PROMPTS[2]], np.int32), mesh=there)
            rows = jax.device_put((ids, lengths, seeds), None if there is None else batch_sharding(there))
            found.append(generate_tokens(
                structure, params, prefix, *rows, np.zeros(384, bool), steps=6, sampling=GREEDY, mesh=there
            ))
        np.testing.assert_array_equal(*(tokens for tokens, _ in found))
        np.testing.assert_allclose(*(log_probs for _, log_probs in found), atol=1e-5)
        print("same", int((np.array(found[1][0]) >= 0).sum()))
    """
    done = run_on_eight(code, tmp_path / "model", Path(__file__).parent)
    assert done.stdout.split() == ["same", "18"]
