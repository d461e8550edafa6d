"""tools/detect.py on a video: frames in order, at their times, drawn and listed."""

from __future__ import annotations

import csv
import itertools
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.helpers.paths import ROOT
from porting.cli import process
from porting.cli.main import execute
from porting.errors import OutputError
from porting.synthetic import synthetic_image
from pytorch_model.detection import video as video_module
from pytorch_model.detection.preprocess import ImageError

pytest.importorskip("PIL.Image", reason="needs Pillow")
av = pytest.importorskip("av", reason="needs PyAV: pip install -e '.[video]'")

RATE = Fraction(10)
COUNT = 7


def shade(number: int) -> int:
    return 20 + 30 * number


def write_clip(path: Path, size: tuple[int, int] = (64, 96), rotation: int = 0) -> Path:
    """A clip whose frame n is grey with level 20 + 30 n, its top left corner white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(COUNT):
            picture = np.full((*size, 3), shade(number), np.uint8)
            picture[:16, :16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    return path


def run(weights: Path, video: Path, out: Path, *more: str) -> int | str | None:
    arguments = ["--weights", str(weights), "--images", str(video), "--out", str(out), *more]
    with pytest.raises(SystemExit) as caught:
        process.run(lambda: execute("detect", arguments))
    return caught.value.code


def test_every_frame_in_order_at_its_time(tmp_path: Path) -> None:
    with video_module.VideoReader(write_clip(tmp_path / "clip.mp4")) as reader:
        frames = list(reader)
    assert [frame.number for frame in frames] == list(range(COUNT))
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(COUNT)])
    for frame in frames:
        assert frame.pixels.shape == (3, 64, 96)
        assert float(frame.pixels[:, 32:, 32:].float().mean()) == pytest.approx(shade(frame.number), abs=4)


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (-90, (0, 1))])
def test_frames_are_upright(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    """A rotation by ``rotation`` degrees counterclockwise moves the white corner."""
    path = tmp_path / "clip.mp4"
    try:
        write_clip(path, rotation=rotation)
    except AttributeError:
        pytest.skip("this PyAV cannot write a rotation")
    with video_module.VideoReader(path) as reader:
        pixels = next(iter(reader)).pixels
    assert pixels.shape == ((3, 96, 64) if rotation % 180 else (3, 64, 96))
    corners = {
        (i, j): float(pixels[:, -i * 12 :, -j * 12 :][:, :12, :12].float().mean())
        for i in (0, 1)
        for j in (0, 1)
    }
    assert max(corners, key=lambda key: corners[key]) == corner


def test_detections_by_frame_and_the_drawn_video(
    small_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, out = write_clip(tmp_path / "clip.avi", (63 + 1, 96)), tmp_path / "out"
    assert run(small_weights, video, out, "--score-threshold", "0", "--batch-size", "3") == 0
    assert {file.name for file in out.iterdir()} == {
        "clip.mp4",
        "detections.csv",
        "detections.json",
        "summary.json",
    }
    rows = json.loads((out / "detections.json").read_text())
    assert len(rows) == 100 * COUNT
    assert sorted({row["frame"] for row in rows}) == list(range(COUNT))
    assert all(row["time"] == pytest.approx(row["frame"] / 10) for row in rows)
    assert set(rows[0]) == {"frame", "time", "category_id", "bbox", "score"}
    with (out / "detections.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["score"]) for row in table] == [row["score"] for row in rows]
    assert list(table[0])[:2] == ["frame", "time"]
    with video_module.VideoReader(out / "clip.mp4") as drawn, video_module.VideoReader(video) as original:
        pairs = list(zip(drawn, original, strict=True))
    assert len(pairs) == COUNT
    for ours, theirs in pairs:
        assert ours.time == pytest.approx(theirs.time, abs=1e-3)
        assert ours.pixels.shape == theirs.pixels.shape
        assert (ours.pixels.int() - theirs.pixels.int()).abs().max() > 50  # boxes
    assert "frames" in capsys.readouterr().out


def test_times_need_not_be_even(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.5, 0.6]
    writer = video_module.VideoWriter(tmp_path / "out.mp4", RATE, Fraction(1, 1000))
    for time in times:
        writer.add(synthetic_image(65, 97), time)
    writer.close()
    with video_module.VideoReader(tmp_path / "out.mp4") as reader:
        frames = list(reader)
    assert [frame.time for frame in frames] == pytest.approx(times, abs=1e-3)
    assert frames[0].pixels.shape == (3, 64, 96)


def test_a_video_that_breaks_off(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The readable frames are processed; exit status 1 and a note report the rest."""
    whole = video_module.VideoReader.__iter__

    def broken(self: video_module.VideoReader):  # type: ignore[no-untyped-def]
        for frame in whole(self):
            if frame.number == 4:
                raise ImageError("not readable after frame 3: invalid data")
            yield frame

    monkeypatch.setattr(video_module.VideoReader, "__iter__", broken)
    video, out = write_clip(tmp_path / "clip.mp4"), tmp_path / "out"
    assert run(small_weights, video, out) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert [frame["frame"] for frame in summary["images"]] == [0, 1, 2, 3]
    assert "after frame 3" in summary["unreadable"][str(video)]
    with video_module.VideoReader(out / "clip.mp4") as reader:
        assert len(list(reader)) == 4


def test_a_lost_last_frame_is_mentioned(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file states its frames; the decoder gives one less, and no error."""
    video = write_clip(tmp_path / "clip.mp4")
    assert run(small_weights, video, tmp_path / "whole") == 0
    assert json.loads((tmp_path / "whole/summary.json").read_text())["notes"] == []
    whole = video_module.VideoReader.__iter__
    monkeypatch.setattr(
        video_module.VideoReader, "__iter__", lambda self: itertools.islice(whole(self), COUNT - 1)
    )
    assert run(small_weights, video, tmp_path / "out") == 0
    (note,) = json.loads((tmp_path / "out/summary.json").read_text())["notes"]
    assert f"clip.mp4 states {COUNT} frames, {COUNT - 1} could be decoded" in note
    assert f"states {COUNT} frames" in capsys.readouterr().out


def test_a_frame_that_cannot_be_decoded(tmp_path: Path) -> None:
    class Damaged:
        def __init__(self, container: Any) -> None:
            self.container = container
            self.close = container.close

        def decode(self, stream: Any) -> Any:
            yield from itertools.islice(self.container.decode(stream), 3)
            raise av.error.InvalidDataError(1, "Invalid data found")

    with video_module.VideoReader(write_clip(tmp_path / "clip.mp4")) as reader:
        reader._container = Damaged(reader._container)
        frames = iter(reader)
        assert [next(frames).number for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ImageError, match="not readable after frame 2: Invalid data found"):
            next(frames)


def test_frames_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_module, "MOST_PIXELS", 64 * 96 - 1)
    with (
        video_module.VideoReader(write_clip(tmp_path / "clip.mp4")) as reader,
        pytest.raises(ImageError, match="frame 0 has 96×64, more than 6,143 pixels; make the video smaller"),
    ):
        next(iter(reader))


def test_sound_is_not_a_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ImageError, match="has no video stream, only sound or text; give a video"):
        video_module.VideoReader(tmp_path / "sound.mp4")


SAMPLES = [
    *(("clip" + suffix, "mpeg4", "mov") for suffix in (".mp4", ".mov", ".m4v")),
    ("clip.avi", "mpeg4", "avi"),
    ("clip.mkv", "mpeg4", "matroska"),
    ("clip.webm", "libvpx", "matroska"),
    *(("clip" + suffix, "mpeg2video", "mpeg") for suffix in (".mpg", ".mpeg")),
    ("clip.ts", "mpeg2video", "mpegts"),
    ("clip.m2v", "mpeg2video", "mpegvideo"),
    ("bare.m4v", "mpeg4", "m4v"),
    ("bare.mp4", "libx264", "h264"),
    ("bare.mov", "libx265", "hevc"),
    ("flash.mp4", "flv", "flv"),
    ("windows.avi", "wmv2", "asf"),
]


@pytest.mark.parametrize(("name", "codec", "container"), SAMPLES)
def test_every_container_is_read(tmp_path: Path, name: str, codec: str, container: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    by_name = Path(name).stem == "clip"
    with av.open(str(tmp_path / name), "w", format=None if by_name else container) as written:
        stream = written.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for _ in range(COUNT):
            written.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), "rgb24")))
        written.mux(stream.encode(None))
    with video_module.VideoReader(tmp_path / name) as reader:
        assert len(list(reader)) == COUNT
        assert container in reader._container.format.name.split(",")


def test_every_container_and_suffix_is_tried() -> None:
    assert {container for _, _, container in SAMPLES} == set(video_module.CONTAINERS)
    assert {Path(name).suffix for name, _, _ in SAMPLES} >= set(video_module.SUFFIXES)


@pytest.mark.parametrize("name", ["12:30.mp4", "concat:clip.mp4", "a%03d.mp4"])
def test_a_name_is_not_an_address(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Read from and written to the working folder, so no folder precedes the name."""
    (tmp_path / "in").mkdir()
    (tmp_path / "12:30").mkdir()
    write_clip(tmp_path / "in/clip.mp4").rename(tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path / "in")
    assert run(small_weights, Path(name), Path("..")) == 0
    monkeypatch.chdir(tmp_path)
    assert run(small_weights, Path("in") / name, Path("12:30")) == 0
    for folder in (tmp_path, tmp_path / "12:30"):
        with av.open(f"file:{folder / name}") as container:
            assert container.streams.video[0].frames == COUNT


PLAYLISTS = [
    "ffconcat version 1.0\nfile clip.mp4\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nclip.mp4\n#EXT-X-ENDLIST\n",
]


@pytest.mark.parametrize("content", PLAYLISTS)
def test_playlists_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    write_clip(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    Path("list.mp4").write_text(content)
    with pytest.raises(ImageError, match=r"list\.mp4 is not a.* video.*; fetch the file again"):
        video_module.VideoReader(Path("list.mp4"))
    # Even if playlists were among the containers, the files they name would not be opened.
    monkeypatch.setattr(video_module, "CONTAINERS", (*video_module.CONTAINERS, "concat", "hls"))
    with pytest.raises(ImageError, match=r"list\.mp4 is not a.* video.*; fetch the file again"):
        video_module.VideoReader(Path("list.mp4"))


def test_other_formats_are_not_videos(tmp_path: Path) -> None:
    """FFmpeg knows hundreds, animated GIFs among them."""
    from PIL import Image

    frames = [Image.fromarray(synthetic_image(40, 50)), Image.new("RGB", (50, 40))]
    frames[0].save(tmp_path / "a.mp4", "GIF", save_all=True, append_images=frames[1:])
    containers = "MP4, MOV, AVI, Matroska, WebM, MPEG, FLV or ASF"
    message = rf"a\.mp4 is not a video in an {containers} file; fetch the file again"
    with pytest.raises(ImageError, match=message):
        video_module.VideoReader(tmp_path / "a.mp4")


def test_a_pipe_or_a_folder_is_not_a_video(small_weights: Path, tmp_path: Path, pipe: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(pipe)
    with pytest.raises(ImageError, match=r"link\.mp4 is not a readable video: it is a pipe or a device"):
        video_module.VideoReader(tmp_path / "link.mp4")
    (tmp_path / "clips.mp4").mkdir()
    write_image(tmp_path / "clips.mp4/1.png")
    assert run(small_weights, tmp_path / "clips.mp4", tmp_path / "out") == 0
    assert (tmp_path / "out/1.png").exists()


def write_image(path: Path) -> None:
    from PIL import Image

    Image.fromarray(synthetic_image(40, 50)).save(path)


@pytest.mark.parametrize("readable", [0, 3])
def test_a_disk_that_fails(tmp_path: Path, readable: int) -> None:
    """A read error is reported like a decoding error."""

    class Failing:
        def decode(self, stream: Any) -> Any:
            yield from itertools.islice(container.decode(stream), readable)
            raise OSError(5, "Input/output error")

    with video_module.VideoReader(write_clip(tmp_path / "clip.mp4")) as reader:
        container, reader._container = reader._container, Failing()
        message = f"not readable after frame {readable - 1}" if readable else "no frame is readable"
        with pytest.raises(ImageError, match=f"{message}: Input/output error; fetch the file again"):
            list(reader)


def write_to(path: Path) -> None:
    writer = video_module.VideoWriter(path, RATE, 1 / RATE)
    try:
        for number in range(60):
            writer.add(synthetic_image(64, 96), number / 10)
    finally:
        writer.close()


def test_a_video_without_frames(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(video_module.VideoReader, "__iter__", lambda self: iter(()))
    assert run(small_weights, write_clip(tmp_path / "clip.mp4"), tmp_path / "out") == 2
    assert "clip.mp4 has no frames; fetch the file again" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_first_frame_that_cannot_be_used(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(video_module, "MOST_PIXELS", 64 * 96 - 1)
    assert run(small_weights, write_clip(tmp_path / "clip.mp4"), tmp_path / "out") == 2
    assert "clip.mp4: frame 0 has 96×64, more than 6,143 pixels; make the" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_video_that_cannot_be_written(tmp_path: Path) -> None:
    message = r"cannot write the video (out|clip)\.mp4: .*; free some space or choose another --out"
    with pytest.raises(OutputError, match=message):
        write_to(tmp_path / "nowhere/out.mp4")
    clip = tmp_path / "clip.mp4"
    write_to(clip)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from parity_tests.detection.test_video import write_to\n"
        "limit = int(sys.argv[2]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "write_to(Path(sys.argv[1]))"
    )
    for lacking in (1, clip.stat().st_size // 2):  # the end of the file, written when it is closed; frames
        command = [sys.executable, "-c", code, str(clip), str(clip.stat().st_size - lacking)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert re.search(f"OutputError: {message}", done.stderr), done.stderr


def test_a_codec_that_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_module, "CODECS", ("betamax",))
    with pytest.raises(OutputError, match=r"cannot write the video out\.mp4: no codec betamax; install PyAV"):
        write_to(tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_noise_is_not_a_video_and_a_missing_pyav_is_named(
    small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    assert run(small_weights, tmp_path / "noise.mp4", tmp_path / "out") == 2
    assert "noise.mp4 is not a readable video: Invalid data found" in capsys.readouterr().err
    video = write_clip(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(small_weights, video, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "pip install av" in error
    assert len(error.strip().splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())
