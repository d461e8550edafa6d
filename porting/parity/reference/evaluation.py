"""A TensorFlow reference for an evaluation: a network that gets the same input as ours."""

from __future__ import annotations

from pathlib import Path

from porting.convert import Conversion
from porting.errors import ConfigError
from porting.parity.reference.choose import FileReference
from porting.parity.reference.networks import file_network, ops_network
from pytorch_model.detection.detector import Detector
from pytorch_model.evaluation.run import ReferenceNetwork
from pytorch_model.files import sha256_of_file


def reference_network(
    kind: str, conversion: Conversion, reference: FileReference | None, detector: Detector
) -> ReferenceNetwork:
    """The reference of ``kind`` for ``detector``: a file, or AutoML's network in plain operations if None.

    ``conversion``: of the checkpoint that the reference's values come from, for the detector's configuration.
    Imports TensorFlow. Raises :class:`ConfigError` if the file takes images of another size.
    """
    config = detector.model.config
    if reference is None:
        return ReferenceNetwork(kind, ops_network(conversion.variables, config), [conversion.digest])
    if reference.size not in (None, detector.image_size):
        height, width = reference.size
        raise ConfigError(
            f"{reference.source} takes images of {height}×{width}; give --hparams "
            f"image_size={width}x{height} to run both at that size"
        )
    digests = [conversion.digest, *map(sha256_of_file, _files_of(Path(reference.source)))]
    return ReferenceNetwork(kind, file_network(reference, config), digests, reference.exact)


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
