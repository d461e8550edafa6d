"""Google's releases by name: the table, and a download that survives the faults of a server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.helpers.paths import ROOT, TOOLS
from parity_tests.helpers.servers import BODY, Handler, Server, encode
from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.errors import CheckpointError, EfficientDetError, OutputError
from porting.hparams import UNSEEN
from porting.infer import ADVPROP, infer_config
from porting.sources import download
from porting.sources import google_releases as releases
from porting.sources.google_releases import GOOGLE_RELEASES, default_cache, fetch, google_release_named
from porting.sources.open import open_source
from porting.synthetic import synthetic_checkpoint
from pytorch_model import load_model
from pytorch_model.config import MODELS, model_config
from tf_reference.variables import variable_shapes

D0 = GOOGLE_RELEASES["efficientdet-d0"]


# A server with faults


def drop(after: int) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        handler.serve(limit=after)
        handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    return fault


def answer(status: int) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        handler.send_error(status)
        return True

    return fault


def changed(**headers: str | None) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        handler.serve(changed={key.replace("_", "-"): value for key, value in headers.items()})
        return True

    return fault


def stall(after: int) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        handler.serve(limit=after)
        handler.wfile.flush()
        handler.server.stop.wait(300)
        return True

    return fault


def silence(handler: Handler) -> bool:
    handler.server.stop.wait(300)
    return True


def hang_up(handler: Handler) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def garbage(handler: Handler) -> bool:
    handler.wfile.write(b"\x00\xff not HTTP at all\r\n\r\n")
    return True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv(releases.BASE_URL_VARIABLE, server.url)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(download, "STALL_SECONDS", 60.0)
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


class Watcher:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int | None]] = []
        self.notes: list[str] = []

    def progress(self, done: int, total: int | None) -> None:
        self.seen.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


def leftovers(cache: Path) -> list[str]:
    """The files in the cache other than the archive, its record and the lock."""
    kept = {"efficientdet-d0.tar.gz", "efficientdet-d0.tar.gz.json", "efficientdet-d0.tar.gz.lock"}
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name not in kept)


def assert_fetched(cache: Path, body: bytes = BODY) -> None:
    target = cache / "efficientdet-d0" / "efficientdet-d0.tar.gz"
    assert target.read_bytes() == body
    record = json.loads(target.with_name(target.name + ".json").read_text())
    assert record["sha256"] == hashlib.sha256(body).hexdigest()
    assert record["length"] == len(body)
    assert leftovers(cache) == []


# The table


def test_the_table_holds_what_was_published(shared: Path) -> None:
    published = json.loads((shared / "releases.json").read_text())["releases"]
    assert [entry["name"] for entry in published] == list(GOOGLE_RELEASES)
    assert len(GOOGLE_RELEASES) == 26
    for entry in published:
        release = GOOGLE_RELEASES[entry["name"]]
        assert release.url == entry["ckpt"]
        assert (release.ap_val, release.ap_test_dev) == (entry.get("ap_val"), entry.get("ap_test_dev"))
        assert release.cached_at(Path("c")).name.endswith(Path(entry["ckpt"]).suffix)


@pytest.mark.parametrize("release", GOOGLE_RELEASES.values(), ids=list(GOOGLE_RELEASES))
@pytest.mark.parametrize("cache", ["/c", "/advprop/d2-640", "/efficientdet-d6", "/x/efficientdet-d7"])
def test_the_cached_path_gives_what_weights_cannot(release: releases.GoogleRelease, cache: str) -> None:
    """``infer_config`` uses the path of the source; the names of the cache's folders must not matter."""
    assert release.model in MODELS
    # The folder inside the archive; for AdvProp it is the plain name efficientdet-d0.
    folder = release.path.split("/")[-1].split(".")[0]
    source = f"{release.cached_at(Path(cache))}:{folder}/model"
    plain = model_config(release.model)
    found = infer_config(variable_shapes(plain), source)
    assert found.variant == release.model
    size = (640, 640) if "-640" in release.name else plain.image_size
    advprop = ADVPROP if release.name.endswith("-advprop") else {}
    assert found.config == plain.replace(image_size=size, **advprop)


def test_every_file_of_the_cache_is_inside_it() -> None:
    places = [release.cached_at(Path("/cache")) for release in GOOGLE_RELEASES.values()]
    assert len(set(places)) == 26
    for release, place in zip(GOOGLE_RELEASES.values(), places, strict=True):
        assert re.fullmatch(r"[a-z0-9.-]+", place.name)
        assert place.parent == Path("/cache") / release.name


@pytest.mark.parametrize("spec", ["efficientdet-d0", "efficientdet_d0", "EfficientDet-D0"])
def test_a_name_in_any_spelling(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert google_release_named(spec) is D0


@pytest.mark.parametrize("there", ["efficientdet-d0", "efficientdet-d0.index"])
def test_existing_paths_have_priority(there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / there).touch()
    assert google_release_named("efficientdet-d0") is None
    assert google_release_named("efficientdet-d1") is GOOGLE_RELEASES["efficientdet-d1"]


def test_the_folder_of_the_cache_is_not_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --cache-dir . the download makes a folder with the release's name; the next run must ignore it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    (tmp_path / D0.name).mkdir()
    assert google_release_named(D0.name) is None  # some folder
    assert google_release_named(D0.name, Path("elsewhere")) is None
    assert google_release_named(D0.name, Path()) is D0
    (tmp_path / "elsewhere/efficientdet-porting" / D0.name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere/efficientdet-porting")
    assert google_release_named(D0.name) is D0
    (Path(D0.name) / "model.index").touch()  # unpacked there
    assert google_release_named(D0.name) is None


@pytest.mark.parametrize(
    ("spec", "near"),
    [("efficientdet-d8", "efficientdet-d"), ("efficientdet-d1-640", "-640"), ("efficientdet-lite5", "lite")],
)
def test_names_that_are_not_releases(
    spec: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"{spec} is neither an existing path nor a Google release.*{near}"
    ):
        google_release_named(spec)


@given(st.text(max_size=300) | st.from_regex(r"efficientdet[-_/.]{1,3}.{0,9}", fullmatch=True))
def test_any_other_spec_is_a_path(spec: str) -> None:
    try:
        release = google_release_named(spec)
    except CheckpointError:
        return
    assert release is None or release.name == spec.lower().replace("_", "-")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache() == Path("/x/efficientdet-porting")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache() == Path("/home/me/.cache/efficientdet-porting")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path("/home/me/.cache/efficientdet-porting")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(EfficientDetError, match="give --cache-dir"):
        default_cache()


def test_a_mirror_must_be_on_the_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(releases.BASE_URL_VARIABLE, "file:///etc")
    with pytest.raises(
        EfficientDetError, match=r"EFFICIENTDET_RELEASES_URL is 'file:///etc', must begin with https"
    ):
        fetch(D0, tmp_path)
    monkeypatch.setenv(releases.BASE_URL_VARIABLE, "")
    assert D0.url.startswith("https://storage.googleapis.com/")


# Fetching


def test_fetch_and_use_again(server: Server, tmp_path: Path, watcher: Watcher) -> None:
    path = fetch(D0, tmp_path, watcher)
    assert path == D0.cached_at(tmp_path)
    assert_fetched(tmp_path)
    assert server.requests[0]["path"] == "/e/coco2/efficientdet-d0.tar.gz"
    assert watcher.seen[0] == (0, len(BODY))
    assert watcher.seen[-1] == (len(BODY), len(BODY))
    assert watcher.seen == sorted(watcher.seen)
    assert watcher.notes == []
    for suffix in (".part", ".part.json"):  # files of a run that was killed at its end
        path.with_name(path.name + suffix).write_bytes(b"{}")
    assert fetch(D0, tmp_path) == path
    assert len(server.requests) == 1
    assert_fetched(tmp_path)


def test_a_slash_after_the_base(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(releases.BASE_URL_VARIABLE, server.url + "/")
    fetch(D0, tmp_path)
    assert server.requests[0]["path"] == "/e/coco2/efficientdet-d0.tar.gz"


def test_the_default_cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch(D0).is_relative_to(tmp_path / "xdg" / "efficientdet-porting")


def test_dropped_and_resumed(server: Server, tmp_path: Path, watcher: Watcher) -> None:
    server.faults = [drop(1_000_000), drop(500_000), hang_up]
    fetch(D0, tmp_path, watcher)
    assert_fetched(tmp_path)
    ranges = [request.get("Range") for request in server.requests]
    assert ranges[0] is None
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in ranges[1:] if asked]
    assert len(starts) == 3
    assert 0 < starts[0] <= 1_000_000
    assert starts[0] < starts[1] == starts[2] <= 1_500_000
    assert all(request["If-Range"] == '"first"' for request in server.requests[1:])
    assert any("broke off at" in note and "trying again" in note for note in watcher.notes)
    assert any(note.startswith("resuming at") for note in watcher.notes)


def test_resumed_by_a_later_run(
    server: Server, tmp_path: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.faults = [drop(1_200_000)]
    with pytest.raises(CheckpointError, match="the connection broke off at"):
        fetch(D0, tmp_path)
    assert not D0.cached_at(tmp_path).exists()
    fetch(D0, tmp_path, watcher)
    assert_fetched(tmp_path)
    assert server.requests[1]["Range"].startswith("bytes=1")
    assert watcher.seen[0][0] > 1_000_000


def interrupted(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a ``.part`` of about 1.2 MB."""
    with monkeypatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        server.faults = [drop(1_200_000)]
        with pytest.raises(CheckpointError):
            fetch(D0, cache)
    assert leftovers(cache) == ["efficientdet-d0.tar.gz.part", "efficientdet-d0.tar.gz.part.json"]
    server.requests.clear()


def test_the_file_changed_in_between(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(server, tmp_path, monkeypatch)
    server.body, server.etag = BODY[::-1], '"second"'
    fetch(D0, tmp_path)
    assert_fetched(tmp_path, BODY[::-1])
    assert server.requests[0]["If-Range"] == '"first"'
    assert len(server.requests) == 1


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_the_file_changed_and_only_its_checksum_shows_it(
    etag: str | None, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.etag = etag
    interrupted(server, tmp_path, monkeypatch)
    server.body = BODY[::-1]
    fetch(D0, tmp_path)
    assert_fetched(tmp_path, BODY[::-1])
    assert "Range" in server.requests[0]
    assert "If-Range" not in server.requests[0]
    assert "Range" not in server.requests[1]


def test_last_modified_where_there_is_no_etag(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.etag, server.hashes, server.last_modified = None, False, "Mon, 01 Jun 2020 00:00:00 GMT"
    interrupted(server, tmp_path, monkeypatch)
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert server.requests[0]["If-Range"] == "Mon, 01 Jun 2020 00:00:00 GMT"
    assert "Range" in server.requests[0]


def test_a_server_without_validators_is_not_resumed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ETag, date and checksum two versions look the same, so the download starts again."""
    server.etag, server.hashes = None, False
    interrupted(server, tmp_path, monkeypatch)
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert "Range" not in server.requests[0]


def test_another_mirror_does_not_resume(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(server, tmp_path, monkeypatch)
    monkeypatch.setenv(releases.BASE_URL_VARIABLE, server.url + "/mirror")
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert "Range" not in server.requests[0]


def test_a_server_that_ignores_ranges(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ranges = False
    interrupted(server, tmp_path, monkeypatch)
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert "Range" in server.requests[0]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "content_range",
    [None, "bytes 0-2999999/3000000", "bytes 1200000-2999999/*", "bytes 1200000-2999999/3000001", "9" * 5000],
)
def test_resumed_at_a_wrong_position(
    content_range: str | None, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(server, tmp_path, monkeypatch)
    server.faults = [changed(Content_Range=content_range)]
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert "Range" not in server.requests[1]


@pytest.mark.parametrize("more", [0, 5])
def test_a_part_that_is_already_complete_or_longer(
    more: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last run ended between the last byte and the renaming, or something else wrote to the part."""
    interrupted(server, tmp_path, monkeypatch)
    part = D0.cached_at(tmp_path).with_name("efficientdet-d0.tar.gz.part")
    part.write_bytes(BODY + bytes(more))
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert len(server.requests) == (0 if more == 0 else 2)  # a 416, then from the start


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"url": 1}', '{"url": "u", "x": 1}', '{"url": "URL", "etag": 5, "length": "x"}'],
)
def test_an_unreadable_note_on_the_part(
    content: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(server, tmp_path, monkeypatch)
    note = D0.cached_at(tmp_path).with_name("efficientdet-d0.tar.gz.part.json")
    note.write_text(content.replace("URL", D0.url))
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert "Range" not in server.requests[0]


@pytest.mark.parametrize("fault", [answer(503), answer(500), answer(429), answer(408), hang_up, garbage])
def test_transient_errors_are_retried(
    fault: Callable[[Handler], bool], server: Server, tmp_path: Path, watcher: Watcher
) -> None:
    server.faults = [fault, fault, fault]
    fetch(D0, tmp_path, watcher)
    assert_fetched(tmp_path)
    assert len(server.requests) == 4
    waits = [float(re.search(r"again in (\S+) s", note)[1]) for note in watcher.notes]  # type: ignore[index]
    assert waits == [0.001, 0.002, 0.004]


@pytest.mark.parametrize("status", [404, 403, 401, 410, 400])
def test_permanent_errors_are_not_retried(status: int, server: Server, tmp_path: Path) -> None:
    server.faults = [answer(status)]
    with pytest.raises(CheckpointError) as caught:
        fetch(D0, tmp_path)
    assert len(server.requests) == 1
    message = str(caught.value)
    assert f"cannot be fetched: the server answers {status}" in message
    assert f"fetch {D0.url} by hand and put it at {D0.cached_at(tmp_path)}" in message
    assert "--ckpt synthetic:efficientdet-d0" in message
    assert "\n" not in message


def test_attempts_are_limited(server: Server, tmp_path: Path) -> None:
    server.faults = [answer(503)] * 10
    with pytest.raises(CheckpointError, match="the server answers 503"):
        fetch(D0, tmp_path)
    assert len(server.requests) == 4


def test_attempts_with_progress_are_not_counted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_WORTHWHILE", 100_000)
    server.faults = [drop(400_000)] * 6
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert len(server.requests) == 7


@pytest.mark.parametrize("fault", [stall(700_000), silence])
def test_a_stalled_server(
    fault: Callable[[Handler], bool],
    server: Server,
    tmp_path: Path,
    watcher: Watcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "STALL_SECONDS", 2.0)
    server.faults = [fault]
    fetch(D0, tmp_path, watcher)
    assert_fetched(tmp_path)
    assert any("for 2 s; trying again" in note for note in watcher.notes)


@pytest.mark.parametrize(
    "wrong", ["crc32c=AAAAAA==", "md5=AAAAAAAAAAAAAAAAAAAAAA==", "crc32c=not base64 \u00e9"]
)
def test_a_wrong_checksum(wrong: str, server: Server, tmp_path: Path) -> None:
    spoil = changed(**{"x-goog-hash": wrong, "X-Goog-Hash": None})
    server.faults = [spoil]
    fetch(D0, tmp_path)  # once may be chance
    assert_fetched(tmp_path)
    assert "Range" not in server.requests[1]
    server.faults = [spoil] * 9
    server.requests.clear()
    other = tmp_path / "other"
    name = wrong.partition("=")[0]
    with pytest.raises(CheckpointError, match=f"the file has {name} .*, the server announced"):
        fetch(D0, other)
    assert len(server.requests) == 2  # three megabytes are not fetched four times
    assert leftovers(other) == []
    assert not D0.cached_at(other).exists()


def test_a_bit_flipped_on_the_way(server: Server, tmp_path: Path) -> None:
    def flip(handler: Handler) -> bool:
        good = handler.server.body
        crc32c = encode(google_crc32c.value(good).to_bytes(4, "big"))
        handler.server.body = good[:9] + bytes([good[9] ^ 1]) + good[10:]
        handler.serve(changed={"x-goog-hash": f"crc32c={crc32c}", "X-Goog-Hash": None})
        handler.server.body = good
        return True

    server.faults = [flip]
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert len(server.requests) == 2


def test_each_of_two_checksum_lines_counts(server: Server, tmp_path: Path) -> None:
    server.faults = [changed(**{"X-Goog-Hash": "md5=AAAAAAAAAAAAAAAAAAAAAA=="})]
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert len(server.requests) == 2


@pytest.mark.parametrize("start", [0, 1000])
def test_a_part_that_was_not_requested(start: int, server: Server, tmp_path: Path) -> None:
    def piece(handler: Handler) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        handler.end_headers()
        handler.wfile.write(BODY[start:])
        return True

    server.faults = [piece]
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert len(server.requests) == 2


@pytest.mark.parametrize("one_line", [True, False])
def test_both_checksums_are_recorded(one_line: bool, server: Server, tmp_path: Path) -> None:
    crc32c, md5 = google_crc32c.value(BODY).to_bytes(4, "big"), hashlib.md5(BODY).digest()
    both = f"crc32c={encode(crc32c)},md5={encode(md5)}"
    if one_line:
        server.faults = [changed(**{"x-goog-hash": both, "X-Goog-Hash": None})]
    fetch(D0, tmp_path)
    record = json.loads(D0.cached_at(tmp_path).with_name("efficientdet-d0.tar.gz.json").read_text())
    assert f"crc32c={record['crc32c']},md5={record['md5']}" == both
    assert record["url"] == D0.url


def test_announced_longer_than_it_is(server: Server, tmp_path: Path) -> None:
    """The server announces more bytes than it sends."""
    server.faults = [changed(Content_Length=str(len(BODY) + 100))] * 9
    with pytest.raises(CheckpointError, match=r"broke off at 3,000,000 of 3,000,100 bytes|answers 416"):
        fetch(D0, tmp_path)
    assert len(server.requests) == 4
    assert not D0.cached_at(tmp_path).exists()


def test_announced_shorter_than_it_is(server: Server, tmp_path: Path) -> None:
    server.faults = [changed(Content_Length="1000")] * 9
    with pytest.raises(CheckpointError, match="the file has crc32c"):
        fetch(D0, tmp_path)
    assert not D0.cached_at(tmp_path).exists()


@pytest.mark.parametrize("length", [None, "", "-5", "many", "9" * 5000])
def test_no_length_but_a_checksum(
    length: str | None, server: Server, tmp_path: Path, watcher: Watcher
) -> None:
    server.faults = [changed(Content_Length=length)]
    fetch(D0, tmp_path, watcher)
    assert_fetched(tmp_path)


def test_neither_length_nor_checksum(server: Server, tmp_path: Path) -> None:
    server.hashes = False
    server.faults = [changed(Content_Length=None)]
    with pytest.raises(CheckpointError, match="so it cannot be verified"):
        fetch(D0, tmp_path)
    assert not D0.cached_at(tmp_path).exists()


def test_far_too_long(server: Server, tmp_path: Path) -> None:
    server.faults = [changed(Content_Length=str(1 << 40))]
    with pytest.raises(CheckpointError, match="announces 1,099,511,627,776 bytes"):
        fetch(D0, tmp_path)


def test_endless(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MOST_BYTES", 1_000_000)
    server.faults = [changed(Content_Length=None)]
    with pytest.raises(CheckpointError, match="sends more than it announced"):
        fetch(D0, tmp_path)
    assert leftovers(tmp_path) == []


def test_no_content(server: Server, tmp_path: Path) -> None:
    server.faults = [answer(204)]
    with pytest.raises(CheckpointError, match="the server answers 204"):
        fetch(D0, tmp_path)


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv(releases.BASE_URL_VARIABLE, f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(CheckpointError, match="the server cannot be reached") as caught:
            fetch(GOOGLE_RELEASES["efficientdet-d2-640"], tmp_path)
    assert "synthetic:efficientdet-d2," in str(caught.value)

    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv(releases.BASE_URL_VARIABLE)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(CheckpointError) as caught:
        fetch(D0, tmp_path)
    assert str(caught.value) == (
        "efficientdet-d0.tar.gz cannot be fetched: the server cannot be reached (Name or service not known); "
        f"fetch {releases.BASE_URL}/coco2/efficientdet-d0.tar.gz by hand and put it at "
        f"{tmp_path}/efficientdet-d0/efficientdet-d0.tar.gz, or try --ckpt synthetic:efficientdet-d0, "
        "which needs no download"
    )


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://[::1", "http://a b", "https://\u0000"])
def test_an_impossible_mirror(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setitem(os.environ, "no_proxy", "*")
    monkeypatch.setattr(releases, "BASE_URL", url)
    with pytest.raises(CheckpointError, match=r"efficientdet-d0\.tar\.gz cannot be fetched"):
        fetch(D0, tmp_path)


# The cache


def test_a_file_put_there_by_hand(server: Server, tmp_path: Path) -> None:
    target = D0.cached_at(tmp_path)
    target.parent.mkdir(parents=True)
    target.write_bytes(b"by hand")
    assert fetch(D0, tmp_path).read_bytes() == b"by hand"
    assert server.requests == []
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("damage", ["file", "record", "no hash"])
def test_a_damaged_cache(damage: str, server: Server, tmp_path: Path, watcher: Watcher) -> None:
    target = fetch(D0, tmp_path)
    record = target.with_name(target.name + ".json")
    if damage == "file":
        target.write_bytes(BODY[:-1] + b"?")
    else:
        record.write_text("{}" if damage == "no hash" else "[")
    fetch(D0, tmp_path, watcher)
    assert_fetched(tmp_path)
    assert len(server.requests) == 2
    assert watcher.notes == [f"{target} has changed since it was stored; fetching it again"]


def test_damaged_and_offline(server: Server, tmp_path: Path) -> None:
    target = fetch(D0, tmp_path)
    target.write_bytes(b"rotten")
    server.faults = [answer(404)]
    with pytest.raises(
        CheckpointError, match=r"has changed since .* delete efficientdet-d0\.tar\.gz\.json beside"
    ):
        fetch(D0, tmp_path)
    assert target.read_bytes() == b"rotten"  # not deleted: the user may trust it
    target.with_name(target.name + ".json").unlink()
    assert fetch(D0, tmp_path).read_bytes() == b"rotten"


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written: .*give --cache-dir"):
        fetch(D0, tmp_path / "file")
    D0.cached_at(tmp_path).mkdir(parents=True)
    with pytest.raises(OutputError, match=r"efficientdet-d0\.tar\.gz cannot be written"):
        fetch(D0, tmp_path)


def test_interrupted_by_the_user(server: Server, tmp_path: Path) -> None:
    class Impatient(Watcher):
        def progress(self, done: int, total: int | None) -> None:
            if done > 1_000_000:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(D0, tmp_path, Impatient())
    assert not D0.cached_at(tmp_path).exists()
    fetch(D0, tmp_path)
    assert_fetched(tmp_path)
    assert "Range" in server.requests[1]


def test_two_runs_at_once_fetch_it_once(server: Server, tmp_path: Path, watcher: Watcher) -> None:
    started, go = threading.Event(), threading.Event()

    def slow(handler: Handler) -> bool:
        started.set()
        go.wait(300)
        return False

    server.faults = [slow]
    errors: list[BaseException] = []

    def run(listener: Watcher | None) -> None:
        try:
            fetch(D0, tmp_path, listener)
        except BaseException as error:
            errors.append(error)

    first = threading.Thread(target=run, args=(None,))
    first.start()
    assert started.wait(300)
    second = threading.Thread(target=run, args=(watcher,))
    second.start()
    for _ in range(30_000):
        if watcher.notes:
            break
        time.sleep(0.01)
    go.set()
    first.join(300)
    second.join(300)
    assert errors == []
    assert watcher.notes == ["another run is fetching efficientdet-d0.tar.gz; waiting for it"]
    assert len(server.requests) == 1
    assert_fetched(tmp_path)


@pytest.mark.parametrize("locks", [True, False])
def test_many_processes_at_once(locks: bool, server: Server, tmp_path: Path) -> None:
    """With locks, and without them as on some network disks."""
    script = (
        "import sys; from pathlib import Path; from porting.sources import download; "
        "from porting.sources import google_releases as releases; "
        "download.BACKOFF_SECONDS = 0.01; "
        + (
            ""
            if locks
            else "from contextlib import nullcontext; download.locked = lambda *a: nullcontext(False); "
        )
        + "releases.fetch(releases.GOOGLE_RELEASES['efficientdet-d0'], Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    server.faults = [drop(500_000), drop(900_000)]
    runs = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for run in runs:
        _, stderr = run.communicate(timeout=600)
        assert run.returncode == 0, stderr
    assert_fetched(tmp_path)
    if locks:
        assert len(server.requests) == 3


# From a name to a checkpoint


def test_a_release_opens_by_its_name(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables: dict[str, np.ndarray] = {
        "v": np.arange(5, dtype=np.float32),
        "global_step": np.array(3, np.int64),
    }
    write_bundle(tmp_path / "efficientdet-d0" / "model", variables)
    with tarfile.open(tmp_path / "served.tgz", "w:gz") as tar:
        tar.add(tmp_path / "efficientdet-d0", "efficientdet-d0")
    server.body = (tmp_path / "served.tgz").read_bytes()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    cache = tmp_path / "cache"
    with open_source("efficientdet-d0-advprop", work, cache=cache) as checkpoint:
        assert np.array_equal(checkpoint["v"], variables["v"])
        archive = cache / "efficientdet-d0-advprop" / "efficientdet-d0-advprop.tar.gz"
        assert checkpoint.source == f"{archive}:efficientdet-d0/model"
        # The name is that of AutoML's own configuration, so the network's function is known.
        assert checkpoint.stated_by == dict.fromkeys(UNSEEN, "the release efficientdet-d0-advprop")
        assert checkpoint.settings["act_type"] == "swish"
    assert server.requests[0]["path"] == "/e/advprop/efficientdet-d0.tar.gz"
    assert list(work.iterdir()) == []
    with pytest.raises(
        CheckpointError, match="efficientdet-d9 is neither an existing path nor a Google release"
    ):
        open_source("efficientdet-d9", work)
    with open_checkpoint(archive) as checkpoint:
        assert checkpoint.step == 3


# From the command line


def convert(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    tool = TOOLS / "convert.py"
    command = [sys.executable, str(tool), *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


@pytest.fixture
def served_lite0(server: Server, tmp_path: Path) -> Server:
    folder = tmp_path / "made" / "efficientdet-lite0"
    write_bundle(folder / "model", synthetic_checkpoint(model_config("efficientdet-lite0", num_classes=3)))
    with tarfile.open(tmp_path / "served.tgz", "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    server.body = (tmp_path / "served.tgz").read_bytes()
    return server


def test_convert_a_release_with_hparams(served_lite0: Server, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    hparams = "image_size=640x512,learning_rate=0.1,nms_configs.method=hard"
    arguments = ("--ckpt", "efficientdet-lite0", "--cache-dir", tmp_path / "cache", "--hparams", hparams)
    done = convert(*arguments, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "fetching efficientdet-lite0" in done.stdout
    rows = " ".join(done.stdout.split())
    assert "given image_size 512×640" in rows
    assert "ignored learning_rate, nms_configs.method: no weight depends on" in rows
    config = load_model(work / "efficientdet_lite0.safetensors").config
    assert (config.image_size, config.num_classes) == ((512, 640), 3)

    served_lite0.requests.clear()
    again = convert(*arguments, "--json", cwd=work)
    assert again.returncode == 0
    assert served_lite0.requests == []
    assert "fetching" not in again.stdout + again.stderr
    summary = json.loads(again.stdout)
    assert summary["given"] == ["image_size"]
    assert summary["source"].endswith("efficientdet-lite0.tgz:efficientdet-lite0/model")


def test_convert_says_what_to_do_without_a_network(server: Server, tmp_path: Path) -> None:
    server.faults = [answer(404)]
    done = convert("--ckpt", "efficientdet-d0", "--cache-dir", tmp_path / "cache", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: efficientdet-d0.tar.gz cannot be fetched: the server answers 404")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hparams", "num_class=3"], "did you mean num_classes?"),
        (["--hparams", "absent.yaml"], "absent.yaml cannot be read"),
        (["--model", "efficientdet-d1", "--hparams", "name=efficientdet-d0"], "--model says efficientdet-d1"),
    ],
)
def test_convert_rejects_options_before_it_downloads(
    arguments: list[str], message: str, server: Server, tmp_path: Path
) -> None:
    done = convert("--ckpt", "efficientdet-d0", "--cache-dir", tmp_path / "cache", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert server.requests == []
