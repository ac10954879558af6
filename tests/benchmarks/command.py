"""The command line of a benchmark: ``python -m tests.benchmarks.NAME [--rounds N] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ssl_pipeline.config.base import UserError
from ssl_pipeline.config.command import exit_with_error
from ssl_pipeline.logging.progress import print_table


def run(measure: Callable[[int], dict[str, float]], description: str | None) -> None:
    """Measures, prints a table and, with ``--json``, writes the metrics as one flat object.

    Args:
        measure: returns metrics by name, given the number of alternating repetitions whose median it takes.
        description: the benchmark's docstring; its first line heads the table.
    """
    title = str(description).splitlines()[0]
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path, help="also write the metrics as one flat object")
    parser.add_argument("--rounds", type=int, default=5, help="alternating repetitions; medians are reported")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {str(options.json.parent)!r}")
    try:
        metrics = measure(options.rounds)
    except UserError as error:
        exit_with_error(error)
    rows = [[name, f"{v:,.3f}" if abs(v) >= 0.001 or v == 0 else f"{v:.1e}"] for name, v in metrics.items()]
    print_table(title, ["metric", "value"], rows)
    if options.json is not None:
        options.json.write_text(json.dumps(metrics, indent=1) + "\n")
        sys.stdout.write(f"wrote {options.json}\n")
