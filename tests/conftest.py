"""What the tests share: one thread, so that bits do not depend on the machine's load, and tiny runs."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too; read when torch is imported

import copy
import gc
import signal
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_pipeline.config import compose


def pytest_configure() -> None:
    # A shell ignores Ctrl-C in what it starts in the background, and so would all processes started from here.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _lasting() -> None:
    """The million objects of imports and collected tests need not be searched for garbage after each training loop."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session", autouse=True)
def _composed_once() -> Iterator[None]:
    """Hydra takes a tenth of a second to put our YAML together, which thousands of tests ask for in a few forms."""
    composed = compose.composed
    kept = cache(lambda name, selections, root: composed(name, selections))

    def composed_once(
        name: str, selections: Sequence[str] = (), config_dir: Path | None = None
    ) -> tuple[dict[str, Any], dict[str, str | None]]:
        if config_dir is not None:
            return composed(name, selections, config_dir)
        return copy.deepcopy(kept(name, tuple(selections), compose.config_root()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl_pipeline.config.overrides.composed", composed_once)
        yield
