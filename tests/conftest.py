"""Tests import the modules from the repository's root, and open no address of Hugging Face."""

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = map(str, (HERE.parent, HERE, HERE / "core", HERE / "extras"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
# Read when scipy is imported: lets scikit-learn's check of other array types run.
os.environ.setdefault("SCIPY_ARRAY_API", "1")
