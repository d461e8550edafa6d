"""The 26 checkpoints that Google released: addresses, published AP, and download by name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from porting.errors import CheckpointError, EfficientDetError
from porting.sources.download import Listener, download

BASE_URL = "https://storage.googleapis.com/cloud-tpu-checkpoints/efficientdet"
#: Environment variable with a different base address, for a mirror.
BASE_URL_VARIABLE = "EFFICIENTDET_RELEASES_URL"

CACHE_FOLDER = "efficientdet-porting"


@dataclass(frozen=True)
class GoogleRelease:
    """One checkpoint that Google released. APs are COCO's, in percent, as published; None: not published.

    ``ap_val`` is on val2017 (of Lite: the float model), ``ap_test_dev`` on test-dev2017.
    """

    name: str
    path: str  # below the base address
    ap_val: float | None = None
    ap_test_dev: float | None = None

    @property
    def model(self) -> str:
        """The model variant: ``efficientdet-d2`` for ``efficientdet-d2-640``."""
        return re.sub(r"-(640|advprop)$", "", self.name)

    @property
    def url(self) -> str:
        """The address. Raises :class:`EfficientDetError` if the environment names an invalid base address."""
        base = os.environ.get(BASE_URL_VARIABLE) or BASE_URL
        if not base.startswith(("https://", "http://")):
            raise EfficientDetError(
                f"{BASE_URL_VARIABLE} is {base!r}, must begin with https:// or http://; correct or unset it"
            )
        return f"{base.rstrip('/')}/{self.path}"

    def cached_at(self, cache: Path) -> Path:
        """The path of its file in ``cache``. Folder and file have the release's name.

        ``infer_config`` takes from this name what the weights do not contain (image size, input range).
        """
        suffix = ".tgz" if self.path.endswith(".tgz") else ".tar.gz"
        return cache / self.name / (self.name + suffix)


#: From AutoML's README and its Det-AdvProp page, in their order. ``-640``: trained at 640×640 for every
#: variant. ``-advprop``: trained on inputs in [-1, 1].
GOOGLE_RELEASES: Mapping[str, GoogleRelease] = {
    f"efficientdet-{name}": GoogleRelease(f"efficientdet-{name}", path, ap_val, ap_test_dev)
    for name, path, ap_val, ap_test_dev in (
        ("d0", "coco2/efficientdet-d0.tar.gz", 34.3, 34.6),
        ("d1", "coco2/efficientdet-d1.tar.gz", 40.2, 40.5),
        ("d2", "coco2/efficientdet-d2.tar.gz", 43.5, 43.9),
        ("d3", "coco2/efficientdet-d3.tar.gz", 46.8, 47.2),
        ("d4", "coco2/efficientdet-d4.tar.gz", 49.3, 49.7),
        ("d5", "coco2/efficientdet-d5.tar.gz", 51.2, 51.5),
        ("d6", "coco2/efficientdet-d6.tar.gz", 52.1, 52.6),
        ("d7", "coco2/efficientdet-d7.tar.gz", 53.4, 53.7),
        ("d7x", "coco2/efficientdet-d7x.tar.gz", 54.4, 55.1),
        ("d2-640", "coco640/efficientdet-d2-640.tar.gz", None, 41.7),
        ("d3-640", "coco640/efficientdet-d3-640.tar.gz", None, 44.0),
        ("d4-640", "coco640/efficientdet-d4-640.tar.gz", None, 45.7),
        ("d5-640", "coco640/efficientdet-d5-640.tar.gz", None, 46.6),
        ("d6-640", "coco640/efficientdet-d6-640.tar.gz", None, 47.9),
        ("lite0", "coco/efficientdet-lite0.tgz", 26.41, None),
        ("lite1", "coco/efficientdet-lite1.tgz", 31.5, None),
        ("lite2", "coco/efficientdet-lite2.tgz", 35.06, None),
        ("lite3", "coco/efficientdet-lite3.tgz", 38.77, None),
        ("lite3x", "coco/efficientdet-lite3x.tgz", 42.64, None),
        ("lite4", "coco/efficientdet-lite4.tgz", 43.18, None),
        ("d0-advprop", "advprop/efficientdet-d0.tar.gz", 35.1, 35.3),
        ("d1-advprop", "advprop/efficientdet-d1.tar.gz", 40.8, 40.9),
        ("d2-advprop", "advprop/efficientdet-d2.tar.gz", 44.3, 44.3),
        ("d3-advprop", "advprop/efficientdet-d3.tar.gz", 47.7, 48.0),
        ("d4-advprop", "advprop/efficientdet-d4.tar.gz", 50.4, 50.4),
        ("d5-advprop", "advprop/efficientdet-d5.tar.gz", 52.2, 52.5),
    )
}


#: Beginnings of a release's address: the bucket as Google's tools, documents and console write it.
_ADDRESSES = (
    f"{BASE_URL}/",
    "gs://cloud-tpu-checkpoints/efficientdet/",
    "https://storage.cloud.google.com/cloud-tpu-checkpoints/efficientdet/",
    "https://cloud-tpu-checkpoints.storage.googleapis.com/efficientdet/",
)


def _release_at(address: str) -> GoogleRelease | None:
    """The release whose file has this address, whatever its query; None for any other text."""
    for release in GOOGLE_RELEASES.values():
        known = (release.url, *(f"{base}{release.path}" for base in _ADDRESSES))
        if _plain(address) in map(_plain, known):
            return release
    return None


def _plain(address: str) -> str:
    """Without a query, and the same for both schemes of the web."""
    return re.sub(r"^http://", "https://", address.partition("?")[0])


def google_release_named(spec: str, cache: Path | None = None) -> GoogleRelease | None:
    """The release with the name or address ``spec``; None if it is neither.

    Names are ``efficientdet-d0`` or ``efficientdet_d0``; addresses ``https://…`` or ``gs://…``.
    A file or folder with that name has priority, unless it is the folder in ``cache`` (see :func:`fetch`)
    where the release is stored. Raises :class:`~porting.errors.CheckpointError` for a name that looks like a
    release's, but is neither a release nor an existing path.
    """
    if "://" in spec:
        return _release_at(spec)
    name = spec.lower().replace("_", "-")
    if not re.fullmatch(r"efficientdet-[a-z0-9-]{1,40}", name):
        return None
    if Path(f"{spec}.index").exists() or (Path(spec).exists() and not _is_kept_in(Path(spec), cache)):
        return None
    if name in GOOGLE_RELEASES:
        return GOOGLE_RELEASES[name]
    near = difflib.get_close_matches(name, GOOGLE_RELEASES, n=3) or list(GOOGLE_RELEASES)[:3]
    raise CheckpointError(
        f"{spec} is neither an existing path nor a Google release; similar releases are {', '.join(near)}"
    )


def _is_kept_in(place: Path, cache: Path | None) -> bool:
    """Whether ``place`` is a folder of ``cache`` without an unpacked checkpoint."""
    if not place.is_dir() or any(place.glob("*.index")):
        return False
    return place.resolve().parent == (cache or default_cache()).resolve()


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/efficientdet-porting``, else ``~/.cache/efficientdet-porting``.

    Raises :class:`EfficientDetError` if there is no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the XDG specification says to ignore relative paths
        return Path(given) / CACHE_FOLDER
    try:
        return Path.home() / ".cache" / CACHE_FOLDER
    except RuntimeError:
        raise EfficientDetError(
            "there is no home folder to store downloads in; give --cache-dir FOLDER"
        ) from None


def fetch(release: GoogleRelease, cache: Path | None = None, listener: Listener | None = None) -> Path:
    """The path of the archive of ``release`` in ``cache`` (by default :func:`default_cache`).

    It is downloaded if it is not there. Raises :class:`~porting.errors.CheckpointError` if that fails, with
    instructions to do it by hand, and :class:`~porting.errors.OutputError` if the cache cannot be written.
    """
    target = release.cached_at(cache or default_cache())
    advice = (
        f"fetch {release.url} by hand and put it at {target}, or try --ckpt synthetic:{release.model}, "
        "which needs no download"
    )
    download(release.url, target, advice, listener)
    return target
