"""Read a video file as numbered frames, and write frames as a video file, by PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pytorch_model.detection.preprocess import MOST_PIXELS, ImageError
from pytorch_model.errors import OutputError
from pytorch_model.files import check_regular

SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
# FFmpeg's names of the containers that have these suffixes. Others are left out, above all playlists, which
# open other files. "m4v", "h264" and "hevc" are streams without a container.
CONTAINERS = ("mov", "avi", "matroska", "mpeg", "mpegts", "mpegvideo", "m4v", "h264", "hevc", "flv", "asf")
CURE = "fetch the file again, or convert it to MP4"
CODECS = ("libx264", "mpeg4")  # the first that this FFmpeg can write


class Frame(NamedTuple):
    number: int  # from 0
    time: float  # seconds from the start of the video's clock
    pixels: Tensor  # uint8 [3, h, w], RGB, upright


class VideoReader:
    """The frames of a video file, upright, in order of presentation.

    Raises :class:`ImageError` if PyAV is not installed or the file is not a video. Iteration raises it at the
    frame where the file stops being readable.
    """

    def __init__(self, path: Path) -> None:
        self._av = _pyav()
        self.path = path
        with ExitStack() as opened:
            try:
                check_regular(path)
                # FFmpeg gets the opened file, not its name, which it might interpret as an address.
                file = opened.enter_context(path.open("rb"))
                self._container = opened.enter_context(
                    self._av.open(
                        file,
                        **_replacing_metadata(self._av),
                        options={"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"},
                    )
                )
            except self._av.ArgumentError:  # raised for a format that is not on the list
                raise ImageError(
                    f"{path} is not a video in an MP4, MOV, AVI, Matroska, WebM, MPEG, FLV or ASF file; "
                    f"{CURE}"
                ) from None
            except (self._av.FFmpegError, OSError) as error:
                raise ImageError(f"{path} is not a readable video: {_reason(error)}; {CURE}") from None
            if not self._container.streams.video:
                raise ImageError(f"{path} has no video stream, only sound or text; give a video")
            self._opened = opened.pop_all()
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or Fraction(25)
        self.time_base = self._stream.time_base or 1 / self.rate
        self.count: int | None = self._stream.frames or None  # if the file states it

    def __iter__(self) -> Iterator[Frame]:
        number = 0
        try:
            for frame in self._container.decode(self._stream):
                if frame.width * frame.height > MOST_PIXELS:
                    raise ImageError(
                        f"frame {number} has {frame.width}×{frame.height}, more than {MOST_PIXELS:,} pixels; "
                        "make the video smaller first"
                    )
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                time = frame.time if frame.time is not None else float(number / self.rate)
                yield Frame(number, time, torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous())
                number += 1
        except (self._av.FFmpegError, OSError) as error:
            where = f"not readable after frame {number - 1}" if number else "no frame is readable"
            raise ImageError(f"{where}: {_reason(error)}; {CURE}") from None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


class VideoWriter:
    """A video file of frames at given times, without sound; H.264 if FFmpeg can write it.

    Raises :class:`OutputError` if FFmpeg or the disk cannot write it.
    """

    def __init__(self, path: Path, rate: Fraction, time_base: Fraction) -> None:
        self._av = _pyav()
        self.path = path
        self.time_base = time_base
        codec = next((name for name in CODECS if name in self._av.codecs_available), CODECS[-1])
        try:
            self._container = self._av.open(
                f"file:{path}", "w"
            )  # without "file:", 12:30.mp4 would be an address
            self._stream = self._container.add_stream(codec, rate=rate)
        except ValueError as error:  # raised for a codec that this FFmpeg lacks
            raise OutputError(
                f"cannot write the video {path.name}: no codec {error}; install PyAV by `pip install av`"
            ) from None
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = time_base
        self._size: tuple[int, int] | None = None

    def add(self, image: np.ndarray, time: float) -> None:
        """Add a frame, shown from ``time`` in seconds.

        ``image``: uint8 [h, w, 3], RGB. An odd side loses its last row or column: the format needs even ones.
        """
        height, width = (side - side % 2 for side in image.shape[:2])
        if self._size is None:
            self._size = self._stream.height, self._stream.width = height, width
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), "rgb24")
        if (height, width) != self._size:
            frame = frame.reformat(width=self._size[1], height=self._size[0])
        frame.pts, frame.time_base = round(time / self.time_base), self.time_base
        self._mux(frame)

    def close(self) -> None:
        """Finish the file."""
        if self._size is not None:
            self._mux(None)
        try:
            self._container.close()
        except (self._av.FFmpegError, OSError) as error:
            raise self._write_error(error) from None

    def _mux(self, frame: Any) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except (self._av.FFmpegError, OSError) as error:
            raise self._write_error(error) from None

    def _write_error(self, error: Any) -> OutputError:
        return OutputError(
            f"cannot write the video {self.path.name}: {_reason(error)}; free some space or choose "
            "another --out"
        )


def _replacing_metadata(av: Any) -> dict[str, str]:
    """Titles are not used, so bytes in them that are not text must not matter; PyAV before 19 needs this."""
    return {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def is_video(path: Path) -> bool:
    """Whether ``path`` has the name of a video and is not a folder."""
    return path.suffix.lower() in SUFFIXES and not os.path.isdir(path)


def _reason(error: Any) -> str:
    return " ".join(str(error.strerror or error).split())


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise ImageError("reading a video needs PyAV, which is not installed: pip install av") from None
    return av
