"""Copy files named by URL, once, and keep passwords and tokens of URLs out of messages."""

from __future__ import annotations

import base64
import http.client
import shutil
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import fsspec

from easydel.data.faults import DataError

TIMEOUT_SECONDS = 30.0  # without a byte from the server
PIECE_BYTES = 1 << 20
Result = TypeVar("Result")
_fetching = threading.Lock()


def is_remote(name: str) -> bool:
    """True for a URL that does not stand for a local file."""
    return "://" in name and not name.startswith(("file://", "local://"))


def is_web(name: str) -> bool:
    """True for a URL of http or https."""
    return name.lower().startswith(("http://", "https://"))


def file_name(name: str) -> str:
    """The last part of a path or URL, without the query."""
    path = masked(name) if is_remote(name) else name
    return path.rstrip("/").rsplit("/", 1)[-1]


def masked(name: str) -> str:
    """A URL without user, password, query and fragment, any of which may be a secret; a path unchanged.

    Example:
      >>> masked("https://user:secret@host/train.jsonl?token=secret")
      'https://host/train.jsonl'
    """
    if not is_remote(name):
        return name
    scheme, rest = name.split("://", 1)
    if is_web(name):
        rest = rest.split("?", 1)[0].split("#", 1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def local_copy(name: str) -> Path:
    """A local path with the content of `name`, a path or a URL; a URL is copied once per process.

    Raises:
      FileNotFoundError: the server has no such file.
      DataError: the file cannot be fetched whole; says why.
    """
    if is_web(name):
        with _fetching:
            return _fetched(name)
    if is_remote(name):
        return Path(asking(name, lambda: fsspec.open_local(f"filecache::{name}")))
    return Path(fsspec.core.url_to_fs(name)[1]) if "://" in name else Path(name)


def asking(name: str, ask: Callable[[], Result]) -> Result:
    """Ask fsspec about a URL, and turn its errors into one line each.

    Raises:
      FileNotFoundError: there is no such file.
      DataError: the URL cannot be read; says why.
    """
    scheme = name.split("://", 1)[0]
    try:
        return ask()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{masked(name)} cannot be found: {_line(error, name)}.") from None
    except ImportError as error:
        raise DataError(
            f"{masked(name)}: {scheme}:// needs a package that is not installed: {_line(error, name)}."
        ) from error
    except Exception as error:  # Each protocol has errors of its own.
        if scheme not in fsspec.available_protocols():
            raise DataError(
                f"{masked(name)}: {scheme}:// is no protocol that can be read; download the file and give its path."
            ) from None
        raise DataError(f"{masked(name)} cannot be read: {_line(error, name)}.") from None


@cache
def _fetched(url: str) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="easydel-url-")
    _folders.append(folder)
    path = Path(folder.name) / "whole"
    part = path.with_name("part")
    try:
        _fetch(url, part)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"there is no file {masked(url)}: the server answers {error.code}.") from None
        reason = "it redirects in a circle" if "redirect" in str(error).lower() else f"the server answers {error.code}"
        raise DataError(f"{masked(url)} cannot be fetched: {reason}.") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, DataError):
            raise
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DataError(f"{masked(url)} cannot be fetched: {_line(cause, url)}.") from None
    return part.rename(path)  # a copy that broke off never goes by this name


# Deleted when the process ends.
_folders: list[tempfile.TemporaryDirectory] = []


def _fetch(url: str, path: Path) -> None:
    """Download a URL to a file; refuse an answer that ends before the length that the server gave."""
    with urllib.request.urlopen(_request(url), timeout=TIMEOUT_SECONDS) as answer, path.open("wb") as file:
        length = answer.headers["Content-Length"]
        if length is not None and int(length) > (free := shutil.disk_usage(path.parent).free):
            raise DataError(
                f"{masked(url)} has {length} bytes, and {path.parent.parent} has room for {free}; set TMPDIR to a "
                "folder with more."
            )
        while piece := answer.read(PIECE_BYTES):
            file.write(piece)
        if length is not None and file.tell() != int(length):
            raise DataError(
                f"{masked(url)} cannot be fetched: {file.tell()} of {length} bytes came, then the connection ended. "
                "Try again."
            )


def _request(url: str) -> urllib.request.Request:
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    plain = urllib.parse.quote(urllib.parse.urlunsplit(parts._replace(netloc=host)), safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(plain, headers={"User-Agent": "easydel"})
    if at:
        secret = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")  # for this host, and no other
    return request


def _line(error: object, name: str) -> str:
    """One line of an error, without the URL's secrets."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    bare = name.split("://", 1)[1]
    for secret in (name, bare, bare.partition("?")[2], bare.partition("/")[0].rpartition("@")[0]):
        if secret:
            text = text.replace(secret, masked(name) if secret == name else "…")
    return text[:200].rstrip(".")
