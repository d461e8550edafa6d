"""Import this before anything that computes: one thread, the same bytes.

Threads share a sum out in another way when their number changes, and its last digits change with it.
"""

from __future__ import annotations

import os

for _variable in (
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
):
    os.environ[_variable] = "1"
