"""A server with tiny models, one for all tests of its routes."""

import httpx
import pytest
import serving
from serving import serve

from sgpt_jax.serve.batching import Job
from sgpt_jax.serve.programs import TokenText


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return serving.tiny_models(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="session")
def live(models):
    with serve(models, bound=2000) as (address, service):
        yield address, service


@pytest.fixture
def http(live):
    with httpx.Client(base_url=live[0], timeout=60) as client:
        yield client


@pytest.fixture
def blocked(live, monkeypatch):
    """The device is busy with a text until something is appended to this list."""
    _, service = live
    let, begun = [], []
    start = service.embedder.start

    def slow(items, plan):
        fetch = start(items, plan)
        begun.append(True)

        def wait():
            serving.until(lambda: let)
            return fetch()

        return wait

    monkeypatch.setattr(service.embedder, "start", slow)
    service.queue.put(Job("embed", "other", [TokenText([1])], [1]))
    serving.until(lambda: begun)
    yield let
    let.append(True)
