"""What the tests share: one thread, so that bits do not depend on the machine's load, and tiny runs."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too; read when torch is imported

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_configure() -> None:
    # A shell ignores Ctrl-C in what it starts in the background, and so would all processes started from here.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is kept for a user goes to a folder of its own, for the processes that tests start too."""
    place = tmp_path_factory.mktemp("cache")
    before = os.environ.get("SSL_PIPELINE_CACHE")
    os.environ["SSL_PIPELINE_CACHE"] = str(place)
    yield place
    if before is None:
        del os.environ["SSL_PIPELINE_CACHE"]
    else:
        os.environ["SSL_PIPELINE_CACHE"] = before
