"""The site is built without a warning; what is generated from the code is whole, and what is quoted from it is there."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel, Field

from docs.site import drawings, reference
from docs.site.__main__ import build, gather
from docs.site.reference import configured_verbs, meaning, prose
from ssl_pipeline.config.base import FrozenModel
from ssl_pipeline.config.compose import choices, config_root
from ssl_pipeline.config.schema import module_of, names, rooms
from tests.runs import ROOT

PACKAGE = ROOT / "ssl_pipeline"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once; a warning of the generator is an error."""
    return build(tmp_path_factory.mktemp("site"))


def test_every_page_is_there_and_every_local_link_and_picture_leads_somewhere(site: Path) -> None:
    found = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    for wanted in ("index", "quickstart", "tutorial", "glossary", "troubleshooting", "notebooks/first_steps"):
        assert f"{wanted}.html" in found
    written = {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")
    }
    assert written <= found
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if not re.match(r"[a-z]+:|//|/|\$", link) and page.name != "404.html":
                assert (page.parent / link).exists(), f"{page.relative_to(site)} → {link}"


def test_nothing_is_fetched_when_a_page_is_viewed(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|iframe|source)[^>]+src="(https?:)?//', page.read_text())
        styles = re.findall(
            r'<link[^>]+rel="(?:stylesheet|preload|preconnect)"[^>]+href="(https?:)?//', page.read_text()
        )
        assert not fetched + styles, page


def test_a_link_to_a_file_that_is_gone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "pages", lambda: {PurePosixPath("x.md"): "# X\n\n[y](../ssl_pipeline/gone.py)\n"})
    with pytest.raises(ValueError, match=r"x\.md links to \.\./ssl_pipeline/gone\.py"):
        gather(tmp_path / "site")


def test_every_page_is_in_the_navigation_once(tmp_path: Path) -> None:
    gather(tmp_path)
    named = re.findall(r'"([\w/.-]+\.md)"', (tmp_path / "zensical.toml").read_text())
    assert sorted(named) == sorted(
        path.relative_to(tmp_path / "docs").as_posix() for path in (tmp_path / "docs").rglob("*.md")
    )


def test_a_link_to_source_is_plain_text_on_the_site(tmp_path: Path) -> None:
    gather(tmp_path)
    page = (tmp_path / "docs" / "architecture.md").read_text()
    assert "`pretrain.py`" in page
    assert "../ssl_pipeline" not in page


def schemas() -> list[type[BaseModel]]:
    """Every model that a key of the reference belongs to."""
    found: list[type[BaseModel]] = []
    waiting = [verb.schema for verb in configured_verbs()]
    for verb in configured_verbs():
        waiting += [module_of(room, name).Config for room in rooms(verb.schema).values() for name in names(room)]
    while waiting:
        schema = waiting.pop()
        if schema not in found:
            found.append(schema)
            waiting += [
                inner for field in schema.model_fields.values() if (inner := reference.model_of(field.annotation))
            ]
    return found


SCHEMAS = schemas()


@pytest.mark.parametrize(
    "schema", SCHEMAS, ids=lambda schema: f"{schema.__module__.removeprefix('ssl_pipeline.')}.{schema.__name__}"
)
def test_every_key_has_a_meaning(schema: type[BaseModel]) -> None:
    assert not [name for name in schema.model_fields if not meaning(schema, name)]


def test_a_meaning_is_the_fields_description_or_else_the_line_of_the_docstring() -> None:
    class Base(FrozenModel):
        """A base.

        Attributes:
            old: by the docstring,
                in two lines.
            both: by the docstring.
        """

        old: int = 1
        both: int = Field(2, description="By the field.")

    class Below(Base):
        """Has another default."""

        both: int = 3

    assert [meaning(Below, key) for key in ("old", "both")] == ["by the docstring, in two lines.", "By the field."]


def read_somewhere() -> tuple[set[str], tuple[str, ...]]:
    """Every attribute that the package reads of anything, and the ends of names that a file puts together for `getattr`."""
    found, ends = set(), set()
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        built = False
        for node in nodes:
            match node:
                case ast.Attribute(attr=name, ctx=ast.Load()):
                    found.add(name)
                case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                    found.add(name)
                case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.JoinedStr() | ast.Name(), *_]):
                    built = True
        texts = [node.values[-1] for node in nodes if built and isinstance(node, ast.JoinedStr)]
        ends |= {
            str(text.value)
            for text in texts
            if isinstance(text, ast.Constant) and re.fullmatch(r"_[a-z]{4,}", str(text.value))
        }
    return found, tuple(ends)


def test_every_key_is_read_by_the_code() -> None:
    known = {name for schema in SCHEMAS for name in schema.model_fields}
    read, ends = read_somewhere()
    assert len(known) > 100
    assert len(ends) < 5  # more would let anything pass
    assert not [name for name in known - read if not name.endswith(ends)]


def test_the_reference_names_every_choice_and_every_key() -> None:
    pages = {str(place): text for place, text in reference.pages().items()}
    for group, verb in reference.groups().items():
        text = pages[f"reference/configuration/{group}_group.md"]
        room = rooms(verb.schema).get(group)
        for choice in names(room) if room else choices(group):
            assert f"## {group}={choice}" in text
    assert "`micro_batch_size`" in pages["reference/configuration/pretrain.md"]
    queue = re.search(
        r"\| `pretext\.queue` \| (.+?) \| `(.+?)` \| (.+?) \|", pages["reference/configuration/pretext_group.md"]
    )
    assert queue
    assert queue.groups() == ("integer ≥ 1", "65536", "keys that are kept.")


def test_every_group_of_yaml_is_in_the_reference() -> None:
    folders = {path.name for path in config_root().iterdir() if path.is_dir()}
    # Recipes and ready-made rows of studies choose from the groups, and are none.
    assert folders - {"recipe", "comparison"} == set(reference.groups())


@pytest.mark.parametrize(("room", "name"), [(room, name) for room in reference.TASKS for name in names(room)])
def test_a_task_says_its_equation_when_to_use_it_and_what_it_follows(room: str, name: str) -> None:
    page = reference.pages()[PurePosixPath("reference", room, f"{name}.md")]
    if room == "domain":
        assert f"domain={name}" in page
        assert "`domain.target`" in page
    else:
        assert "```text\n" in prose(module_of(room, name).__doc__)
        assert "When to use:" in page
    assert room != "pretext" or "arXiv" in page
    assert ":math:" not in page
    assert ".. math" not in page
    assert "``" not in re.sub(r"```.*?```", "", page, flags=re.DOTALL)


def test_recipes_are_found_by_the_task_that_they_choose() -> None:
    assert "imagenet_dino_pretrain" in reference.recipes_of("pretext", "dino")
    assert "quickstart_pretrain" in reference.recipes_of("pretext", "simclr")
    of_all = [recipe for name in names("pretext") for recipe in reference.recipes_of("pretext", name)]
    assert set(of_all) == {recipe for recipe in choices("recipe") if recipe.endswith("pretrain")}


def quoted() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^> (.+)$", page, re.MULTILINE)


def texts_of(path: Path) -> list[str]:
    """The texts in a module, with `…` for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append(re.sub("…+", "…", "".join(parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_every_message_that_troubleshooting_quotes_is_in_the_code() -> None:
    known = [text for path in PACKAGE.rglob("*.py") for text in texts_of(path)]
    assert len(quoted()) > 10
    assert not [message for message in quoted() if not any(message in text for text in known)]


def test_the_charts_are_the_same_each_time_and_all_are_kept(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        drawings.draw(tmp_path / folder)
    for first in (tmp_path / "first").iterdir():
        assert first.read_bytes() == (tmp_path / "second" / first.name).read_bytes()
        assert (ROOT / "docs" / "glossary" / first.name).is_file()
    assert "0.67" in (tmp_path / "first" / "temperature.svg").read_text()


def test_how_to_cite_is_whole_and_of_this_version() -> None:
    citation = OmegaConf.to_container(OmegaConf.load(ROOT / "CITATION.cff"))
    assert isinstance(citation, dict)
    assert {"cff-version", "message", "title", "authors", "version", "license", "type"} <= set(citation)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
