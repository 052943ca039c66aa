"""`sgpt serve` under load: many callers, each answer checked, beside one call of `encode` and beside a plain server.

    python -m eval.speed.serve --model M --callers 200 --seconds 60

Each caller posts one text after the other to /v1/embeddings and compares what comes with the library's vector.
Meanwhile the server's memory and its queue are watched. The plain server has the same HTTP stack and calls
`encode_document` once a request, with all its programs compiled before. All runs are on this machine, one after the
other.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.demo import read_demo
from sgpt_jax.runtime import compile_cache

# How much a vector of length 1 may differ by the rounding of another batch's matrix products.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


@dataclass
class Load:
    """What a run of all callers came to.

    Attributes:
        seconds: of each answer, from the request to the checked vector.
        wrong: answers that were not the library's vector.
        refused: answers with 429 or 503, after which the caller came again.
        failed: other answers, and connections that broke.
        elapsed: of the whole run.
        memory: MB that the server had, a sample every second.
        queue: the most tokens that waited, and the bound.
    """

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    refused: int = 0
    failed: int = 0
    elapsed: float = 0.0
    memory: list[float] = field(default_factory=list)
    queue: tuple[int, int] = (0, 0)

    def line(self) -> str:
        """What it came to, for people."""
        at = np.percentile(self.seconds, [50, 99]) if self.seconds else (0.0, 0.0)
        third = max(1, len(self.memory) // 3)
        early, late = np.median(self.memory[third : 2 * third]), np.median(self.memory[-third:])
        return (
            f"{len(self.seconds)} answers in {self.elapsed:.1f} s, {self.rate:.1f} texts/s; p50 {at[0]:.2f} s, "
            f"p99 {at[1]:.2f} s; {self.wrong} wrong, {self.failed} failed, {self.refused} refused; memory "
            f"{early:.0f} MB in the second third, {late:.0f} MB in the last; "
            f"queue at most {self.queue[0]} of {self.queue[1]} tokens"
        )

    @property
    def rate(self) -> float:
        """Texts a second."""
        return len(self.seconds) / self.elapsed


async def load(
    address: str,
    process: int,
    texts: list[str],
    wanted: np.ndarray,
    callers: int,
    seconds: float,
    tolerance: float,
) -> Load:
    """Lets the callers ask until the time is over; every answer that was begun is waited for."""
    result = Load()
    end = time.perf_counter() + seconds

    async def call(number: int) -> None:
        choice, caller = random.Random(number), Caller(address)
        while time.perf_counter() < end:
            which = choice.randrange(len(texts))
            begin = time.perf_counter()
            try:
                status, headers, reply = await caller.post(
                    {"input": texts[which], "encoding_format": "base64"}
                )
            except (OSError, asyncio.IncompleteReadError):
                result.failed += 1
                caller = Caller(address)
                continue
            if status in (429, 503):
                result.refused += 1
                await asyncio.sleep(float(headers.get("retry-after", "1")))
                continue
            if status != 200:
                result.failed += 1
                continue
            vector = np.frombuffer(base64.b64decode(json.loads(reply)["data"][0]["embedding"]), "<f4")
            result.wrong += not np.allclose(vector, wanted[which], rtol=0, atol=tolerance)
            result.seconds.append(time.perf_counter() - begin)
        caller.close()

    async def watch() -> None:
        while True:
            result.memory.append(_memory(process))
            await asyncio.sleep(1)

    begin = time.perf_counter()
    watching = asyncio.ensure_future(watch())
    await asyncio.gather(*(call(number) for number in range(callers)))
    result.elapsed = time.perf_counter() - begin
    watching.cancel()
    with urllib.request.urlopen(f"{address}/metrics") as reply:
        result.queue = _queue(reply.read().decode())
    return result


class Caller:
    """One connection, which stays open. HTTP clients take more of the processor than small servers do."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.removeprefix("http://").partition(":")
        self._port = int(port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, value: object) -> tuple[int, dict[str, str], bytes]:
        """Posts JSON to /v1/embeddings; the status, the headers and the body of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        body = json.dumps(value).encode()
        head = "POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
        return int(first.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))

    def close(self) -> None:
        """Ends the connection."""
        if self._streams is not None:
            self._streams[1].close()


def _memory(process: int) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _queue(metrics: str) -> tuple[int, int]:
    found = dict(
        line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("sgpt_queue_tokens_")
    )
    most, bound = (float(found.get(f"sgpt_queue_tokens_{name}", 0)) for name in ("most", "bound"))
    return int(most), int(bound)


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[tuple[str, int]]:
    """A server in a process of its own, once it is ready: its address and its process id."""
    with tempfile.NamedTemporaryFile("r") as log:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=open(log.name, "w"))  # noqa: SIM115
        try:
            begin = time.perf_counter()
            while "ready" not in (text := Path(log.name).read_text()):
                if process.poll() is not None:
                    raise SystemExit(f"the server ended: {text}")
                time.sleep(0.1)
            print(f"{' '.join(command[:2])}: ready after {time.perf_counter() - begin:.1f} s", flush=True)
            yield text.split()[0].rstrip("/"), process.pid
        finally:
            process.terminate()
            code = process.wait(60)
            print(f"{' '.join(command[:2])}: ended with {code}", flush=True)


def plain(options: argparse.Namespace) -> None:
    """A server that calls `encode_document` once a request, as one would write it."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    model, lock = _model(options), threading.Lock()

    def encode(text: str) -> str:
        with lock:
            return base64.b64encode(model.encode_document([text], normalize=True)[0].tobytes()).decode()

    async def embeddings(request: Request) -> Response:
        body = await request.json()
        vector = await run_in_threadpool(encode, body["input"])
        return JSONResponse({"data": [{"embedding": vector}]})

    async def metrics(_: Request) -> Response:
        return PlainTextResponse("")

    for text in sorted(_texts(options.texts), key=len)[::8]:
        encode(text)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/ ready", flush=True)
        routes = [Route("/v1/embeddings", embeddings, methods=["POST"]), Route("/metrics", metrics)]
        config = uvicorn.Config(Starlette(routes=routes), http="h11", access_log=False, log_level="error")
        uvicorn.Server(config).run(sockets=[listener])


def _texts(count: int) -> list[str]:
    """Texts of many lengths: titles, claims and abstracts of the demonstration."""
    abstracts, claims = read_demo()
    titles = [abstract["title"] for abstract in abstracts]
    texts = titles + [claim["text"] for claim in claims] + [abstract["text"] for abstract in abstracts]
    return texts[:: max(1, len(texts) // count)][:count]


def _model(options: argparse.Namespace) -> BiEncoder:
    return BiEncoder.from_pretrained(
        options.model, max_seq_length=options.max_seq_length, dtype=options.dtype, mesh=device_mesh(None)
    )


def _encode_rate(model: BiEncoder, texts: list[str]) -> float:
    begin = time.perf_counter()
    model.encode_document(texts, show_progress=False)
    return len(texts) / (time.perf_counter() - begin)


def main() -> None:
    """Runs one after the other: `encode`, `sgpt serve`, `encode` again, the plain server."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.serve", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-seq-length", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--texts", type=int, default=540, help="different texts, 540 at most (default: 540)")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    compile_cache.enable()
    warnings.simplefilter("ignore")  # that texts are cut
    if options.plain:
        plain(options)
        return
    texts, model = _texts(options.texts), _model(options)
    wanted = model.encode_document(texts, normalize=True, show_progress=False)
    same = [
        "--model",
        options.model,
        "--max-seq-length",
        str(options.max_seq_length),
        "--dtype",
        options.dtype,
    ]
    tolerance, rates = TOLERANCE[options.dtype], [_encode_rate(model, texts)]
    runs = []
    for name, command in (
        ("sgpt serve", ["sgpt_jax.cli", "serve", *same, "--port", "0"]),
        ("plain server", [f"{__package__}.serve", "--plain", "--texts", str(options.texts), *same]),
    ):
        with running(command) as (address, process):
            for callers, seconds in ((1, 5.0), (options.callers, options.seconds)):
                found = asyncio.run(load(address, process, texts, wanted, callers, seconds, tolerance))
                print(f"{name}, {callers} callers: {found.line()}", flush=True)
            runs.append(found)
        rates.append(_encode_rate(model, texts))
    print(
        f"one call of encode: {', '.join(f'{rate:.1f}' for rate in rates)} texts/s, before, between and after"
    )
    served, direct = runs
    print(
        f"sgpt serve / encode: {served.rate / np.mean(rates[:2]):.2f}; / plain server: {served.rate / direct.rate:.2f}"
    )


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    main()
