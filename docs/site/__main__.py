"""``python -m docs.site``: builds the site into ``build/site``; a warning is an error."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from docs.site.stage import gather
from docs.site.verbs import ROOT

# The generator's way to let search work from a file, fetched from the network: nothing here is.
_SHIM = re.compile(r"<script[^>]+src=\"https://[^\"]*iframe-worker[^\"]*\"[^>]*></script>")


def build(folder: Path) -> Path:
    """Builds the site, without a network. It is read from files; its search needs a server: ``python -m http.server``.

    Returns:
        The folder of its HTML.
    """
    gather(folder)
    subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", "zensical.toml"],
        cwd=folder,
        check=True,
    )
    for page in (folder / "site").rglob("*.html"):
        page.write_text(_SHIM.sub("", page.read_text()))
    return folder / "site"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m docs.site", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site", help="a folder, emptied first")
    site = build(parser.parse_args().output)
    sys.stdout.write(f"wrote {site}\n")


if __name__ == "__main__":
    main()
