"""bfloat16 at positions that bfloat16 itself cannot tell apart: its whole numbers end at 256."""

import json

import decoders
import numpy as np
import pytest

from sgpt_jax.load import load_decoder


@pytest.mark.parametrize("variant", ["llama", "gptj", "gpt_neox", "bloom"])
def test_bfloat16_beyond_position_256(variant, tmp_path):
    """The error against float32 is no larger there than before."""
    decoders.write_checkpoint(variant, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("max_position_embeddings", "n_positions"):
        if key in config:
            config[key] = 1024
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = np.random.default_rng(0).integers(5, 300, (1, 900)).astype(np.int32)
    exact, rounded = (
        np.asarray(load_decoder(tmp_path, dtype)(ids, np.ones_like(ids)), np.float32)[0]
        for dtype in ("float32", "bfloat16")
    )
    errors = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    near, far = np.mean(errors[100:256]), np.mean(errors[300:])
    assert far < 1.5 * near < 0.1, (near, far)


@pytest.mark.parametrize("variant", ["llama", "gptj", "gpt_neox", "bloom"])
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
