"""Count parameters and multiply-adds of every model, and compare them with AutoML and the paper."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from porting.cli.process import EXIT_CODES
from pytorch_model.config import MODELS, model_config

EPILOG = f"""
examples:
  # all 15 models
  python tools/audit.py
  # two of them, for a script
  python tools/audit.py --models efficientdet-d0,efficientdet-d7x --json
  # the table of the 26 released checkpoints, in Markdown
  python tools/audit.py --markdown

A parameter count that does not round to the published figure is a failed check. Multiply-adds are shown next
to the paper's but not judged: ours count convolutions only, the paper's every operation.

{EXIT_CODES}
"""


@dataclass(frozen=True)
class AuditOptions:
    """``models``: names from ``MODELS``. ``markdown``: print the table of releases instead."""

    models: tuple[str, ...]
    markdown: bool
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="all", help="all, or names separated by commas (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the figures as JSON on stdout")
    form.add_argument("--markdown", action="store_true", help="print the table of releases in Markdown")


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> AuditOptions:
    """Raises :class:`ConfigError` for an unknown model."""
    if arguments.markdown and arguments.models != "all":
        parser.error("--markdown is the table of all releases; leave out --models")
    names = MODELS if arguments.models == "all" else arguments.models.split(",")
    full = ("efficientdet-" + re.sub("^efficientdet[-_]", "", name.strip().lower()) for name in names)
    models = tuple(model_config(name).name for name in full)
    return AuditOptions(models, arguments.markdown, arguments.json)
