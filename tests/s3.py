"""A real S3 server on free loopback ports, and a TCP proxy before it that injects faults."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import SystemRandom

import boto3
import pytest
from botocore.config import Config

ADMIN = ("testadmin", "s3cr3t-of-the-admin-0123456789")
READER = ("testreader", "s3cr3t-of-the-reader-0123456789")


@functools.cache
def _session() -> boto3.session.Session:
    return boto3.session.Session()


def aws_environment(patch: pytest.MonkeyPatch, endpoint: str | None = None) -> None:
    """The administrator's keys, and nothing of the user's own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    values = {"AWS_ACCESS_KEY_ID": ADMIN[0], "AWS_SECRET_ACCESS_KEY": ADMIN[1], "AWS_DEFAULT_REGION": "us-east-1"}
    values |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    values |= {"AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in (values | ({"S3_ENDPOINT_URL": endpoint} if endpoint else {})).items():
        patch.setenv(name, value)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, low enough that the +10000 of gRPC exists.

    They are not those of the last call: clients (fsspec) keep connections and secrets by address.
    """
    ports: list[int] = []
    with ExitStack() as stack:
        for port in range(SystemRandom().randrange(21000, 45000), 55000):
            candidate = stack.enter_context(socket.socket())
            with suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == count:
                break
    return ports


class Server:
    """SeaweedFS."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True, exist_ok=True)
        actions = {ADMIN: ["Admin", "Read", "Write", "List", "Tagging"], READER: ["Read", "List"]}
        identities = [
            {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": allowed}
            for (name, secret), allowed in actions.items()
        ]
        (folder / "identities.json").write_text(json.dumps({"identities": identities}))
        names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
        names += ["filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.port = self.ports["s3.port"]
        self._process: subprocess.Popen | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        weed = str(Path(sysconfig.get_path("scripts")) / "weed")
        command = [weed, f"-logdir={self.folder}", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-dir={self.folder / 'data'}", "-s3", f"-s3.config={self.folder / 'identities.json'}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-master.telemetry=false"]
        command += ["-volume.max=100", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=0"]
        command += [f"-{name}={port}" for name, port in self.ports.items()]
        log = (self.folder / "weed.log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(Exception):
                self.client().list_buckets()
                return
            time.sleep(0.1)
        raise RuntimeError("the S3 server did not start:\n" + (self.folder / "weed.log").read_text()[-2000:])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self, credentials: tuple[str, str] = ADMIN, endpoint: str | None = None):
        key, secret = credentials
        return _session().client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )


class Proxy:
    """Forwards TCP to the server, and does what `fault` says to connections while it says so.

    `refuse`: accepts nothing; `hang`: accepts, and passes nothing on; `reset`: closes hard after `after` bytes from the
    client; `truncate`: closes after `after` bytes of an answer; `slow`: `rate` bytes a second each way; `500`, `503`:
    answers so itself, in an S3 error document.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.fault: str | None = None
        self.after = 1000
        self.rate = 10_000
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, fault: str | None, **settings: int) -> None:
        """Switch, and drop the connections that are open."""
        for name, value in settings.items():
            setattr(self, name, value)
        self.fault = fault
        self.drop()

    def drop(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self.drop()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.fault == "refuse":
                _reset(client)
                continue
            self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if self.fault in ("500", "503"):
                self._answer(client, self.fault)
                return
            if self.fault == "hang":
                while self.fault == "hang" and client.recv(65536):
                    pass
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                self._open.add(server)
                up = threading.Thread(target=self._pump, args=(client, server, "reset"), daemon=True)
                up.start()
                self._pump(server, client, "truncate")
                self._open.discard(server)
        except OSError:
            pass
        finally:
            self._open.discard(client)
            client.close()

    def _pump(self, source: socket.socket, sink: socket.socket, breaks: str) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(4096 if self.fault == "slow" else 65536):
                if self.fault == "hang":
                    while self.fault == "hang":
                        time.sleep(0.05)
                    break
                if self.fault == "slow":
                    time.sleep(len(data) / self.rate)
                if self.fault == breaks and passed + len(data) > self.after:
                    sink.sendall(data[: max(self.after - passed, 0)])
                    _reset(source)
                    break
                sink.sendall(data)
                passed += len(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _answer(self, client: socket.socket, status: str) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            if not (data := client.recv(65536)):
                return
            request += data
        code = {"500": "InternalError", "503": "SlowDown"}[status]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        head = f"HTTP/1.1 {status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """A server until the end of the block."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
