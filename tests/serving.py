"""A live server on the loopback interface, in this process, with tiny decoders."""

import contextlib
import socket
import threading
import time

import decoders
import uvicorn
from indexes import streamed

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.files.corpora import Document
from sgpt_jax.index.build import build_index
from sgpt_jax.serve.application import make_application
from sgpt_jax.serve.http import Limits
from sgpt_jax.serve.metrics import Metrics
from sgpt_jax.serve.service import Models, Service

PROMPT = "Doc: {} Query:"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
DOCUMENTS = [
    Document("d1", "Herons. The heron waits in the shallow water."),
    Document("d2", f"{HOSTILE}. The night market stays on three days."),
    Document("d3", "Ferry. The ferry crosses the bay twice a day."),
]


def tiny_models(folder, mesh=None):
    """A bi-encoder with brackets, a cross-encoder, and an index of `DOCUMENTS`; few and short shapes."""
    model = decoders.write_tokenizer(decoders.write_checkpoint("llama", folder / "tiny"))
    encoder = BiEncoder.from_pretrained(model, brackets=True, max_seq_length=40, mesh=mesh)
    cross_encoder = CrossEncoder.from_pretrained(model, prompt=PROMPT, max_seq_length=96, mesh=mesh)
    index = build_index(folder / "index", DOCUMENTS, streamed(encoder.encode_document))
    return Models(encoder, cross_encoder, index)


@contextlib.contextmanager
def listening(application):
    """Serves an application on a free port; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(application, http="h11", ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def listening_with(service, limits, origins=()):
    """One more server for a service, with other limits."""
    return listening(make_application(service, Metrics(), limits, origins))


@contextlib.contextmanager
def serve(models, bound=1 << 18):
    """A server with models; gives (address, service)."""
    metrics = Metrics()
    service = Service(bound, metrics.on_batch)
    metrics.watch(service.queue)
    if models is not None:
        service.load(models)
    with listening(make_application(service, metrics, Limits())) as address:
        yield address, service
    assert service.close(20)


def until(condition, seconds=20):
    """Waits for what other threads do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
