"""Run the tools as a user does, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from parity_tests.helpers.paths import TOOLS


def run_tool(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python tools/NAME.py arguments…`` in the folder ``cwd``; what it prints is 150 columns wide."""
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "150"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


def verify(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_tool("verify", *arguments, cwd=cwd)
