"""The checksum of TensorFlow's files: in a checkpoint's tables and tensors, and in TFRecords."""

from __future__ import annotations

import google_crc32c
import numpy as np


def masked_crc32c(data: bytes | bytearray | memoryview | np.ndarray) -> int:
    """LevelDB's masked CRC32C, for data that itself holds CRCs: rotated by 15 bits, plus a constant."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
