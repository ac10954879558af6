"""What the tests share: one thread, so that bits do not depend on the machine's load, and tiny runs."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)
