"""A tiny run, and an S3 server with a proxy before it."""

import uuid

import pytest

from tests.recipes.checkpoints.tiny import Tiny
from tests.s3 import Proxy, aws_environment, running
from tests.support import one_thread, process_as_before


@pytest.fixture
def tiny(tmp_path):
    return Tiny(tmp_path / "run")


@pytest.fixture(scope="session")
def untouched(tmp_path_factory):
    """The weights of the tiny run that nobody touched; with one thread, as all runs here, since sums depend on that."""
    with one_thread(), process_as_before():
        return Tiny(tmp_path_factory.mktemp("untouched")).go()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The networks are tiny; a module's own runs are made after this."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("s3")) as server:
        server.client().create_bucket(Bucket="bucket")
        server.client().put_object(Bucket="bucket", Key="first", Body=b"makes the server's volumes")
        yield server


@pytest.fixture
def url(server, monkeypatch):
    """A prefix of its own in the bucket."""
    aws_environment(monkeypatch, server.endpoint)
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(server, url, monkeypatch):
    """Between the client and the server; without a fault at first."""
    proxy = Proxy(server.port)
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()
