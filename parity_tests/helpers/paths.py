"""Folders: the clone, its tools, its goldens, and the recordings next to it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
GOLDENS = ROOT / "parity_tests" / "goldens"
SHARED = ROOT.parent / "shared"
