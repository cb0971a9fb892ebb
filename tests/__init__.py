"""Tests mirror the package; `support` holds what they share. The environment is set before torch is imported."""

import gc
import os

# Looking for garbage among a million objects of the libraries is a twentieth of the tests' time.
gc.set_threshold(100_000, 50, 50)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Golden values and bitwise equality are a CPU's, whatever else a machine has.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Models this small are fastest on one thread, and processes that are compared bit for bit must not differ in it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from lcmdistill.utils.logging import configure_console  # noqa: E402

configure_console()
