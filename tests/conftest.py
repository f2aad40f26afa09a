"""Tests import the modules from the repository's root, wherever pytest is started."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
