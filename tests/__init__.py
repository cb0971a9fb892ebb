"""Tests mirror the package; `support` holds what they share. The environment is set before torch is imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Golden values and bitwise equality are a CPU's, whatever else a machine has.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Models this small are fastest on one thread, and processes that are compared bit for bit must not differ in it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from lcmdistill.utils.logging import configure_console
from lcmdistill.utils.runtime import collect_garbage_rarely

configure_console()
collect_garbage_rarely()  # a twentieth of the tests' time
