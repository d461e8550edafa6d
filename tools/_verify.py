"""The proof, for tools that are not in the command-line package yet."""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console

from porting.checkpoint import Checkpoint
from porting.cli.drawing.proof import ProofLines, print_verdict
from porting.convert import Conversion
from porting.parity import Proof, prove
from porting.parity.inputs import seeded_images as synthetic_input
from porting.parity.inputs import verification_size as picture_size
from porting.parity.lockstep import Observer
from porting.parity.reference.choose import FileReference, choose_reference, require_tensorflow

__all__ = ["chosen_reference", "picture_size", "require_tensorflow", "synthetic_input", "verify"]


def chosen_reference(
    arguments: argparse.Namespace, checkpoint: Checkpoint, conversion: Conversion
) -> FileReference | None:
    return choose_reference(arguments.reference, arguments.graph, checkpoint, conversion)


def verify(
    console: Console, conversion: Conversion, images: np.ndarray, observe: Observer | None = None
) -> Proof:
    with ProofLines(console) as lines:
        proof = prove(conversion, images, None, lines, observe=observe)
    print_verdict(console, proof)
    return proof
