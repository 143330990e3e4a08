"""A tiny run, and an S3 server with a proxy before it."""

import os
import uuid

import pytest
import torch

from tests.recipes.checkpoints.tiny import Tiny
from tests.s3 import ADMIN, Proxy, running
from tests.support import process_as_before


@pytest.fixture
def tiny(tmp_path):
    return Tiny(tmp_path / "run")


@pytest.fixture(scope="session")
def untouched(tmp_path_factory):
    """The weights of the tiny run that nobody touched; with one thread, as all runs here, since sums depend on that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with process_as_before():
        finished = Tiny(tmp_path_factory.mktemp("untouched")).go()
    torch.set_num_threads(threads)
    return finished


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The networks are tiny; a module's own runs are made after this."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("s3")) as server:
        server.client().create_bucket(Bucket="bucket")
        server.client().put_object(Bucket="bucket", Key="first", Body=b"makes the server's volumes")
        yield server


@pytest.fixture
def credentials(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ADMIN[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN[1])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def url(server, credentials, monkeypatch):
    """A prefix of its own in the bucket."""
    monkeypatch.setenv("S3_ENDPOINT_URL", server.endpoint)
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(server, url, monkeypatch):
    """Between the client and the server; without a fault at first."""
    proxy = Proxy(server.port)
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()
