"""Files behind URLs: read like local ones, never half, and without a secret in any message."""

from __future__ import annotations

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from easydel.data.faults import DataError
from easydel.data.sources import remote
from easydel.data.sources.open_source import open_source

ROWS = [{"prompt": f"question {n}", "chosen": "yes", "rejected": "no"} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0]
        if path == "/loop.jsonl":
            return self.reply(302, b"", Location=self.path)
        if path == "/moved.jsonl":
            return self.reply(302, b"", Location=f"http://localhost:{self.server.server_port}/good.jsonl")
        if path == "/away.jsonl":
            return self.reply(302, b"", Location="file:///etc/passwd")
        if path == "/short.jsonl":
            return self.reply(200, LINES[:40], **{"Content-Length": str(len(LINES))})
        if path == "/huge.jsonl":
            return self.reply(200, b"", **{"Content-Length": str(1 << 60)})
        if path == "/odd.jsonl":
            return self.reply(200, LINES, **{"Content-Length": "many"})
        if path == "/slow.jsonl":
            time.sleep(1.5)
        if path == "/page.jsonl":
            return self.reply(200, b"<!DOCTYPE html><html><body>Please log in</body></html>")
        if path in ("/good.jsonl", "/slow.jsonl"):
            return self.reply(200, LINES)
        if path == "/good.jsonl.gz":
            return self.reply(200, gzip.compress(LINES))
        return self.reply(500 if path == "/broken.jsonl" else 404, b"sorry")

    def reply(self, code, body, **headers):
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url(server, path, user=""):
    return f"http://{user}127.0.0.1:{server.server_port}/{path}"


def test_a_file_behind_a_url_is_read_like_a_local_one_and_fetched_once(server):
    source = open_source(url(server, "good.jsonl"))
    assert list(source) == ROWS and source[3] == ROWS[3]
    assert source.locate(3) == "good.jsonl, row 3"
    assert len(server.asked) == 1
    assert list(open_source(url(server, "good.jsonl.gz"))) == ROWS


def test_a_query_is_no_part_of_the_name(server):
    source = open_source(url(server, "good.jsonl?download=true&token=SECRET"))
    assert source[1] == ROWS[1] and source.locate(1) == "good.jsonl, row 1"
    assert server.asked[0][0] == "/good.jsonl?download=true&token=SECRET"


def test_a_password_goes_to_its_own_host_only(server):
    assert list(open_source(url(server, "moved.jsonl", user="me:SECRET@"))) == ROWS
    assert [given is not None for _, given in server.asked] == [True, False]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.jsonl", "the server answers 404"),
        ("broken.jsonl", "cannot be fetched: the server answers 500"),
        ("slow.jsonl", "cannot be fetched: timed out"),
        ("short.jsonl", "cannot be fetched: 40 of "),
        ("huge.jsonl", "has room for"),
        ("odd.jsonl", "cannot be fetched: "),
        ("loop.jsonl", "it redirects in a circle"),
        ("away.jsonl", "cannot be fetched: "),
        ("page.jsonl", "page.jsonl is a web page"),
    ],
)
def test_what_a_server_does_wrong_is_named_in_one_line_without_secrets(server, path, words):
    with pytest.raises((DataError, FileNotFoundError)) as caught:
        open_source(url(server, f"{path}?token=SECRET", user="me:SECRET@"))[0]
    message = str(caught.value)
    assert words in message and "SECRET" not in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize("path", ["short.jsonl", "slow.jsonl"])
def test_a_download_that_broke_off_is_made_again(server, path):
    for _ in range(2):
        with pytest.raises(DataError, match="cannot be fetched"):
            open_source(url(server, path))
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("http://127.0.0.1:1/a.jsonl", "cannot be fetched: "),
        ("https://[::1/a.jsonl", "cannot be fetched: "),
        ("http://127.0.0.1:99999/a.jsonl", "cannot be fetched: "),
        ("http:///a.jsonl", "cannot be fetched: "),
        ("https://127.0.0.1:1/data/", "has no known suffix"),
        ("s3://me:SECRET@bucket/a.jsonl", "s3:// needs a package that is not installed: Install s3fs"),
        ("gs://bucket/a.jsonl", "gs:// needs a package that is not installed: "),
        ("abc://me:SECRET@host/a.jsonl", "abc:// is no protocol that can be read"),
        ("memory://nowhere/a.jsonl", "cannot be found"),
    ],
)
def test_a_url_that_cannot_be_read_is_named_in_one_line(name, words):
    with pytest.raises((DataError, ValueError, FileNotFoundError)) as caught:
        open_source(name)
    message = str(caught.value)
    assert words in message and "SECRET" not in message and "\n" not in message and len(message) < 300
