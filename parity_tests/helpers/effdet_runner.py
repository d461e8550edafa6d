"""Run effdet's models in a separate process: ``python effdet_runner.py JOBS.json``, with PYTORCH_JIT=0.

A job has a recipe (the statements that tools/export.py prints), images (.npy, NCHW,
of the type to run in) and out (.npz).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from porting.bench.sides.torchvision import stand_in_for_torchvision


def main() -> None:
    stand_in_for_torchvision()
    import effdet
    import numpy as np
    import torch

    for job in json.loads(Path(sys.argv[1]).read_text()):
        images = torch.from_numpy(np.load(job["images"]))
        torch.set_default_dtype(images.dtype)
        names: dict[str, Any] = {"effdet": effdet, "torch": torch}
        exec("\n".join(job["recipe"]), names)
        with torch.no_grad():
            class_outputs, box_outputs = names["model"](images)
        arrays = [output.numpy() for output in class_outputs + box_outputs]
        np.savez(job["out"], **{str(i): array for i, array in enumerate(arrays)})


if __name__ == "__main__":
    main()
