"""The base of every configuration model, and the error that a wrong configuration raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class UserError(ValueError):
    """What a person can mend: told as a sentence, without a traceback.

    Attributes:
        exit_code: what the command leaves with: 2 for wrong input.
        everywhere: whether all processes of a run raise it, so that one of them tells it for all.
    """

    exit_code: int = 2
    everywhere: bool = True


class ConfigError(UserError):
    """A mistake of the user's, told in sentences: each names the thing, what was expected, and what to do.

    Attributes:
        problems: one sentence per mistake, all that were found together.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class StoppedByHand(KeyboardInterrupt):
    """Ctrl-C has ended a run, whose folder is known.

    Attributes:
        what: how far it came.
        folder: the run's; None in processes that don't write.
        together: whether all processes of the run raise it.
    """

    def __init__(self, what: str = "stopped by Ctrl-C", folder: Path | None = None, together: bool = False) -> None:
        self.what, self.folder, self.together = what, folder, together
        super().__init__(what if folder is None else f"{what}: go on by `output={folder}` and `resume=auto`.")


class StoppedByHandError(UserError):
    """The same where a command ends: one line instead of a traceback, and the exit code that shells have for it."""

    exit_code = 130


def shorten(items: Sequence[str], most: int = 10) -> list[str]:
    """The first items of a list for a message, and how many more there are."""
    more = len(items) - most
    return [*items[:most], *([f"… and {more} more"] if more > 0 else [])]


def joined(items: Sequence[str], most: int = 10) -> str:
    """The same in one line."""
    return ", ".join(shorten(items, most))


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class FrozenModel(BaseModel):
    """A frozen model that refuses keys it does not know.

    Attributes:
        short_for: the key that a plain value in the model's place stands for; None where there must be keys.
        one_value: whether the model is written as one value, such as ``10 epochs``, and its fields are no keys.
        wins_over: keys that take the place of another where both are given, such as ``steps`` of ``epochs``.
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
    """The configuration of one component of a room; its ``name`` is the module that holds it.

    Attributes:
        name: a module of the room (``simclr`` → ``ssl_pipeline.pretext.simclr``), or a dotted name of the user's own.
    """

    name: str


@dataclass(frozen=True)
class ComponentOf:
    """Marks a field of a stage's schema whose model is chosen by ``name`` among the modules of a package.

    Attributes:
        package: relative to ``ssl_pipeline``, such as ``"pretext"`` or ``"data.sources"``.
    """

    package: str


def dump(config: BaseModel) -> dict[str, Any]:
    """The whole configuration as plain YAML types, the chosen components' own keys included."""
    tree: dict[str, Any] = config.model_dump(mode="json", serialize_as_any=True)
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree's values by dotted keys; a mapping that is empty is a value."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
