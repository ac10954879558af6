"""The report in a real Chromium: nothing is loaded, nothing complains, every picture is there, every control does something."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_pipeline.finetune import finetune
from ssl_pipeline.logging.lock import FolderLock
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.report.command import report
from tests.chromium import Chromium, find_chromium
from tests.report_runs import write_pretrain, write_study
from tests.runs import tiny_finetune, tiny_pretrain

BINARY = find_chromium()
pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium is installed here")
PANELS = {"curves", "stage-two", "temperature", "collapse", "map", "neighbors", "views", "settings", "system"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stage-one runs, stage two of one of them, and a study: a page with every control there is."""
    root = tmp_path_factory.mktemp("report")
    first = pretrain(tiny_pretrain(root / "first", "evaluate_every=2 steps"))
    second = pretrain(tiny_pretrain(root / "second", "pretext.temperature.value=0.2", "steps=6"))
    finetune(tiny_finetune(first, root / "two", "regime=frozen", "seeds=2"))
    rows = [
        {"init": "pretrained", "regime": "frozen", "labels": labels, "label_count": 10 * labels, "seed": seed, "figures": {"accuracy": 0.01 * labels}}
        for labels in (10, 20) for seed in (0, 1)
    ]  # fmt: skip
    study = write_study(root / "study", {"rows": rows})
    return report([first, second, root / "two", study], root / "page.html")[0]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    assert BINARY is not None
    with Chromium(BINARY) as browser:
        yield browser


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_is_whole_and_alone(chromium: Chromium, made: Path, width: int, scheme: str) -> None:
    chromium.complaints.clear()
    chromium.requests.clear()
    chromium.open(made, width, 844, scheme)
    assert set(chromium.run("[...document.querySelectorAll('.panel')].map(panel => panel.id)")) == PANELS
    chromium.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    pictures = chromium.run("[...document.images].map(image => [image.naturalWidth, image.alt])")
    assert len(pictures) > 100
    assert all(size > 0 and alt for size, alt in pictures)
    assert chromium.run("[...document.querySelectorAll('.chart svg')].every(svg => svg.querySelector('path'))")
    assert chromium.run("document.querySelectorAll('.map image').length") > 40
    assert chromium.run("document.scripts.length") == 0
    assert chromium.run("document.documentElement.scrollWidth <= innerWidth")  # no sideways scroll
    assert chromium.requests == [made.resolve().as_uri()]
    assert chromium.complaints == []
    dark = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(19, 20, 23)") == (scheme == "dark")


def test_a_control_without_a_name_or_a_place_too_small_is_none(chromium: Chromium, made: Path) -> None:
    """Each control has a name that is read aloud, is reached by the keyboard, and is large enough for a finger (WCAG 2.2: 24 px)."""
    chromium.open(made, 390, 844)
    controls = chromium.run(
        "[...document.querySelectorAll('input, summary')].map(node => ({"
        " name: node.textContent.trim() || node.closest('label')?.textContent.trim() || '',"
        " reached: node.tabIndex >= 0, height: (node.closest('label') || node).getBoundingClientRect().height }))"
    )
    assert len(controls) > 20
    assert [
        control for control in controls if not control["name"] or not control["reached"] or control["height"] < 24
    ] == []
    assert chromium.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))"
                        ".every((level, place, all) => place === 0 ? level === 1 : level <= all[place - 1] + 1)")  # fmt: skip


def test_text_stands_out_from_its_ground(chromium: Chromium, made: Path) -> None:
    """The contrast of the colors that text is written in, by WCAG's formula: 4.5 or more in both themes."""
    script = """(() => {
      const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
      const luminance = (color) => {
        canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(value => value / 255)
          .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const probe = document.body.appendChild(document.createElement('i'));
      const of = (name) => { probe.style.color = `var(${name})`; return luminance(getComputedStyle(probe).color); };
      const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const inks = ['--ink', '--muted', '--accent', '--warn', ...[0, 1, 2, 3, 4, 5, 6, 7].map(n => `--run-${n}`)];
      return Object.fromEntries(inks.map(ink => [ink, Math.min(ratio(of(ink), of('--paper')), ratio(of(ink), of('--surface')))]));
    })()"""
    for scheme in ("light", "dark"):
        chromium.open(made, scheme=scheme)
        assert {ink: ratio for ink, ratio in chromium.run(script).items() if ratio < 4.5} == {}


def press(chromium: Chromium, selector: str) -> None:
    """A real click in the middle of an element."""
    script = (
        f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
        " node.scrollIntoView({ block: 'center', behavior: 'instant' });"
        " const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    chromium.click(*chromium.run(script))


def shown(chromium: Chromium, selector: str) -> list[bool]:
    """Whether elements are drawn, in the page's order."""
    script = (
        f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.getBoundingClientRect().width > 0)"
    )
    return [bool(one) for one in chromium.run(script)]


def test_a_click_on_each_control_changes_what_is_shown(chromium: Chromium, made: Path) -> None:
    chromium.open(made)
    chromium.complaints.clear()
    for chosen in ("epoch", "time", "step"):
        press(chromium, f"label:has(#axis-{chosen})")
        for axis in ("step", "epoch", "time"):
            assert set(shown(chromium, f".axis-{axis} svg")) == {axis == chosen}
    line = "[data-chart=loss] .axis-step .run-1"
    assert set(shown(chromium, line)) == {True}
    press(chromium, "label:has(#run-1)")
    assert set(shown(chromium, line)) == {False}
    assert set(shown(chromium, "[data-chart=loss] .axis-step .run-0")) == {True}
    press(chromium, "label:has(#class-0)")
    assert set(shown(chromium, "[data-map] .class-0")) == {False}
    assert set(shown(chromium, "[data-map] .class-1")) == {True}
    for theme, color in (("light", "rgb(251, 250, 247)"), ("dark", "rgb(19, 20, 23)"), ("auto", "rgb(251, 250, 247)")):
        press(chromium, f"label:has(#theme-{theme})")
        assert chromium.run("getComputedStyle(document.body).backgroundColor") == color
    for number in range(chromium.run("document.querySelectorAll('details').length")):
        is_open = f"document.querySelectorAll('details')[{number}].open"
        was = chromium.run(is_open)
        chromium.run(f"document.querySelectorAll('summary')[{number}].id = 'pressed-{number}'")
        press(chromium, f"#pressed-{number}")
        assert chromium.run(is_open) != was
    chromium.run("document.documentElement.style.scrollBehavior = 'auto'")  # a click needs a page that stands still
    for link in chromium.run("[...document.querySelectorAll('nav a')].map(node => node.getAttribute('href'))"):
        press(chromium, f"nav [href='{link}']")
        until = time.monotonic() + 10  # the browser follows a link in its own time
        while chromium.run("location.hash") != link and time.monotonic() < until:
            time.sleep(0.05)
        assert chromium.run("location.hash") == link
    assert chromium.complaints == []


def test_the_last_devues_of_the_runs_stand_above_a_chart(chromium: Chromium, made: Path) -> None:
    chromium.open(made)
    line = json.loads((made.parent / "second" / "metrics.jsonl").read_text().splitlines()[-1])
    told = chromium.run("document.querySelector('[data-chart=loss] .values').textContent")
    assert f"second {line['pretrain/loss']:.3g}" in told


def test_a_page_that_is_watched_reloads_and_stays_where_it_was(chromium: Chromium, tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run", card=False)
    lock = FolderLock(folder)
    try:
        path, _ = report([folder], refresh=3)
        chromium.open(path)
        press(chromium, "label:has(#axis-epoch)")
        chromium.run("window.before = true; window.scrollTo({ top: 400, behavior: 'instant' });")
        chromium.wait("window.before === undefined && document.readyState === 'complete'")
    finally:
        lock.release()
    assert chromium.run("window.scrollY") == 400
    assert chromium.run("document.querySelector('#axis-epoch').checked")
    assert set(shown(chromium, ".axis-epoch svg")) == {True}
