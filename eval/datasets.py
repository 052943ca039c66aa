"""The data sets that BEIR publishes: their archives, their splits, and the averages of the SGPT paper."""

from __future__ import annotations

import hashlib
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from etils import epath

from sgpt_jax.errors import InputError
from sgpt_jax.files.hub_tables import is_hub
from sgpt_jax.runtime.progress import progress

URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/{name}.zip"

# The MD5 sums of the table in BEIR's README. bioasq, signal1m, trec-news and robust04 cannot be downloaded:
# their owners' licences ask for a copy of one's own, which is then given as a folder.
MD5 = {
    "msmarco": "444067daf65d982533ea17ebd59501e4",
    "trec-covid": "ce62140cb23feb9becf6270d0d1fe6d1",
    "nfcorpus": "a89dba18a62ef92f7d323ec890a0d38d",
    "nq": "d4d3d2e48787a744b6f6e691ff534307",
    "hotpotqa": "f412724f78b0d91183a0e86805e16114",
    "fiqa": "17918ed23cd04fb15047f73e6c3bd9d9",
    "arguana": "8ad3e3c2a5867cdced806d6503f29b99",
    "webis-touche2020": "46f650ba5a527fc69e0a6521c5a23563",
    "cqadupstack": "4e41456d7df8ee7760a7f866133bda78",
    "quora": "18fb154900ba42a600f84b839c173167",
    "dbpedia-entity": "c2a39eb420a3164af735795df012ac2c",
    "scidocs": "38121350fc3a4d2f48850f6aff52e4a9",
    "fever": "5a818580227bfb4b35bb6fa46d9b6c03",
    "climate-fever": "8b66f0a9126c521bae2bde127b4dc99d",
    "scifact": "5f7d1de60b170fc8027bb7898e2efca1",
}
FORUMS = (
    "android",
    "english",
    "gaming",
    "gis",
    "mathematica",
    "physics",
    "programmers",
    "stats",
    "tex",
    "unix",
    "webmasters",
    "wordpress",
)

# The averages of the SGPT paper (its repository's --computeavg): all of BEIR without MS MARCO, the sets that
# OpenAI's embeddings were measured on, and the five on which checkpoints were chosen.
AVERAGES = {
    "average_18": (
        *("trec-covid", "bioasq", "nfcorpus", "nq", "hotpotqa", "fiqa", "signal1m", "trec-news", "robust04"),
        *("arguana", "webis-touche2020", "cqadupstack", "quora", "dbpedia-entity", "scidocs", "fever"),
        *("climate-fever", "scifact"),
    ),
    "average_11": (
        *("trec-covid", "nfcorpus", "hotpotqa", "fiqa", "arguana", "webis-touche2020", "quora"),
        *("dbpedia-entity", "fever", "climate-fever", "scifact"),
    ),
    "average_5": ("nfcorpus", "fiqa", "arguana", "scidocs", "scifact"),
}


def default_split(name: str) -> str:
    """``dev`` for MS MARCO, whose test judgements are those of TREC DL; ``test`` for every other set."""
    return "dev" if name == "msmarco" else "test"


def forums_of(folder: epath.Path) -> list[epath.Path]:
    """The folders of CQADupStack's twelve forums, if that is what the folder is, else an empty list.

    Raises:
        InputError: some of the twelve are there and others are missing: their mean would not be the set's.
    """
    if any(folder.glob("corpus.*")):
        return []
    present = [forum for forum in FORUMS if (folder / forum).is_dir()]
    missing = [forum for forum in FORUMS if forum not in present]
    if present and missing:
        raise InputError(f"{folder}: has forums of CQADupStack, but not {', '.join(missing)}")
    return [folder / forum for forum in present]


def obtain(source: str, cache: Path) -> epath.Path:
    """The folder of a data set: ``source`` itself, or BEIR's archive of that name, downloaded once.

    Args:
        source: a folder, a data set of the hub (which `DataSet` reads, too), or one of the names in `MD5`.
        cache: where downloads go; a folder of that name there is used as it is.

    Raises:
        InputError: neither a folder nor a published name, no network, a wrong MD5, or an unsafe archive.
    """
    if is_hub(source) or epath.Path(source).is_dir():
        return epath.Path(source)
    if source not in MD5:
        known = ", ".join(sorted(MD5))
        raise InputError(f"{source}: is no folder, and no data set that BEIR publishes ({known})")
    folder = cache / source
    if folder.is_dir():
        return epath.Path(folder)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{source}.") as scratch:
        archive = Path(scratch) / f"{source}.zip"
        digest = download(URL.format(name=source), archive)
        if digest != MD5[source]:
            raise InputError(f"{source}: the download's MD5 is {digest}, BEIR publishes {MD5[source]}")
        unzip(archive, Path(scratch) / "content")
        unpacked = Path(scratch) / "content" / source
        if not unpacked.is_dir():
            raise InputError(f"{source}: the archive holds no folder {source}")
        unpacked.rename(folder)
    return epath.Path(folder)


def download(url: str, target: Path) -> str:
    """Fetches a URL into a file and returns the MD5 of what came.

    Raises:
        InputError: there is no network, or the server does not have it.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, target.open("wb") as stream:
            size = int(response.headers.get("Content-Length") or 0)
            with progress(f"downloading {target.name}", "MB", -(-size // 1_000_000) or None) as bar:
                while block := response.read(1_000_000):
                    digest.update(block)
                    stream.write(block)
                    bar.update()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"{url}: cannot be downloaded ({reason}); give a local folder instead") from error
    return digest.hexdigest()


def unzip(archive: Path, folder: Path) -> None:
    """Unpacks a zip file, refusing it whole when an entry would land outside the folder.

    (`zipfile` itself would keep such entries inside under other names, and the data set would be another one.)

    Raises:
        InputError: an entry's name is absolute, holds ``..``, or is a link; or the file is no zip file.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            for entry in content.infolist():
                name = entry.filename.replace("\\", "/")
                parts = name.split("/")
                is_link = (entry.external_attr >> 16) & 0o170000 == 0o120000
                if name.startswith("/") or ".." in parts or ":" in parts[0] or is_link:
                    raise InputError(
                        f"{archive.name}: the entry {entry.filename!r} points outside the folder"
                    )
            content.extractall(folder)
    except zipfile.BadZipFile as error:
        raise InputError(f"{archive.name}: is no complete zip file ({error})") from error
