"""Batches on a mesh whose order of devices is not that of the processes, as on the hosts of a TPU pod."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from devices import cpus

CODE = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import AxisType, Mesh
from sgpt_jax.errors import InputError
from sgpt_jax.decoder.sharding import AXES
from sgpt_jax.packing.rows import most_texts
from train.batches import pack
from train.step import place_batch

count, length = 6, 24
number = jax.process_index()
names = 1 + np.arange(count) + count * number
texts = [[name + kind] * (2 + name % 3) for kind in (0, 100, 200) for name in names.tolist()]
rows, vectors = pack(texts, length, 0)
batch = {
    "rows": rows,
    "skip": np.zeros((len(rows.segments), most_texts(length)), np.int32),
    "indices": (vectors[:count], vectors[count : 2 * count], vectors[2 * count :][:, None]),
    "ids": tuple(np.stack([names, names], -1).astype(np.int32) for _ in range(2)),
    "negative_mask": np.ones((count, 1), bool),
    "order": np.arange(count, dtype=np.int32),
    "scores": np.zeros((count, 2), np.float32),
}

def placed(order, shape):
    devices = np.array(jax.devices())[order].reshape(shape)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    return place_batch(batch, rows=len(rows.segments) + 1, chunk_rows=0, pad_id=0, mesh=mesh)

@jax.jit
def texts_at(rows, indices):
    row, segment = indices // most_texts(length), indices % most_texts(length) + 1
    here = rows.segments[row] == segment[..., None]
    return (rows.input_ids[row] * here).sum(-1) // here.sum(-1)

found = {}
for name, order, shape in (("in turn", [0, 2, 1, 3], (4, 1, 1)), ("in order", [0, 1, 2, 3], (2, 1, 2))):
    arrays = placed(order, shape)
    kinds = [jax.experimental.multihost_utils.process_allgather(texts_at(arrays["rows"], p), tiled=True)
             for p in arrays["indices"]]
    ids = jax.experimental.multihost_utils.process_allgather(arrays["ids"][0], tiled=True)
    found[name] = [np.asarray(kind).reshape(-1).tolist() for kind in (*kinds, ids[:, 0])]
try:
    placed([0, 2, 1, 3], (2, 1, 2))  # each tensor axis over both processes
except InputError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


def test_texts_are_found_where_they_were_put():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, address, str(number)],
            cwd=Path(__file__).parents[2],
            env=os.environ | cpus(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for output, errors in [process.communicate(timeout=300) for process in processes]:
        assert output, errors
        found = json.loads(output.splitlines()[-1])
        for name in ("in turn", "in order"):
            queries, positives, negatives, ids = found[name]
            assert sorted(queries) == list(range(1, 13))
            assert queries == ids
            assert positives == [100 + query for query in queries]
            assert negatives == [200 + query for query in queries]
        assert found["in turn"][0] != found["in order"][0]
        assert "devices of a tensor axis must belong to one process" in found["error"]
