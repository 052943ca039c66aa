"""Every mesh of eight devices gives the vectors and the scores of one device."""

import json

import pytest
from devices import SHAPES, run_on_eight

from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.errors import InputError


@pytest.mark.parametrize("variant", ["bloom_six_heads", "qwen3"])  # heads that do not divide; grouped queries
def test_vectors_and_scores_on_every_mesh(variant, tmp_path):
    code = """
        import json, sys
        import numpy as np
        import decoders
        import sgpt_jax as sgpt
        texts = ["", "a heron", "the ferry crosses the bay", "people stay at night"] * 2
        pairs = [("night market", text) for text in texts] + [("heron", text) for text in texts]
        folder = decoders.write_tokenizer(decoders.write_checkpoint(sys.argv[1], sys.argv[2]))

        def run(mesh):
            encoder = sgpt.BiEncoder.from_pretrained(folder, brackets=True, mesh=mesh)
            scorer = sgpt.CrossEncoder.from_pretrained(folder, mesh=mesh)
            return encoder.encode_document(texts), scorer.predict(pairs)

        expected, results = run(None), {}
        for sizes in json.loads(sys.argv[3]):
            mesh = sgpt.make_mesh("data={},fsdp={},tensor={}".format(*sizes))
            results[str(sizes)] = [
                float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                for ours, theirs in zip(run(mesh), expected)
            ]
        print(json.dumps(results))
    """
    done = run_on_eight(code, variant, tmp_path / "model", json.dumps(SHAPES))
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(SHAPES) == 10
    for sizes, errors in results.items():
        assert max(errors) < 1e-5, (sizes, errors)


def test_default_of_a_command():
    """One CPU device; all accelerators of this process on data."""
    assert device_mesh(None) is None
    code = """
        import jax
        from sgpt_jax.decoder.sharding import device_mesh
        assert device_mesh(None) is None
        print(dict(device_mesh("fsdp=4,tensor=2").shape))
        class Accelerator:  # as jax.make_mesh sees it
            def __init__(self, device): self.device = device
            platform = "gpu"
            def __getattr__(self, name): return getattr(self.device, name)
        jax.local_devices = lambda real=jax.local_devices: [Accelerator(device) for device in real()]
        from sgpt_jax.decoder import sharding
        sharding.make_mesh = lambda spec, devices: (spec, len(devices))
        print(device_mesh(None), device_mesh("tensor=8"))
    """
    assert run_on_eight(code).stdout.splitlines() == [
        "{'data': 1, 'fsdp': 4, 'tensor': 2}",
        "(None, 8) ('tensor=8', 8)",
    ]


def test_a_mesh_for_other_devices_is_refused():
    with pytest.raises(InputError, match="for 16 devices"):
        device_mesh("data=16")
