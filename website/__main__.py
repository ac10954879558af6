"""``python -m website``: builds the site into ``build/site``; a warning is an error."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from website.stage import gather
from website.verbs import ROOT


def build(folder: Path) -> Path:
    """Builds the site, without a network.

    Returns:
        The folder of its HTML.
    """
    gather(folder)
    subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", "zensical.toml"],
        cwd=folder,
        check=True,
    )
    return folder / "site"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m website", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site", help="a folder, emptied first")
    site = build(parser.parse_args().output)
    sys.stdout.write(f"wrote {site}\n")


if __name__ == "__main__":
    main()
