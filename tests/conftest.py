"""What the tests share: one thread, so that bits do not depend on the machine's load, and tiny runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
