"""Gathers the site's pages in one folder: those of ``docs``, the generated ones, and the files that they link to.

On a code host the pages of ``docs`` link to the source beside them. The site has no host to point to, so each file that is
linked becomes a page of its own.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
from pathlib import Path, PurePosixPath

from docs.site import messages, reference, tasks
from docs.site.notebook import as_markdown
from docs.site.verbs import ROOT

# Sections and the pages that open them, in order; a page of `docs` that stands nowhere goes to Guides.
SECTIONS: dict[str, list[str]] = {
    "Start": ["index", "quickstart", "tutorial", "notebooks/first_steps", "glossary"],
    "Guides": [
        "data",
        "evaluate",
        "study",
        "export",
        "scale",
        "faults",
        "metrics",
        "tracking",
        "report",
        "troubleshooting",
    ],
    "Pretext tasks": ["pretext", "recipes"],
    "Downstream tasks": ["downstream"],
    "Across domains": ["domains"],
    "Reference": ["reference/configuration/index", "reference/messages"],
    "Extend": ["add_pretext", "add_downstream", "add_adaptation", "add_source", "architecture", "contributing"],
    "Results": ["results/quickstart"],
    "Decisions": [],
}
FOLDERS = {
    "reference/pretext": "Pretext tasks", "reference/downstream": "Downstream tasks", "reference/domain": "Across domains",
    "reference/configuration": "Reference", "results": "Results", "decisions": "Decisions",
}  # fmt: skip
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash", ".md": "markdown"}


def gather(folder: Path) -> None:
    """Writes ``zensical.toml`` and ``docs/`` to a folder, which is emptied first.

    Raises:
        ValueError: a page links to a file that is not there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pages = {**_written(), **reference.pages(), **tasks.pages(), **messages.pages()}
    sources: set[PurePosixPath] = set()
    for place, text in pages.items():
        _write(folder / "docs" / place, _relinked(place, text, pages.keys(), sources))
    for source in sorted(sources):
        _write(folder / "docs" / _page_of(source), _source_page(source))
    for asset in (path for path in (ROOT / "docs").rglob("*") if path.suffix in (".svg", ".png")):
        target = folder / "docs" / asset.relative_to(ROOT / "docs")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(asset, target)
    shutil.copyfile(ROOT / "docs" / "site" / "site.css", folder / "docs" / "site.css")
    _write(
        folder / "zensical.toml",
        (ROOT / "docs" / "site" / "zensical.toml").read_text().replace("nav = []", _nav(pages)),
    )


def _written() -> dict[PurePosixPath, str]:
    """The pages that people wrote."""
    docs = ROOT / "docs"
    found = {PurePosixPath(path.relative_to(docs).as_posix()): path.read_text() for path in sorted(docs.rglob("*.md"))}
    for path in sorted(docs.rglob("*.ipynb")):
        found[PurePosixPath(path.relative_to(docs).with_suffix(".md").as_posix())] = as_markdown(path)
    found[PurePosixPath("contributing.md")] = (ROOT / "CONTRIBUTING.md").read_text()
    return found


def _relinked(place: PurePosixPath, text: str, pages: object, sources: set[PurePosixPath]) -> str:
    """A page whose links lead to pages; notes the files that become one."""
    here = "" if str(place) == "contributing.md" else "docs"  # relative to where it was written

    def target(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        if "://" in path or path.startswith("mailto:"):
            return link[0]
        found = PurePosixPath(posixpath.normpath(posixpath.join(here, place.parent, path)))
        if not (ROOT / found).exists() and not str(found).startswith("docs/reference"):
            raise ValueError(f"{place} links to {path}, and there is no such file.")
        goal = _page_for(found, pages)
        if goal is None:
            sources.add(found)
            goal = _page_of(found)
        return posixpath.relpath(goal, place.parent) + anchor

    return _LINK.sub(target, text)


def _page_for(found: PurePosixPath, pages: object) -> PurePosixPath | None:
    """The page of a linked file that has one already; pictures stay themselves."""
    assert hasattr(pages, "__contains__")
    if str(found) == "CONTRIBUTING.md":
        return PurePosixPath("contributing.md")
    if not found.is_relative_to("docs"):
        return None
    below = found.relative_to("docs")
    for candidate in (below, below.with_suffix(".md")):
        if candidate in pages:
            return candidate
    return below if below.suffix in (".svg", ".png") else None


def _page_of(source: PurePosixPath) -> PurePosixPath:
    return PurePosixPath("source", f"{source}.md")


def _source_page(source: PurePosixPath) -> str:
    path = ROOT / source
    if path.is_dir():
        members = sorted(member.name for member in path.iterdir() if not member.name.startswith(("_", ".")))
        return "\n".join([f"# {source}/", "", *(f"- `{name}`" for name in members), ""])
    fence = "~~~~"
    return f"# {path.name}\n\n`{source}`\n\n{fence}{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}{fence}\n"


def _nav(pages: dict[PurePosixPath, str]) -> str:
    """The navigation as TOML: the sections' own pages first, then whatever else lies in their folders."""
    verbs_first = sorted(pages, key=lambda place: (place.stem.endswith("_group"), place))
    left = {str(place.with_suffix("")): place for place in verbs_first}
    sections: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
    for section, wanted in SECTIONS.items():
        sections[section] += [_entry(left.pop(name), pages) for name in wanted if name in left]
    for name, place in left.items():
        section = next((FOLDERS[folder] for folder in FOLDERS if name.startswith(f"{folder}/")), "Guides")
        sections[section].append(_entry(place, pages))
    lines = [
        f"  {{ {json.dumps(section)} = [{', '.join(f'{{ {json.dumps(head)} = {json.dumps(place)} }}' for head, place in entries)}] }},"
        for section, entries in sections.items()
        if entries
    ]
    return "\n".join(["nav = [", *lines, "]"])


def _entry(place: PurePosixPath, pages: dict[PurePosixPath, str]) -> tuple[str, str]:
    heading = re.search(r"^# (.+)$", pages[place], re.MULTILINE)
    assert heading, f"{place} has no title"
    return heading[1].replace("`", ""), str(place)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
