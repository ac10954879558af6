"""``ssl-pipeline bench NAME``: the measurements that README and docs quote, each repeated by one command."""

from __future__ import annotations

import importlib
import json
import sys

from ssl_pipeline.config import options as parsers
from ssl_pipeline.config.base import UserError
from ssl_pipeline.config.command import leave
from ssl_pipeline.track.progress import print_table


def main() -> None:
    """The command line."""
    parser = parsers.bench()
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {str(options.json.parent)!r}")
    module = importlib.import_module(f"ssl_pipeline.bench.{options.name}")
    try:
        figures: dict[str, float] = module.measure(options.rounds)
    except UserError as error:
        leave(error)
    print_table(
        str(module.__doc__).splitlines()[0],
        ["figure", "value"],
        [[k, f"{v:,.3f}" if abs(v) >= 0.001 or v == 0 else f"{v:.1e}"] for k, v in figures.items()],
    )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
        sys.stdout.write(f"wrote {options.json}\n")


if __name__ == "__main__":
    main()
