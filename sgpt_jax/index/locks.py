"""Who may write an index, or another folder, and which of an index's files somebody still reads."""

import contextlib
import fcntl
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sgpt_jax.errors import InputError
from sgpt_jax.index.files import Manifest


@contextlib.contextmanager
def only_writer(
    folder: Path, what: str = "index", *, leader: bool = True, shared: bool = False
) -> Iterator[Callable[[], None]]:
    """Holds the folder (made when it is not there) for one build; the hold ends with the process, however it ends.

    Temporary files of a writer that was killed are removed, and so is a folder made here that stays empty.

    Args:
        folder: of the index.
        what: is in the folder, for messages.
        leader: the only process of the build, or the first of several. The others must not come before it is through.
        shared: other processes of the build will write, too.

    Yields:
        what the leader calls when its preparations are done, to let the others in.

    Raises:
        InputError: another build writes the index, or the folder cannot be made.
    """
    made = leader and not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from error

    def let_in() -> None:
        if shared:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    try:
        try:
            # Alone first: a process that is left over from an earlier, broken build holds it still.
            fcntl.flock(descriptor, (fcntl.LOCK_EX if leader else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing this {what}") from None
        except OSError:
            shared = False  # no locks here: readers have none either
        if leader:
            for leftover in (*folder.glob(".*.partial"), *folder.glob("compacted-*/.*.partial")):
                leftover.unlink()
        yield let_in
    finally:
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def hold_for_reading(folder: Path, manifest: Manifest, reader: object) -> None:
    """Keeps the files of a manifest from being removed, as long as its reader is alive.

    A file of its first shard stands for all of them. Where the file system has no locks, nothing is held.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = os.open(manifest.path(folder, manifest.shards[0], "ids"), os.O_RDONLY)
    # Not a file object: one that the garbage collector closes is a ResourceWarning.
    let_go = weakref.finalize(reader, os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        let_go()


def remove_strangers(folder: Path, manifest: Manifest, growing: Manifest | None = None) -> None:
    """Removes what neither the manifest nor one that is being written needs, but for what somebody still reads.

    Args:
        folder: of the index; the caller is its only writer.
        manifest: what counts.
        growing: what is being written.
    """
    kept = [each for each in (manifest, growing) if each is not None]
    for place in [folder, *folder.glob("compacted-[0-9]*")]:
        names = set()
        for each in kept:
            if each.shard_folder(folder) == place:
                names |= {each.path(folder, shard, "x").stem for shard in each.shards}
                names |= {f"removed-{each.removed['rows']}"} if each.removed else set()
        files = [*place.glob("[0-9]*-[0-9]*.*"), *place.glob("removed-[0-9]*.rows")]
        strangers = [path for path in files if path.name.split(".")[0] not in names]
        if any(each.shard_folder(folder) == place for each in kept):
            _unlink(strangers)
        else:
            _remove_unless_read(place, strangers, folder)


def _remove_unless_read(place: Path, files: list[Path], folder: Path) -> None:
    """Removes a generation; what readers hold goes last, so that what is left over of it is found again."""
    held = next(
        (path for path in files if path.name.startswith(f"{0:012d}-") and path.suffix == ".ids"), None
    )
    with contextlib.ExitStack() as stack:
        if held is not None:
            stream = stack.enter_context(held.open("rb"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                pass  # no locks here: readers have none either
        _unlink(path for path in files if path != held)
        _unlink([held] if held is not None else [])
    if place != folder:
        with contextlib.suppress(OSError):
            place.rmdir()


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
