"""A side in a process of its own, as the process sees it that measures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from porting.bench.measure import PACKAGES
from porting.bench.sides.process import Job

#: Seconds before a run in which the threads of the side before it go to sleep.
PAUSE = 0.05

_CODE = (
    f"import sys; sys.path.insert(0, {str(PACKAGES)!r}); from porting.bench.sides.process import main; main()"
)


class Worker:
    """Starts the process and makes the side. ``problem``: why it cannot go on; then every answer is empty.

    ``load_seconds``: how long it took to make the side, from weights in memory, packages imported.
    """

    def __init__(self, job: Job) -> None:
        self.problem: str | None = None
        threads = str(job.threads)
        # TensorFlow as its users have it; the commands of this project turn oneDNN off.
        env = {**os.environ, "OMP_NUM_THREADS": threads, "TF_ENABLE_ONEDNN_OPTS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        try:
            self.load_seconds = self._ask(dataclasses.asdict(job)).get("load_seconds", math.nan)
        except BaseException:  # Ctrl-C: nobody else knows of the process yet
            self.close()
            raise

    def batch(self, count: int) -> dict[str, Any]:
        """Take a batch of ``count`` images: ``first_seconds`` of the first run on it, ``relative_error``."""
        return self._ask({"batch": count})

    def run(self) -> float:
        """The seconds of one run; NaN if the side cannot go on."""
        time.sleep(PAUSE)
        return float(self._ask({"run": True}).get("seconds", math.nan))

    def memory(self) -> dict[str, Any]:
        """``peak_megabytes`` of the whole process; ``device_megabytes`` that it takes of a GPU. Or None."""
        return self._ask({"memory": True})

    def close(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # a question that a dead process did not read
                stream.close()
        self._process.wait()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self.problem is not None:
            return {}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"problem": self._how_it_ended()}
        self.problem = answer.get("problem")
        return {} if self.problem is not None else answer

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"its process ended ({how}); it may have run out of memory"
