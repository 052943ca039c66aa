"""The rows of an index whose documents were removed."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.gaps import Gaps
from sgpt_jax.files.lines import atomic_write
from sgpt_jax.index.files import Manifest


class Removed(Gaps):
    """Those rows, ascending, and the numbering of the others."""

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> "Removed":
        """Reads those of an index.

        Raises:
            FileNotFoundError: the file is not there (any more).
            InputError: it is damaged.
        """
        if manifest.removed is None:
            return cls(np.zeros(0, np.int64))
        path = _path(folder, manifest)
        raw = path.read_bytes()
        if len(raw) != 8 * manifest.removed["rows"] or zlib.crc32(raw) != manifest.removed["crc32"]:
            raise InputError(f"{path}: is damaged: it does not fit its checksum in the manifest")
        rows = np.frombuffer(raw, "<u8").astype(np.int64)
        if (rows[1:] <= rows[:-1]).any() or not 0 <= rows[0] <= rows[-1] < manifest.rows:
            raise InputError(f"{path}: is damaged: it holds rows that do not exist")
        return cls(rows)

    def save(self, folder: Path, manifest: Manifest) -> Manifest:
        """Writes them beside the shards; returns the manifest that says so. Nothing else changes on disk."""
        if not len(self.numbers):
            return replace(manifest, removed=None)
        raw = self.numbers.astype("<u8").tobytes()
        manifest = replace(manifest, removed={"rows": len(self.numbers), "crc32": zlib.crc32(raw)})
        with atomic_write(_path(folder, manifest)) as stream:
            stream.write(raw)
        return manifest


def _path(folder: Path, manifest: Manifest) -> Path:
    assert manifest.removed is not None
    return manifest.shard_folder(folder) / f"removed-{manifest.removed['rows']}.rows"
