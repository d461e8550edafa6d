#!/usr/bin/env python3
"""COCO's figures of a weight file, next to those of a TensorFlow reference that gets the same input."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from porting.cli.main import run_command

if __name__ == "__main__":
    run_command("eval")
