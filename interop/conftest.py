"""Lets the tests here import the package ``interop`` whatever directory pytest starts in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
