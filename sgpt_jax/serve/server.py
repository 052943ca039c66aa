"""The command `sgpt serve`: loads in the background, serves, and drains when it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import jax
import uvicorn

from sgpt_jax.bi_encoder import BI_ENCODER_SETTINGS, BiEncoder
from sgpt_jax.cli.given import flags_given, given
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.demo import BIASES, MAX_SEQ_LENGTH, demo_model, read_demo
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.index.build import build_index
from sgpt_jax.index.search import Index
from sgpt_jax.runtime.compile_cache import user_cache
from sgpt_jax.serve.application import make_application
from sgpt_jax.serve.http import Limits
from sgpt_jax.serve.metrics import Metrics
from sgpt_jax.serve.programs import queue_bound
from sgpt_jax.serve.service import Models, Service

KEY_VARIABLE = "SGPT_API_KEY"

# What browsers send: lower case, without a path; of a file, null.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@*\sA-Z]+|file://")
# Connections at a time; beyond them the answer is 503.
_CONNECTIONS = 2048
# In the demonstration: a query and the beginning of an abstract, so that a search takes seconds on two cores.
_DEMO_DOCUMENT_TOKENS, _DEMO_PAIR_TOKENS = 96, 192
# Of a model's options, those that it obeys.
_DEMO_SETTINGS = {"dtype", "weights"}


def serve(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT; then finishes what it has begun, for `options.drain` seconds at most.

    Raises:
        InputError: the address is taken, or what is to be served cannot be loaded.
    """
    if options.several_hosts or jax.process_count() > 1:
        raise InputError("sgpt serve runs on one host: spread the model over its devices with --mesh")
    for origin in options.cors_origin:
        if not _ORIGIN.fullmatch(origin):
            raise InputError(
                f"--cors-origin {origin}: no page has this origin; it is scheme and host as browsers send them, "
                "without a slash at the end, such as https://example.org or http://localhost:3000, or * for all"
            )
    limits = Limits(read_key(options.api_key_file))
    metrics = Metrics()
    service = Service(options.max_queue_tokens or queue_bound(), metrics.on_batch)
    metrics.watch(service.queue)
    application = make_application(service, metrics, limits, options.cors_origin)
    begin = time.perf_counter()
    with _listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/ (loading)", flush=True)
        if options.host not in ("127.0.0.1", "::1", "localhost") and limits.api_key is None:
            print("note: other hosts can reach this address, and no API key is set", file=sys.stderr)
        server = Server(
            uvicorn.Config(
                application,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_CONNECTIONS,
                timeout_graceful_shutdown=options.drain,
            )
        )
        failures: list[BaseException] = []

        def load() -> None:
            try:
                service.load(load_models(options), _progress())
                print(f"ready after {time.perf_counter() - begin:.1f} s", flush=True)
            except BaseException as error:
                failures.append(error)
                server.should_exit = True

        loading = threading.Thread(target=load, daemon=True, name="load")
        loading.start()
        asyncio.run(server.serve(sockets=[listener]))
    idle = service.close(seconds=1.0)
    if failures:
        raise failures[0]
    print("stopped", flush=True)
    if not idle or loading.is_alive():
        # A thread is inside a program of the device, or compiles one; Python would not end while it does.
        sys.stdout.flush()
        os._exit(0)


class Server(uvicorn.Server):
    """Ends after a signal with exit code 0; uvicorn's own raises the signal again and ends by it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the server; a second SIGINT does not wait for requests."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def read_key(file: str | None) -> str | None:
    """The API key, from a file or from the environment variable SGPT_API_KEY; None where there is neither.

    Raises:
        InputError: the file cannot be read, or the key is empty.
    """
    key = os.environ.get(KEY_VARIABLE)
    if file is not None:
        try:
            key = Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: the API key cannot be read: {error}") from None
    if key is not None and not key.strip():
        raise InputError(f"the API key in {file or KEY_VARIABLE} is empty")
    return key and key.strip()


def load_models(options: argparse.Namespace) -> Models:
    """What the options name; the demonstration where they name neither a model nor an index.

    Raises:
        InputError: it cannot be loaded, the model is not the one that made the index, or the demonstration cannot obey
            an option.
    """
    mesh = device_mesh(options.mesh)
    index = None
    if options.index is not None:
        index = Index.open(options.index, mesh=mesh, resident=options.resident)
    elif options.resident is not None:
        raise InputError("--resident is for an --index")
    if options.model is None and index is None:
        if unused := flags_given(options, sorted({"cross_encoder", *BI_ENCODER_SETTINGS} - _DEMO_SETTINGS)):
            raise InputError(f"{', '.join(unused)}: not for the demonstration; give a --model or an --index")
        return demo_models(options)
    # What the index was built with, as in `sgpt search`; options that are given come first.
    settings = given({} if index is None else index.metadata, options)
    if settings.get("model") is None:
        raise InputError(f"{options.index}: does not say which model built it; give --model")
    encoder = BiEncoder.from_settings(settings, mesh)
    if index is not None:
        index.check_model(encoder.fingerprint())
    cross_encoder = None
    if options.cross_encoder is not None:
        cross_encoder = CrossEncoder.from_pretrained(
            options.cross_encoder,
            dtype=settings.get("dtype") or "float32",
            mesh=mesh,
            weights=settings.get("weights"),
        )
    return Models(encoder, cross_encoder, index)


def demo_models(options: argparse.Namespace) -> Models:
    """The demonstration: SmolLM2-135M-Instruct with trained biases, 240 abstracts, and itself to re-rank."""
    source, mesh, dtype = demo_model(), device_mesh(options.mesh), options.dtype or "float32"
    with resources.as_file(resources.files("sgpt_jax") / "data" / BIASES) as biases:
        digest = hashlib.sha256(biases.read_bytes()).hexdigest()
        encoder = BiEncoder.from_pretrained(
            source,
            max_seq_length=MAX_SEQ_LENGTH,
            biases=biases,
            dtype=dtype,
            mesh=mesh,
            weights=options.weights,
        )
    cross_encoder = CrossEncoder.from_pretrained(
        source,
        max_seq_length=_DEMO_PAIR_TOKENS,
        dtype=dtype,
        mesh=mesh,
        weights=options.weights,
    )
    abstracts, _ = read_demo()
    index = _demo_index(
        encoder, abstracts, Path(user_cache()) / f"demo-{digest[:12]}-{options.weights or dtype}-titled.index"
    )
    return Models(encoder, cross_encoder, index, _DEMO_DOCUMENT_TOKENS)


def _demo_index(encoder: BiEncoder, abstracts: list[dict[str, str]], folder: Path) -> Index:
    """The abstracts' index, which the first start leaves in the user's cache folder."""
    with contextlib.suppress(InputError):
        return Index.open(folder)
    documents = [Document(a["_id"], f"{a['title']} {a['text']}", a["title"]) for a in abstracts]
    return build_index(
        folder, documents, encode_chunks=lambda chunks: encoder.encode_chunks(chunks, side="document")
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen at {host}, port {port}: {error}") from None
    # Connections have it from the listener: a small answer, sent in two parts, must not wait for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _progress() -> Callable[[int, int], None]:
    """Says now and then how many programs are compiled."""
    last = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.perf_counter() - last > 10:
            last = time.perf_counter()
            print(f"{done} of {total} programs compiled", flush=True)

    return show
