"""An S3 service on loopback (moto's) that counts requests and can be told to fail."""

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

Answer = Iterable[bytes]
Asked = Callable[[str, str, int], Response | None]
"""method, key, number of the request since it was told -> an answer of its own, or None."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "toy-key", "AWS_SECRET_ACCESS_KEY": "toy-secret"}


class Service:
    """What answers.  before, after: asked about each request, before and after it took effect."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []  # method and key
        self.unconditional = ""  # a condition that it does not know, as older ones do
        self.before: Asked = _nothing
        self.after: Asked = _nothing
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()  # moto looks and writes in two steps; S3 in one
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = CREDENTIALS | {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Answer:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path.startswith("/moto-api"):
            return self._moto(environ, start_response)
        asked = method, path.lstrip("/").partition("/")[2]
        self.requests.append(asked)
        number = len(self.requests)
        if self.unconditional and method == "PUT":
            environ.pop(self.unconditional, None)
        if answer := self.before(*asked, number):
            return answer(environ, start_response)
        with self._one_at_a_time:
            body = self._moto(environ, start_response := _Kept(start_response))
        if answer := self.after(*asked, number):
            return answer(environ, start_response.later)
        start_response.go()
        return body

    def make_bucket(self, name: str) -> Any:
        """Make one; the client that did."""
        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="toy-key",
            aws_secret_access_key="toy-secret",
        )
        client.create_bucket(Bucket=name)
        return client

    @contextmanager
    def failing(self, before: Asked | None = None, after: Asked | None = None) -> Iterator[None]:
        """Requests are counted from 1 within."""
        self.requests.clear()
        self.before, self.after = before or _nothing, after or _nothing
        try:
            yield
        finally:
            self.before = self.after = _nothing

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Requests made within, by method and what they are for: "GET shard", "LIST"."""
        self.requests.clear()
        counts: Counter[str] = Counter()
        yield counts
        counts.update(_kind(*asked) for asked in self.requests)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Kept:
    """start_response, called once it is known that this answer is given."""

    def __init__(self, later: Any) -> None:
        self.later = later

    def __call__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def go(self) -> None:
        self.later(*self.arguments)


def refused(status: int = 403, code: str = "AccessDenied") -> Response:
    """An answer of S3 that is an error."""
    body = f"<Error><Code>{code}</Code><Message>Access Denied</Message></Error>"
    return Response(body, status, content_type="application/xml")


def cut_off(body: bytes, promised: int) -> Response:
    """An answer that ends before all the bytes that it promised."""
    answer = Response(body)
    answer.automatically_set_content_length = False
    answer.headers["Content-Length"] = str(promised)
    return answer


def _nothing(method: str, key: str, number: int) -> None:
    return None


def _kind(method: str, key: str) -> str:
    if method == "GET" and not key:
        return "LIST"
    name = key.rpartition("/")[2]
    kinds = {"lock": "lock", "zarr.json": "document", "index.json": "index"}
    if re.fullmatch(r"c(\.\d+)+", name):
        return f"{method} shard"
    if re.fullmatch(r"\d{6}\.json", name):
        return f"{method} record"
    return f"{method} {kinds.get(name, 'note')}"
