"""The 26 checkpoints Google released: where they lie, what AP was published, how to get one by name."""

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
#: Environment variable with another base address, for a mirror.
BASE_URL_VARIABLE = "EFFICIENTDET_RELEASES_URL"

CACHE_FOLDER = "efficientdet-porting"


@dataclass(frozen=True)
class Release:
    """One released checkpoint. APs are COCO's, in percent, as published; None where nothing was.

    ``ap_val`` is on val2017; ``ap_test_dev``, ``ap50`` and ``ap75`` are on test-dev; ``ap_int8`` is of the
    quantised TFLite file. ``parameters`` (millions) and ``flops`` (billions of multiply-adds) are as printed.
    """

    name: str
    path: str  # below the base address
    ap_val: float | None = None
    ap_test_dev: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_int8: float | None = None
    parameters: str | None = None
    flops: str | None = None

    @property
    def model(self) -> str:
        """The variant it is a checkpoint of: ``efficientdet-d2`` for ``efficientdet-d2-640``."""
        return re.sub(r"-(640|advprop)$", "", self.name)

    @property
    def url(self) -> str:
        """Raises :class:`EfficientDetError` where the environment names a base that is no web address."""
        base = os.environ.get(BASE_URL_VARIABLE) or BASE_URL
        if not base.startswith(("https://", "http://")):
            raise EfficientDetError(
                f"{BASE_URL_VARIABLE} is {base!r}, must begin with https:// or http://; correct or unset it"
            )
        return f"{base.rstrip('/')}/{self.path}"

    def cached_at(self, cache: Path) -> Path:
        """Its file in ``cache``. The name leads the path twice: what weights cannot tell is read off it."""
        suffix = ".tgz" if self.path.endswith(".tgz") else ".tar.gz"
        return cache / self.name / (self.name + suffix)


# name, AP val, AP test-dev, AP50, AP75, parameters, multiply-adds (AutoML's README)
_COCO = (
    ("d0", 34.3, 34.6, 53.0, 37.1, "3.9", "2.54"),
    ("d1", 40.2, 40.5, 59.1, 43.7, "6.6", "6.10"),
    ("d2", 43.5, 43.9, 62.7, 47.6, "8.1", "11.0"),
    ("d3", 46.8, 47.2, 65.9, 51.2, "12.0", "24.9"),
    ("d4", 49.3, 49.7, 68.4, 53.9, "20.7", "55.2"),
    ("d5", 51.2, 51.5, 70.5, 56.1, "33.7", "130"),
    ("d6", 52.1, 52.6, 71.5, 57.2, "51.9", "226"),
    ("d7", 53.4, 53.7, 72.4, 58.4, "51.9", "325"),
    ("d7x", 54.4, 55.1, 74.3, 59.9, "77.0", "410"),
)
# name, AP test-dev: trained at 640×640 whatever the variant's own size
_COCO_640 = (("d2", 41.7), ("d3", 44.0), ("d4", 45.7), ("d5", 46.6), ("d6", 47.9))
# name, AP val of the float model, of the int8 one, parameters
_LITE = (
    ("lite0", 26.41, 26.1, "3.2"),
    ("lite1", 31.5, 31.12, "4.2"),
    ("lite2", 35.06, 34.69, "5.3"),
    ("lite3", 38.77, 38.42, "8.4"),
    ("lite3x", 42.64, 41.87, "9.3"),
    ("lite4", 43.18, 42.83, "15.1"),
)
# name, AP val, AP test-dev, parameters, multiply-adds (AutoML's Det-AdvProp page; input range [-1, 1])
_ADVPROP = (
    ("d0", 35.1, 35.3, "3.9", "2.54"),
    ("d1", 40.8, 40.9, "6.6", "6.10"),
    ("d2", 44.3, 44.3, "8.1", "11.0"),
    ("d3", 47.7, 48.0, "12.0", "24.9"),
    ("d4", 50.4, 50.4, "20.7", "55.2"),
    ("d5", 52.2, 52.5, "33.7", "130"),
)


def _table() -> dict[str, Release]:
    releases = []
    for name, val, test, ap50, ap75, parameters, flops in _COCO:
        path = f"coco2/efficientdet-{name}.tar.gz"
        releases.append(
            Release(
                f"efficientdet-{name}",
                path,
                ap_val=val,
                ap_test_dev=test,
                ap50=ap50,
                ap75=ap75,
                parameters=parameters,
                flops=flops,
            )
        )
    for name, test in _COCO_640:
        path = f"coco640/efficientdet-{name}-640.tar.gz"
        releases.append(Release(f"efficientdet-{name}-640", path, ap_test_dev=test))
    for name, val, int8, parameters in _LITE:
        path = f"coco/efficientdet-{name}.tgz"
        releases.append(
            Release(f"efficientdet-{name}", path, ap_val=val, ap_int8=int8, parameters=parameters)
        )
    for name, val, test, parameters, flops in _ADVPROP:
        path = f"advprop/efficientdet-{name}.tar.gz"
        releases.append(
            Release(
                f"efficientdet-{name}-advprop",
                path,
                ap_val=val,
                ap_test_dev=test,
                parameters=parameters,
                flops=flops,
            )
        )
    return {release.name: release for release in releases}


RELEASES: Mapping[str, Release] = _table()


def release_named(spec: str, cache: Path | None = None) -> Release | None:
    """The release that ``spec`` names, ``efficientdet-d0`` or ``efficientdet_d0``; None if it is a path.

    What lies under that name here goes first, unless it is the folder in ``cache`` (see :func:`fetch`) that
    the release is kept in. Raises :class:`~porting.errors.CheckpointError` for what looks
    like a release's name, and is neither one nor there.
    """
    name = spec.lower().replace("_", "-")
    if not re.fullmatch(r"efficientdet-[a-z0-9-]{1,40}", name):
        return None
    if Path(f"{spec}.index").exists() or (Path(spec).exists() and not _is_kept_in(Path(spec), cache)):
        return None
    if name in RELEASES:
        return RELEASES[name]
    near = difflib.get_close_matches(name, RELEASES, n=3) or list(RELEASES)[:3]
    raise CheckpointError(
        f"{spec} is neither here nor a release of Google's; the nearest releases are {', '.join(near)}"
    )


def _is_kept_in(place: Path, cache: Path | None) -> bool:
    """Whether ``place`` is a folder of ``cache``, and no checkpoint was unpacked there."""
    if not place.is_dir() or any(place.glob("*.index")):
        return False
    return place.resolve().parent == (cache or default_cache()).resolve()


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/efficientdet-porting``, else ``~/.cache/efficientdet-porting``.

    Raises :class:`EfficientDetError` where there is no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the XDG specification has relative ones ignored
        return Path(given) / CACHE_FOLDER
    try:
        return Path.home() / ".cache" / CACHE_FOLDER
    except RuntimeError:
        raise EfficientDetError(
            "there is no home folder to keep downloads in; say --cache-dir FOLDER"
        ) from None


def fetch(release: Release, cache: Path | None = None, listener: Listener | None = None) -> Path:
    """The archive of ``release``, from ``cache`` or else from the web; by default :func:`default_cache`.

    Raises :class:`~porting.errors.CheckpointError` where it cannot be had, with what to do by hand, and
    :class:`~porting.errors.OutputError` where the cache cannot be written.
    """
    target = release.cached_at(cache or default_cache())
    advice = (
        f"fetch {release.url} by hand and put it at {target}, or try --ckpt synthetic:{release.model}, "
        "which needs no download"
    )
    download(release.url, target, advice, listener)
    return target
