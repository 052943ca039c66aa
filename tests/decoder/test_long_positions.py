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
