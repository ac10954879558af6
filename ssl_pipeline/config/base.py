"""The base of every configuration model, and the errors for mistakes of the user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator


class UserError(ValueError):
    """An error that the user can fix: printed as a sentence, without a traceback.

    Attributes:
        exit_code: of the command.
        everywhere: whether all processes of a run raise it, so that only one of them has to print it.
    """

    exit_code: int = 2
    everywhere: bool = True


class ConfigError(UserError):
    """One or more mistakes in a configuration or a command: each sentence names the thing, what was expected, and what to type."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class StoppedByHand(KeyboardInterrupt):
    """Ctrl-C has ended a run.

    Attributes:
        what: how far it came.
        folder: of the run; None in processes that don't write.
        together: whether all processes of the run raise it.
    """

    def __init__(self, what: str = "stopped by Ctrl-C", folder: Path | None = None, together: bool = False) -> None:
        self.what, self.folder, self.together = what, folder, together
        super().__init__(what if folder is None else f"{what}: go on by `output={folder}` and `resume=auto`.")


class StoppedByHandError(UserError):
    """Ctrl-C as the last line of a command, with the exit code that shells have for it."""

    exit_code = 130


def shorten(items: Sequence[str], most: int = 10) -> list[str]:
    """The first items of a list for a message, and how many more there are."""
    more = len(items) - most
    return [*items[:most], *([f"… and {more} more"] if more > 0 else [])]


def joined(items: Sequence[str], most: int = 10) -> str:
    """The same in one line."""
    return ", ".join(shorten(items, most))


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is spelled most like another; None where none is."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


class FrozenModel(BaseModel):
    """A frozen model that refuses unknown keys.

    Attributes:
        short_for: the key that a plain value in the model's place stands for; None where keys must be given.
        one_value: whether the model is written as one value, such as ``10 epochs``, so that its fields are no keys.
        wins_over: keys that replace another one where both are given, such as ``steps`` and ``epochs``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    short_for: ClassVar[str | None] = None
    one_value: ClassVar[bool] = False
    wins_over: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _one_key_is_enough(cls, value: Any) -> Any:
        plain = cls.short_for is not None and value is not None and not isinstance(value, Mapping | BaseModel)
        return {cls.short_for: value} if plain else value


class ComponentConfig(FrozenModel):
    """The configuration of one component of a room."""

    name: str = Field(
        description="A module of the room (`simclr` → `ssl_pipeline.pretext.simclr`), or a dotted name of your own."
    )


@dataclass(frozen=True)
class ComponentOf:
    """Marks a field of a stage's schema whose model is chosen by ``name`` among the modules of a package.

    Attributes:
        package: relative to ``ssl_pipeline``, such as ``"pretext"`` or ``"data.sources"``.
    """

    package: str


def dump(config: BaseModel) -> dict[str, Any]:
    """The whole configuration as plain YAML types, the keys of the chosen components included."""
    tree: dict[str, Any] = config.model_dump(mode="json", serialize_as_any=True)
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree's values by dotted keys; an empty mapping is a value."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
