"""Download one file into a cache: resume interrupted downloads, store only complete and verified files.

Files next to ``FILE``: ``FILE.json`` (its source and SHA-256); during the download ``FILE.part`` and
``FILE.part.json`` (the server's description of the file); and ``FILE.lock``, which lets only one run download
at a time.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import secrets
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import Any, NoReturn, Protocol

import google_crc32c

from porting.errors import CheckpointError, OutputError, Reason
from pytorch_model.files import locked, replacing

STALL_SECONDS = 30.0  # without a byte, until the connection is closed
BACKOFF_SECONDS = 1.0  # before the second attempt; doubled for each further one
ATTEMPTS = 4  # in a row without progress

_MOST_BYTES = 4 << 30  # several times the largest release
_WORTHWHILE = 1 << 20  # bytes; an attempt that received this many is not counted as a failure
_CHUNK = 1 << 18
_RETRIED_STATUS = (408, 429)  # and all of 500 and up


class Listener(Protocol):
    """Receives the progress of a download."""

    def progress(self, done: int, total: int | None) -> None:
        """``done`` of ``total`` bytes have arrived; ``total`` is None if the server does not give it."""

    def note(self, text: str) -> None:
        """``text`` explains why there is a delay."""


class _Silence:
    def progress(self, done: int, total: int | None) -> None: ...

    def note(self, text: str) -> None: ...


class _Fatal(Reason):
    """Internal: an error that another attempt would not fix."""


class _Transient(Reason):
    """Internal: an error that may disappear. ``cost``: how many ordinary failures it counts as."""

    def __init__(self, reason: str, cost: int = 1) -> None:
        super().__init__(reason)
        self.cost = cost


@dataclass(frozen=True)
class _Described:
    """A server's description of a file; hashes in base 64, the form of Google Cloud Storage."""

    url: str
    length: int | None = None  # bytes, of the whole file
    etag: str | None = None
    last_modified: str | None = None
    crc32c: str | None = None
    md5: str | None = None

    @property
    def resumable(self) -> bool:
        """Whether it can be verified that a later part belongs to the first part of the same file."""
        return bool(self.validator or self.crc32c or self.md5)

    @property
    def validator(self) -> str | None:
        """The value for ``If-Range``. A weak ETag does not identify bytes, so it is not used."""
        strong = self.etag is not None and not self.etag.startswith("W/")
        return self.etag if strong else self.last_modified


def download(url: str, target: Path, advice: str, listener: Listener | None = None) -> None:
    """Download ``url`` to ``target`` and verify it, unless it is already there.

    A file that the user put at ``target`` is used unchecked. A downloaded file that has changed since is
    fetched again. ``advice`` ends the message of a failure. Raises :class:`~porting.errors.CheckpointError`
    if it cannot be fetched, :class:`~porting.errors.OutputError` if it cannot be stored.
    """
    listener = listener or _Silence()
    if _is_good(target):
        with suppress(OSError):  # the cache may be read-only
            _discard(_beside(target, ".part"))  # of a run that was killed
        return
    rotten = target.exists()
    if rotten:
        listener.note(f"{target} has changed since it was stored; fetching it again")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _part_of(target, listener) as part:
            if not _is_good(target):  # another run may have fetched it in the meantime
                record = _fetch(url, part, listener)
                _store(part, target, record)
    except (_Fatal, _Transient) as reason:
        if rotten:
            raise CheckpointError(
                f"{target} has changed since it was stored and cannot be fetched again: {reason}; delete "
                f"{_beside(target, '.json').name} beside it if you trust it, or {advice}"
            ) from None
        raise CheckpointError(f"{target.name} cannot be fetched: {reason}; {advice}") from None
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error.strerror or error}; free some space or give --cache-dir"
        ) from None


def _is_good(target: Path) -> bool:
    if not target.is_file():
        return False
    record = _beside(target, ".json")
    if not record.exists():
        return True  # put there by hand
    try:
        with open(target, "rb") as file:
            found = _digests(file)["sha256"]
        return bool(found == json.loads(record.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextmanager
def _part_of(target: Path, listener: Listener) -> Iterator[Path]:
    """The file to download into; no other run uses it inside this context.

    If files can be locked, it is kept after a failure and can be resumed. Otherwise each run has its own
    file.
    """

    def busy() -> None:
        listener.note(f"another run is fetching {target.name}; waiting for it")

    with locked(_beside(target, ".lock"), busy) as alone:
        if alone:
            yield _beside(target, ".part")
            return
        part = _beside(target, f".{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            yield part
        finally:
            _discard(part)


def _store(part: Path, target: Path, record: dict[str, Any]) -> None:
    """Write the record, then rename: a record without its file does no harm."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    with replacing(_beside(target, ".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, target)
    _discard(part)


# Fetching


def _fetch(url: str, part: Path, listener: Listener) -> dict[str, Any]:
    """Complete and verify ``part``, in several attempts if needed; returns its record."""
    failures, furthest = 0, _size(part)
    while True:
        try:
            described = _attempt(url, part, listener)
            return _verify(part, described)
        except _Transient as transient:
            size = _size(part)
            worthwhile = size - furthest >= _WORTHWHILE
            failures = transient.cost if worthwhile else failures + transient.cost
            furthest = max(size, furthest)
            if failures >= ATTEMPTS:
                raise
            wait = BACKOFF_SECONDS * 2 ** (failures - 1)
            listener.note(f"{transient}; trying again in {wait:g} s")
            time.sleep(wait)


def _attempt(url: str, part: Path, listener: Listener) -> _Described:
    """One request for the missing bytes. Raises :class:`_Transient` or :class:`_Fatal` if it fails."""
    described = _recorded(part)
    if described is None or described.url != url or not described.resumable:
        _discard(part)
        described = None
    start = _size(part)
    if described and start == described.length:
        return described  # complete but not stored: the last run ended at this point
    headers: dict[str, str] = {}
    if start:
        headers["Range"] = f"bytes={start}-"
    if start and described and described.validator:
        headers["If-Range"] = described.validator
    with _open(url, headers, part) as response:
        described = _describe(url, response, start, described, part)
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0
            part.write_bytes(b"")
            _beside(part, ".json").write_text(json.dumps(asdict(described)), encoding="utf-8")
        elif start:
            listener.note(f"resuming at {start / 1e6:.1f} MB")
        _receive(response, part, start, described.length, listener)
    return described


def _receive(response: Any, part: Path, start: int, length: int | None, listener: Listener) -> None:
    """Append the response to ``part``, up to ``length`` bytes for the whole file."""
    done = start
    listener.progress(done, length)
    with open(part, "ab") as file:
        while chunk := _read(response):
            file.write(chunk)
            done += len(chunk)
            if done > (length or _MOST_BYTES):
                _discard(part)
                raise _Fatal("the server sends more than it announced")
            listener.progress(done, length)
    if length is not None and done < length:
        raise _Transient(f"the connection broke off at {done:,} of {length:,} bytes")


def _open(url: str, headers: dict[str, str], part: Path) -> Any:
    """The server's response, of status 200 or 206."""
    try:
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.urlopen(request, timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            _refused(error, part)
    except urllib.error.URLError as error:
        _unreachable(error.reason)
    except (ValueError, http.client.InvalidURL) as error:
        raise _Fatal(f"it is not a web address ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        _unreachable(error)
    if response.status not in (http.HTTPStatus.OK, http.HTTPStatus.PARTIAL_CONTENT):
        with response:
            raise _Fatal(f"the server answers {response.status} {response.reason}")
    return response


def _refused(error: urllib.error.HTTPError, part: Path) -> NoReturn:
    answer = f"the server answers {error.code} {error.reason}"
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        _discard(part)  # the server's file has changed, or is shorter than ours
        raise _Transient(answer)
    if error.code in _RETRIED_STATUS or error.code >= 500:
        raise _Transient(answer)
    raise _Fatal(answer)


def _unreachable(reason: object) -> NoReturn:
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise _Fatal(f"the server's certificate is not trusted ({reason.verify_message})") from None
    if isinstance(reason, TimeoutError):
        raise _Transient(f"the server did not answer for {STALL_SECONDS:g} s", cost=2) from None
    if isinstance(reason, (socket.gaierror, ConnectionRefusedError)):
        what = reason.strerror or str(reason)
        raise _Transient(f"the server cannot be reached ({what})", cost=2) from None
    raise _Transient(f"the connection failed ({reason or type(reason).__name__})") from None


def _read(response: Any) -> bytes:
    try:
        return response.read(_CHUNK)
    except TimeoutError:
        raise _Transient(f"the server sent nothing for {STALL_SECONDS:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Transient(f"the connection broke off ({type(error).__name__})") from None


def _describe(url: str, response: Any, start: int, known: _Described | None, part: Path) -> _Described:
    """The response's description of the file. If the download is resumed, it must agree with ``known``."""
    headers: Message = response.headers
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        match = re.fullmatch(
            r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", headers.get("Content-Range", "").strip()
        )
        if known is None or not match or int(match[1]) != start or int(match[2]) != known.length:
            _discard(part)
            raise _Transient("the server resumed a different file, or at a different position")
        return known
    hashes = {
        key.strip(): value.strip()
        for line in headers.get_all("x-goog-hash", [])
        for key, _, value in (item.partition("=") for item in line.split(","))
    }
    length = re.fullmatch(r"[0-9]{1,18}", headers.get("Content-Length", "").strip())
    described = _Described(
        url=url,
        length=int(length[0]) if length else None,
        etag=headers.get("ETag"),
        last_modified=headers.get("Last-Modified"),
        crc32c=hashes.get("crc32c"),
        md5=hashes.get("md5"),
    )
    if described.length is None and not (described.crc32c or described.md5):
        raise _Fatal(
            "the server gives neither the length of the file nor its checksum, so it cannot be verified"
        )
    if (described.length or 0) > _MOST_BYTES:
        raise _Fatal(f"the server announces {described.length:,} bytes, more than any checkpoint has")
    return described


# Verifying


def _verify(part: Path, described: _Described) -> dict[str, Any]:
    """Verify the whole file; returns its record. Discards a wrong file and raises :class:`_Transient`."""
    with open(part, "rb") as file:
        found = _digests(file)
    for name in ("crc32c", "md5"):
        announced = getattr(described, name)
        if announced and found[name] != announced:
            _discard(part)
            raise _Transient(f"the file has {name} {found[name]}, the server announced {announced}", cost=2)
    return {**asdict(described), "length": _size(part), **found}


def _digests(file: Any) -> dict[str, str]:
    """CRC32C and MD5 in base 64, SHA-256 in hexadecimal, of all of ``file``."""
    crc32c, md5 = google_crc32c.Checksum(), hashlib.md5(usedforsecurity=False)
    sha256 = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        for digest in (crc32c, md5, sha256):
            digest.update(chunk)
    return {
        "crc32c": base64.b64encode(crc32c.digest()).decode(),
        "md5": base64.b64encode(md5.digest()).decode(),
        "sha256": sha256.hexdigest(),
    }


def _recorded(part: Path) -> _Described | None:
    """The server's description when ``part`` was begun; None if it is missing or not readable."""
    try:
        described = _Described(**json.loads(_beside(part, ".json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    kinds = {**dict.fromkeys(asdict(described), str), "length": int}
    fits = all(value is None or isinstance(value, kinds[name]) for name, value in asdict(described).items())
    return described if fits else None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _discard(part: Path) -> None:
    for path in (part, _beside(part, ".json")):
        with suppress(FileNotFoundError):
            path.unlink()
