"""Decoded weights kept on disk: GGUF and .bin checkpoints are decoded once, and memory-mapped from then on.

The cache is a folder of safetensors files, one for each checkpoint and dtype, with the decoder's own leaves in the
decoder's own layout (kernels [in, out]), so that a CPU computes on the file's pages without a copy. A file's name is a
digest of all the checkpoint's bytes and of whatever else decides the leaves: a checkpoint that changed has another
name. It is `decoded` in the user's cache folder; the environment variable SGPT_DECODED_CACHE names another folder,
or turns the cache off: "off". Whatever goes wrong with the cache, the checkpoint itself is read; a checksum over the
leaves, computed whenever they are loaded, tells a file that was damaged later.

What it brings: SmolLM2-135M from its Q4_1 file (98 MB) loads in 4.5 s without it and in 1.0 s with it (538 MB on disk,
float32), to which the checksum adds 0.4 s. Exported to a folder of safetensors (542 MB) it takes 1.9 s, since kernels
are transposed there. Medians of five starts each, in turn, on two busy cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sgpt_jax.checkpoint.tensors import SAFETENSORS_DTYPES, TensorFiles, map_safetensors
from sgpt_jax.errors import InputError
from sgpt_jax.runtime.compile_cache import user_cache

VARIABLE = "SGPT_DECODED_CACHE"

# To be raised whenever a checkpoint would give other leaves than before.
FORMAT = 2

# Less is decoded at once.
MIN_BYTES = 20_000_000

# A CPU's arrays begin at such multiples; others would be copied.
ALIGNMENT = 64

UNUSED_SECONDS = 60 * 86_400
UNFINISHED_SECONDS = 86_400


def find(files: TensorFiles, dtype: jnp.dtype, *, int8: bool = False) -> Path | None:
    """The file that keeps a checkpoint's decoded weights, or would keep them; None where it is not worth it, or off.

    Args:
        files: the checkpoint.
        dtype: in which the leaves are held.
        int8: matrices are held as int8.
    """
    folder = os.environ.get(VARIABLE) or os.path.join(user_cache(), "decoded")
    if folder == "off" or not files.encoded:
        return None
    digest = hashlib.sha256()
    try:
        if sum(os.path.getsize(file) for file in files.encoded) < MIN_BYTES:
            return None
        kind = f"{dtype.name}, int8" if int8 else dtype.name
        # A classifier's files are a decoder's where they are read without its head, and refused elsewhere.
        facts = [FORMAT, kind, type(files).__name__, metadata.version("gguf"), files.config]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        for file in files.encoded:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError:
        return None
    return Path(folder) / f"{digest.hexdigest()[:40]}.safetensors"


def load(path: Path) -> dict[str, np.ndarray]:
    """The leaves that a file keeps, memory-mapped and read-only; none when there is no whole and sound file."""
    try:
        leaves = map_safetensors(path)
        with safe_open(os.fspath(path), "numpy") as file:
            stored = (file.metadata() or {}).get("crc32")
    except (OSError, InputError, SafetensorError):
        return {}
    if stored != _checksum(leaves):
        return {}
    with contextlib.suppress(OSError):
        os.utime(path)  # it is in use
    return leaves


def keep(path: Path, leaves: Mapping[str, jax.Array]) -> None:
    """Writes leaves to a file, in one step; does nothing where the folder cannot be written or is short of room.

    It takes a quarter of the free room at most. What nobody used for two months is removed from the folder, and so is
    what writers left behind that were killed.
    """
    # Those of odd sizes last, so that all others are aligned.
    names = sorted(leaves, key=lambda name: (leaves[name].nbytes % ALIGNMENT != 0, name))
    host = {name: np.asarray(leaves[name]) for name in names}
    header: dict[str, Any] = {"__metadata__": {"format": "sgpt-jax", "crc32": _checksum(host)}}
    end = 0
    for name in names:
        leaf = leaves[name]
        start, end = end, end + leaf.nbytes
        kind = SAFETENSORS_DTYPES[leaf.dtype.name]
        header[name] = {"dtype": kind, "shape": list(leaf.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    partial = path.parent / f"{path.stem}.{os.getpid()}.{time.time_ns()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path.parent)
        if shutil.disk_usage(path.parent).free < 4 * end:
            return
        try:
            with open(partial, "wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    stream.write(_bytes(host[name]).data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError:
        return


def _checksum(leaves: Mapping[str, np.ndarray]) -> str:
    """The CRC-32 of all leaves one after the other, each with its name."""
    crc = 0
    for name, leaf in leaves.items():
        crc = zlib.crc32(_bytes(leaf).data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _bytes(leaf: np.ndarray) -> np.ndarray:
    return leaf.reshape(-1).view(np.uint8)


def _clean(folder: Path) -> None:
    now = time.time()
    limits = {".safetensors": UNUSED_SECONDS, ".partial": UNFINISHED_SECONDS}
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may have removed it
            if now - file.stat().st_mtime > limits.get(file.suffix, float("inf")):
                file.unlink()
