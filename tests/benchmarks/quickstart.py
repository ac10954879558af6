"""The quickstart as a whole command: its time, its peak memory over all processes, and what it found.

Needs a source tree (``launch/quickstart.sh``) and an environment that is installed already. One round is one whole run, so
``--rounds`` is not obeyed here.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.metrics.interval import paired_difference
from tests.benchmarks.command import run

_GIB = 2**30


def measure(rounds: int) -> dict[str, float]:
    """Runs ``bash launch/quickstart.sh`` and watches it."""
    del rounds
    script = Path(__file__).parents[2] / "launch" / "quickstart.sh"
    if not script.is_file():
        raise ConfigError(
            "the quickstart benchmark needs a source tree: there is no launch/quickstart.sh beside the package."
        )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = subprocess.Popen(["bash", str(script), folder + "/quickstart"])
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise ConfigError(f"the quickstart ended with exit code {process.returncode}; its output is above.")
        study = json.loads((Path(folder) / "quickstart" / "study" / "study.json").read_text())
    accuracy: dict[tuple[str, str], list[float]] = {}
    for row in study["rows"]:
        accuracy.setdefault((row["init"], row["regime"]), []).append(row["figures"]["accuracy"])
    gain, knn = paired_difference(accuracy["pretrained", "lp_ft"], accuracy["random", "scratch"]), study["knn"]
    return {
        "quickstart.seconds": seconds,
        "quickstart.peak_gib": peak / _GIB,
        "quickstart.lp_ft_gain_points": 100 * gain.mean,
        "quickstart.lp_ft_gain_low_points": 100 * gain.low,
        "quickstart.knn_gain_points": 100 * (knn["pretrained"] - knn["random"]),
    }


def _resident(pid: int) -> int:
    """Bytes resident in a process and all below it; pages that they share are counted for each."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:  # it ended between the two calls
            continue
    return total


if __name__ == "__main__":
    run(measure, __doc__)
