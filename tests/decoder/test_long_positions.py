"""bfloat16 at positions that bfloat16 itself cannot tell apart: its whole numbers end at 256."""

import json
from pathlib import Path

import decoders
import numpy as np
import pytest

from sgpt_jax.load import load_decoder

VARIANTS = ("llama", "gptj", "gpt_neox", "bloom")
IDS = np.random.default_rng(0).integers(5, 300, (1, 900)).astype(np.int32)
NEAR, FAR = slice(100, 256), slice(300, None)
SAMPLED = (0, 255, 257, 600, 899)
# What torch gives: fixtures/decoders/make_bfloat16.py.
TORCH = decoders.FIXTURES / "decoders/bfloat16.json"


def write_long(variant, folder):
    """A checkpoint of a tiny decoder that takes 1,024 positions."""
    decoders.write_checkpoint(variant, folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    longer = {key: 1024 for key in ("max_position_embeddings", "n_positions") if key in config}
    path.write_text(json.dumps(config | longer))


def errors(rounded, exact):
    """Mean relative errors of hidden states [T, E] near the beginning and far from it."""
    found = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    return np.mean(found[NEAR]), np.mean(found[FAR])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_beyond_position_256(variant, tmp_path):
    """The error against float32 is no larger there than before, and nowhere larger than torch's own."""
    write_long(variant, tmp_path)
    exact, rounded = (
        np.asarray(load_decoder(tmp_path, dtype)(IDS, np.ones_like(IDS)), np.float32)[0]
        for dtype in ("float32", "bfloat16")
    )
    torch = json.loads(TORCH.read_text())[variant]
    np.testing.assert_allclose(exact[list(SAMPLED)], torch["float32"], atol=1e-4)  # of angles near 899
    near, far = errors(rounded, exact)
    assert far < 1.5 * near < 0.1, (near, far)
    assert near < 1.1 * torch["near"] and far < 1.1 * torch["far"], (near, far)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_distances_matter(variant, dtype, tmp_path):
    """With rotation or ALiBi, positions from 301 on give what those from 0 on give."""
    decoders.write_checkpoint(variant, tmp_path)
    decoder = load_decoder(tmp_path, dtype)
    ids = np.random.default_rng(0).integers(5, 300, (1, 24)).astype(np.int32)
    near, far = (
        np.asarray(
            decoder(ids, segments=np.zeros_like(ids), positions=first + np.arange(24, dtype=np.int32)[None]),
            np.float32,
        )
        for first in (0, 301)
    )
    assert np.linalg.norm(far - near) / np.linalg.norm(near) < {"float32": 1e-4, "bfloat16": 0.02}[dtype]
