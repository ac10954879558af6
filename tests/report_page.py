"""What a report's page says, read as a browser would."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from ssl_pipeline.report.images import RunImages


class Page(HTMLParser):
    """What a page says, and the elements it is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self._inside = list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._inside[-1:]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self) -> set[str]:
        return {str(attributes["id"]) for _, attributes in self.tags if "id" in attributes}


def blind(_: Any) -> RunImages:
    return RunImages()


def curves(text: str, chart: str, run: int, axis: str = "step") -> list[int]:
    """The numbers of points of a run's lines in a chart of a page."""
    (figure,) = re.findall(rf'<figure class="chart" data-chart="{chart}">(.*?)</figure>', text, re.DOTALL)
    (drawing,) = re.findall(rf'<div class="drawing axis-{axis}">(.*?)</div>', figure, re.DOTALL)
    return [
        len(re.findall("[ML]", path))
        for path in re.findall(rf'<g class="run-{run}">\s*<path d="(.*?)"', drawing, re.DOTALL)
    ]


def refresh(text: str) -> int | None:
    """The seconds after which a page reloads itself."""
    found = re.search(r'<meta http-equiv="refresh" content="(\d+)">', text)
    return int(found[1]) if found else None
