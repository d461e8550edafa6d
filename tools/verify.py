#!/usr/bin/env python3
"""Prove that PyTorch weights are an AutoML checkpoint's function, layer by layer, or show where not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from porting.cli.main import run_command

if __name__ == "__main__":
    run_command("verify")
