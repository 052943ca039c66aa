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


def test_features_of_today_on_a_mesh(tmp_path):
    """Norms on both sides, soft caps, q/k norm over all heads, multipliers, windows of both directions, Dense modules,
    prompts that are not pooled: vectors, log-probabilities, and two steps of training.
    """
    code = """
        import json, sys, warnings
        from pathlib import Path
        import numpy as np
        import decoders, folders
        import sgpt_jax as sgpt
        from train.__main__ import main
        from training import data
        warnings.simplefilter("ignore")
        root, texts = Path(sys.argv[1]), ["", "a heron", "the ferry crosses the bay", "people stay at night"] * 2
        pairs = [("night market", text) for text in texts]
        sources = {name: folders.write_folder(name, root / name) for name in ("embeddinggemma", "gritlm")}
        for name in ("gemma2", "olmo2", "granite"):
            sources[name] = decoders.write_tokenizer(decoders.write_checkpoint(name, root / name))
        pooling = sources["embeddinggemma"] / "1_Pooling" / "config.json"
        folders.dump(pooling, json.loads(pooling.read_text()) | {"include_prompt": False})

        def run(name, mesh):
            encoder = sgpt.BiEncoder.from_pretrained(sources[name], mesh=mesh)
            found = [encoder.encode_query(texts), encoder.encode_document(texts)]
            if not encoder.decoder.config.bidirectional:
                found.append(sgpt.CrossEncoder.from_pretrained(sources[name], mesh=mesh).predict(pairs))
            return found

        def losses(mesh):
            out = root / mesh.replace(",", "")
            asked = f"pairs --model {sources['embeddinggemma']} --data {data(1)} --output {out} --mesh {mesh}"
            asked += " --batch-size 8 --chunk-size 8 --max-seq-length 40 --lr 1e-2 --warmup-steps 0 --steps 2"
            assert main([*asked.split(), "--trainable", "all"]) == 0
            return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]

        results = {}
        for name in sources:
            ours, theirs = run(name, sgpt.make_mesh("data=2,fsdp=2,tensor=2")), run(name, None)
            results[name] = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs)]
        results["training"] = np.abs(np.subtract(losses("data=2,fsdp=2,tensor=2"), losses("data=8"))).tolist()
        print(json.dumps(results))
    """
    results = json.loads(run_on_eight(code, tmp_path).stdout.splitlines()[-1])
    assert len(results) == 6
    for what, errors in results.items():
        assert max(errors) < (1e-4 if what == "training" else 1e-5), (what, errors)


def test_a_program_with_a_mesh_of_its_own(tmp_path):
    """What jax.set_mesh has set is for its own arrays."""
    code = """
        import sys
        import jax, numpy as np
        import decoders
        import sgpt_jax as sgpt
        folder = decoders.write_tokenizer(decoders.write_checkpoint("gpt_neo", sys.argv[1]))
        models = [
            (sgpt.BiEncoder.from_pretrained(folder, mesh=mesh), sgpt.CrossEncoder.from_pretrained(folder, mesh=mesh))
            for mesh in (None, sgpt.make_mesh("data=2,tensor=4"))
        ]

        def found():
            return [
                values for encoder, scorer in models
                for values in (encoder.encode(["a heron"] * 8), scorer.predict([("night", "a ferry")] * 8))
            ]

        wanted = found()
        for size in (1, 8):
            with jax.set_mesh(jax.make_mesh((size,), ("x",), devices=jax.devices()[:size])):
                for ours, theirs in zip(found(), wanted):
                    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        print("the same")
    """
    assert run_on_eight(code, tmp_path / "model").stdout.splitlines()[-1] == "the same"


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
