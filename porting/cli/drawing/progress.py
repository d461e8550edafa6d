"""A progress bar for work on images."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn


class ImageBar:
    """A :class:`pytorch_model.detection.run.Listener` that draws a bar. ``seconds``: how long it ran."""

    def __init__(self, console: Console, description: str = "detecting") -> None:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(description, total=None)
        self._started = time.perf_counter()
        self.seconds = 0.0

    def progress(self, done: int, total: int | None) -> None:
        self._progress.update(self._task, completed=done, total=total)
        self._progress.start()

    def __enter__(self) -> ImageBar:
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        if self._progress.live.is_started:
            self._progress.stop()
