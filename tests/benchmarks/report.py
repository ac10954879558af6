"""The report of both stages: how long it takes to build, how large it is, and how soon Chromium paints it.

The runs are those of the quickstart with fewer steps: what the report costs does not hang on the length of a run but on the
images that it shows, and these are the quickstart's. Stage two is a frozen backbone with two seeds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from tests.benchmarks.command import run
from tests.chromium import Chromium, find_chromium

_PANELS = (
    "curves", "stage-two", "temperature", "collapse", "map", "neighbors", "views", "settings", "system",
)  # fmt: skip


def measure(rounds: int) -> dict[str, float]:
    """Makes two short runs, then builds and opens their report."""
    binary = find_chromium()
    if binary is None:
        raise ConfigError(
            "the report benchmark needs Chromium, and none is installed: on Debian, `apt-get install chromium`."
        )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wanted = [
            "recipe=quickstart_pretrain",
            "epochs=2",
            "log_every=1",
            "tracking=off",
            f"output={root / 'pretrain'}",
        ]
        pretrain(load("pretrain", PretrainConfig, wanted))
        wanted = ["regime=frozen", "labels.per_class=10", "seeds=2", "split=val", "tracking=off"]
        where = [f"encoder={root / 'pretrain'}", f"output={root / 'finetune'}"]
        finetune(load("finetune", FinetuneConfig, [*wanted, *where]))
        seconds = [_build(root) for _ in range(rounds)]
        page = root / "report.html"
        with Chromium(binary) as browser:
            paints, panels = list[float](), 0.0
            for _ in range(rounds):
                browser.open(page)
                paints.append(browser.run("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000)
                shown = browser.run("[...document.querySelectorAll('.panel')].map(panel => panel.id)")
                panels = sum(name in shown for name in _PANELS) / len(_PANELS)
            complaints = len(browser.complaints)
        return {
            "report.build_seconds": statistics.median(seconds),
            "report.megabytes": page.stat().st_size / 1e6,
            "report.first_paint_seconds": statistics.median(paints),
            "report.panels_share": panels,
            "report.console_errors": float(complaints),
        }


def _build(root: Path) -> float:
    """The command in a process of its own, its imports included."""
    words = [sys.executable, "-m", "ssl_pipeline.cli", "report", str(root), "--output", str(root / "report.html")]
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the report could not be made: {done.stderr.strip()}")
    return time.perf_counter() - began


if __name__ == "__main__":
    run(measure, __doc__)
