"""The fold: every golden trace as spans, its numbers against the summary's, and each rule by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.export.receiver import assert_trees
