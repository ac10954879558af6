"""``python -m docs.site``: builds the site into ``build/site``, without a network; a warning is an error."""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

from docs.site import reference
from docs.site.reference import ROOT

# Zensical's script for a search without a server would be fetched from the network when a page is viewed.
_SHIM = re.compile(r"<script[^>]+src=\"https://[^\"]*iframe-worker[^\"]*\"[^>]*></script>")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def build(folder: Path) -> Path:
    """Builds the site; its pages are read from files, and its search needs a server: ``python -m http.server``.

    Returns:
        The folder of its HTML.
    """
    gather(folder)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", "zensical.toml"]
    subprocess.run(command, cwd=folder, check=True)
    for page in (folder / "site").rglob("*.html"):
        page.write_text(_SHIM.sub("", page.read_text()))
    return folder / "site"


def gather(folder: Path) -> None:
    """Writes ``zensical.toml`` and ``docs/`` to a folder, which is emptied first.

    Raises:
        ValueError: a page links to a file that does not exist.
    """
    shutil.rmtree(folder, ignore_errors=True)
    docs = ROOT / "docs"
    pages = {PurePosixPath(path.relative_to(docs).as_posix()): path.read_text() for path in docs.rglob("*.md")}
    for path in docs.rglob("*.ipynb"):
        pages[PurePosixPath(path.relative_to(docs).with_suffix(".md").as_posix())] = _notebook(path)
    pages[PurePosixPath("contributing.md")] = (ROOT / "CONTRIBUTING.md").read_text()
    pages |= reference.pages()
    for place, text in pages.items():
        _write(folder / "docs" / place, _relink(place, text, pages))
    for asset in (path for path in docs.rglob("*") if path.suffix in (".svg", ".png", ".css")):
        target = folder / "docs" / asset.relative_to(docs)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(asset, target)
    settings = (docs / "site" / "zensical.toml").read_text()
    # A line such as `"reference/pretext/*"` of the navigation stands for all pages in a folder.
    _write(folder / "zensical.toml", re.sub(r'"([\w/]+)/\*"', lambda found: _pages_in(found[1], pages), settings))


def _notebook(path: Path) -> str:
    """The cells of a notebook as Markdown, without outputs."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    return "\n\n".join([*(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells), ""])


def _relink(place: PurePosixPath, text: str, pages: dict[PurePosixPath, str]) -> str:
    """A page whose links lead to pages; a link to a source file, for readers on a code host, becomes its text."""
    here = "" if str(place) == "contributing.md" else "docs"  # relative to where it was written

    def target(link: re.Match[str]) -> str:
        if re.match(r"\w+:", link["path"]):
            return link[0]
        found = PurePosixPath(posixpath.normpath(posixpath.join(here, place.parent, link["path"])))
        if not (ROOT / found).exists() and not found.is_relative_to("docs/reference"):
            raise ValueError(f"{place} links to {link['path']}, and there is no such file.")
        below = PurePosixPath(
            "contributing.md" if str(found) == "CONTRIBUTING.md" else posixpath.relpath(found, "docs")
        )
        if below.with_suffix(".md") in pages:
            below = below.with_suffix(".md")
        elif below.suffix not in (".svg", ".png"):
            return link["text"]
        return f"{link['image']}[{link['text']}]({posixpath.relpath(below, place.parent)}{link['anchor'] or ''})"

    return _LINK.sub(target, text)


def _pages_in(folder: str, pages: dict[PurePosixPath, str]) -> str:
    places = [place for place in pages if place.parent == PurePosixPath(folder) and place.stem != "index"]
    return ", ".join(f'"{place}"' for place in sorted(places, key=lambda place: (place.stem.endswith("_group"), place)))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m docs.site", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site", help="a folder, emptied first")
    sys.stdout.write(f"wrote {build(parser.parse_args().output)}\n")


if __name__ == "__main__":
    main()
