"""Columns of a CSV, TSV, JSONL or Parquet file, as text."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.data.bad_files import warn_once

_NONE = {"", "nan", "<na>", "na", "n/a", "#n/a", "none", "null", "-1", "-1.0"}
_INTEGRAL = re.compile(r"([+-]?\d+)(?:\.0*)?")
Columns = dict[str, list[str | None]]


def read_columns(path: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> Columns:
    """Reads some columns of a table, by its ending.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet file.
        choose: from the names of the file's columns to those that are wanted.

    Returns:
        Per wanted column its values as text, whole numbers without a decimal point; None where a value is missing or empty.

    Raises:
        ConfigError: the file is missing, damaged, empty, or of another kind.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if not path.is_file():
        raise ConfigError(f"`data.path`: there is no file {str(path)!r}: give a table, one row per image.")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"`data.path`: {str(path)!r} must end in {', '.join(readers)}: its ending says how it is read."
        )
    try:
        columns = reader(path, choose)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not written in UTF-8 ({error.reason}): save it so.") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}): make it readable.") from error
    if not columns or not next(iter(columns.values())):
        raise ConfigError(f"{path} has no rows: it needs one per image.")
    return columns


def _read_csv(path: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> Columns:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(rows, None)
            if header is None:
                raise ConfigError(f"{path} is empty: it needs a line with the columns' names, and a row per image.")
            columns: Columns = {name: [] for name in choose(header)}
            place = {name: header.index(name) for name in columns}
            for row in rows:
                if not row:
                    continue  # an empty line
                if len(row) != len(header):
                    raise ConfigError(
                        f"{path}, line {rows.line_num}: {len(row)} values, and the first line names {len(header)} columns: put "
                        "values with a comma in double quotes."
                    )
                for name, values in columns.items():
                    values.append(text_of(row[place[name]]))
        except csv.Error as error:
            raise ConfigError(f"{path}, line {rows.line_num}: {error}: mend the line.") from error
    return columns


def _read_jsonl(path: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> Columns:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: no JSON ({error.msg}): one object a line.") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: {type(row).__name__}, and an object was expected: {{…}}.")
            rows.append(row)
    found = list(dict.fromkeys(name for row in rows for name in row))
    if not rows:
        raise ConfigError(f"{path} is empty: it needs one JSON object a line, one line per image.")
    return {name: _texts([row.get(name) for row in rows], name, path) for name in choose(found)}


def _read_parquet(path: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> Columns:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            'Parquet files are read by pyarrow, which is not installed: pip install -e ".[parquet]" in the project\'s folder.'
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            wanted = list(choose(file.schema_arrow.names))
            table = file.read(columns=wanted)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} is no whole Parquet file ({error}): write it anew.") from error
    return {name: _texts(table[name].to_pylist(), name, path) for name in wanted}


def _texts(values: Sequence[Any], column: str, path: Path) -> list[str | None]:
    for row, value in enumerate(values, 1):
        refuse_several(value, column, f"{path}, row {row}")
    return [text_of(value) for value in values]


def text_of(value: Any) -> str | None:
    """A cell as text; a whole number that a table keeps as a float (because others are missing) loses its point."""
    if value is None or value == "" or value != value:  # the last is true of a float that is no number
        return None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def number_names(values: Sequence[str | None]) -> tuple[Tensor, tuple[str, ...]]:
    """Names to numbers, in the names' order; whole numbers are in theirs.

    Returns:
        int64, −1 where there is no name; and the names in the order of their numbers.
    """
    names = {value for value in values if value is not None}
    whole = all(name.lstrip("-").isdecimal() for name in names)
    order = tuple(sorted(names, key=lambda name: (int(name), name) if whole else (0, name)))
    return numbers_of(values, order), order


def numbers_of(values: Sequence[str | None], names: Sequence[str]) -> Tensor:
    """The numbers of names that are known, int64, −1 where there is no name; an unknown one is a KeyError."""
    number: dict[str | None, int] = {None: -1, **{name: place for place, name in enumerate(names)}}
    return torch.tensor([number[value] for value in values], dtype=torch.int64)


def numbers_in(values: Sequence[str | None], column: str, path: Path) -> list[float]:
    """A column's values as numbers, NaN where there is none.

    Raises:
        ConfigError: a value is no finite number.
    """
    numbers = []
    for row, value in enumerate(values, 1):
        try:
            number = math.nan if value is None else float(value)
        except ValueError:
            number = math.inf
        if math.isinf(number):
            raise ConfigError(
                f"{path}, row {row}: {value!r} in {column!r} is no number: mend it, or leave the cell empty where the value is "
                "not known."
            )
        numbers.append(number)
    return numbers


def alike(wanted: str, found: Sequence[str], key: str, path: Path) -> str | None:
    """The column of a name, capitals and blanks around it aside; None where there is none.

    Raises:
        ConfigError: there are several, none of which has exactly that name.
    """
    same = [name for name in found if name.strip().casefold() == wanted.strip().casefold()]
    if wanted in same:
        return wanted
    if len(same) > 1:
        raise ConfigError(
            f"{path} has the columns {' and '.join(map(repr, same))}: say which one is meant by `data.{key}`."
        )
    return same[0] if same else None


def one_of(wanted: str, found: Sequence[str], key: str, path: Path) -> str:
    """A column that must be there; one whose name differs by capitals or blanks around it is taken for it.

    Raises:
        ConfigError: naming the columns that are.
    """
    column = alike(wanted, found, key, path)
    if column is None:
        raise ConfigError(
            f"{path} has no column {wanted!r}; it has {', '.join(map(repr, found)) or 'none'}. Name the right one by "
            f"`data.{key}`."
        )
    return column


def class_name(value: Any) -> str | None:
    """A class's name without blanks around it; None where the cell says that there is none.

    What says so is the same in every kind of table: nothing, ``nan``, ``None``, ``N/A``, ``null`` (capitals aside) and −1, by which
    published test sets keep a label to themselves.
    """
    text = "" if value is None else str(value).strip()
    return None if text.casefold() in _NONE else text


def class_number(value: Any, classes: Sequence[str] | None, column: str, where: str) -> int | None:
    """The number of a sample's class, given by it or by a declared name; None where the cell says that there is no label.

    Raises:
        ConfigError: it is neither; ``column`` and ``where`` name the cell.
    """
    refuse_several(value, column, where)
    if isinstance(value, int):
        return None if value < 0 else value
    text = class_name(text_of(value))
    if text is None:
        return None
    if classes is not None and text in classes:
        return classes.index(text)
    whole = _INTEGRAL.fullmatch(text)
    if whole and 0 <= int(whole[1]) < (math.inf if classes is None else len(classes)):
        return int(whole[1])
    known = f"one of {', '.join(classes[:10])}" if classes else "a whole number (or names of classes that are declared)"
    raise ConfigError(
        f"{where}: its label is {text[:40]!r}, and {known} was expected: see `data.label` (null reads none)."
    )


def class_names(values: Sequence[Any], column: str, where: str) -> list[str | None]:
    """A column's names; ``1.0`` is ``1`` where all of them are whole numbers. What is taken for no name is said."""
    names = [class_name(value) for value in values]
    lost = Counter(str(value) for value, name in zip(values, names, strict=True) if value is not None and name is None)
    if lost:
        shown = joined([f"{text!r} ({count})" for text, count in lost.most_common()])
        warn_once(
            f"{where}: these values of {column!r} are read as no label: {shown}. Rename the class if one is meant."
        )
    whole = {name: match[1] for name in set(names) if name is not None and (match := _INTEGRAL.fullmatch(name))}
    if any("." in name for name in whole) and len(whole) == len(set(names) - {None}):
        names = [None if name is None else whole[name] for name in names]
    _say_if_several(names, column, where)
    return names


def _say_if_several(names: Sequence[str | None], column: str, where: str) -> None:
    """A class ``cat|dog`` beside ``cat`` and ``dog`` is most likely two labels of an image."""
    known = {name for name in names if name is not None}
    for name in sorted(known):
        parts = [part.strip() for part in re.split(r"[|;,]", name)]
        if len(parts) > 1 and set(parts) & known:
            warn_once(
                f"{where}: {name!r} in {column!r} is read as one class; if it is several labels of an image, write a column of 0 "
                "and 1 for each and take `downstream=multi_label` with `data.target_columns=[…]`."
            )
            return


def refuse_several(value: Any, column: str, where: str) -> None:
    """Refuses a cell that holds a list or an object where one value is meant.

    Raises:
        ConfigError: it does.
    """
    if isinstance(value, list | tuple | dict | set):
        raise ConfigError(
            f"{where}: {column!r} holds {str(value)[:60]}, and one value was expected. For several labels of an image write a "
            "column of 0 and 1 for each, and take `downstream=multi_label` with `data.target_columns=[…]`."
        )
