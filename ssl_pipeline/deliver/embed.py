"""``ssl-pipeline embed ENCODER data=… output=features.parquet``: the features of a data set, one row an image, with ids."""

from __future__ import annotations

import difflib
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import check_folder_of, run_command
from ssl_pipeline.data.source import Indexed, Split
from ssl_pipeline.evaluate.encoder import EncoderConfig, leading_words, open_encoder
from ssl_pipeline.evaluate.features import extract
from ssl_pipeline.track.progress import console

_ENDINGS = (".parquet", ".npz")


class EmbedConfig(EncoderConfig):
    """Which images' features, and where to.

    Attributes:
        split: of the data.
        output: a ``.parquet`` or ``.npz`` file.
    """

    split: Split = "train"
    output: str = "features.parquet"


@dataclass(frozen=True)
class Embedded:
    """Features and what they are of, in the source's order.

    Attributes:
        features: float32 of shape (N, D).
        source: the images.
        about: facts that travel in the file, as text.
    """

    features: Tensor
    source: Indexed
    about: dict[str, str]

    @property
    def ids(self) -> list[str]:
        """What each image is called: a file's path, or its number in its source."""
        return [self.source.describe(i) for i in range(len(self.source))]

    def names(self, numbers: Tensor | None, names: tuple[str, ...] | None) -> list[str | None] | None:
        """Labels or domains by name; None where an image has none."""
        if numbers is None:
            return None
        return [None if n < 0 else names[n] if names is not None else str(n) for n in numbers.tolist()]


def embed(config: EmbedConfig) -> Embedded:
    """Runs an encoder over a split.

    Raises:
        ConfigError: the data has no such split, or the encoder can't be opened for it.
    """
    source = open_split(config, config.split)
    opened = open_encoder(config, source.channels, source.mean, source.std)
    for note in opened.notes:
        console().print(note, markup=False)
    features = extract(opened.encoder, source, opened.preprocessing, opened.share)
    facts = {
        "made_by": "ssl_pipeline",
        "encoder": Path(config.encoder).name if config.encoder else config.backbone.name,
        "data": source.name,
        "fingerprint": source.fingerprint(),
        "split": config.split,
        "classes": source.classes,
        "blueprint": opened.blueprint.model_dump(mode="json"),
    }
    return Embedded(features, source, {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()})


def open_split(config: EncoderConfig, split: Split) -> Indexed:
    """A split that must be there; a file of it that can't be decoded will be an error.

    While training its neighbour would take its place; here the neighbour's features would stand under its name.
    """
    source = config.data.open(split)
    if source is None:
        raise ConfigError(f"`split`: this data has no `{split}`; `train` is always there.")
    source.bad_files = None
    return source


def write_parquet(embedded: Embedded, path: Path) -> None:
    """Columns ``id``, ``label`` and ``domain`` (where known, by name) and ``features`` (a list of fixed length)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, rows = embedded.source, embedded.features.numpy()
    columns: dict[str, Any] = {"id": pa.array(embedded.ids)}
    for name, values in (
        ("label", embedded.names(source.labels, source.classes)),
        ("domain", embedded.names(source.domains, source.domain_names)),
    ):
        if values is not None:
            columns[name] = pa.array(values, pa.string())
    columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    pq.write_table(pa.table(columns).replace_schema_metadata(embedded.about), path)


def write_npz(embedded: Embedded, path: Path) -> None:
    """Arrays ``id``, ``features``, ``label`` and ``domain`` (numbers), ``classes``, ``domain_names``; no pickle is in it."""
    source = embedded.source
    arrays: dict[str, Any] = {"id": np.array(embedded.ids), "features": embedded.features.numpy()}
    for name, numbers, names_key, names in (
        ("label", source.labels, "classes", source.classes),
        ("domain", source.domains, "domain_names", source.domain_names),
    ):
        if numbers is not None:
            arrays[name] = numbers.numpy()
        if names is not None:
            arrays[names_key] = np.array(names)
    np.savez(path, about=np.array(json.dumps(embedded.about, ensure_ascii=False)), **arrays)


def check_output(text: str) -> Path:
    """The file to be written.

    Raises:
        ConfigError: its ending is no format's, its folder is not there, or the format's extra is absent.
    """
    path = Path(text).expanduser()
    if path.suffix not in _ENDINGS:
        close = difflib.get_close_matches(path.suffix, _ENDINGS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"`output`: {text!r} ends in no format of features: take {' or '.join(_ENDINGS)}.{hint}")
    check_folder_of(path, "`output`")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError('`output`: Parquet needs pyarrow: pip install "ssl-pipeline[parquet]"; or end it in .npz.')
    return path


def embed_and_tell(config: EmbedConfig) -> None:
    """Writes the features of a data set, one row an image."""
    path = check_output(config.output)
    embedded = embed(config)
    temporary = path.with_name(f".{path.name}.partial{path.suffix}")
    (write_parquet if path.suffix == ".parquet" else write_npz)(embedded, temporary)
    temporary.replace(path)
    count, width = embedded.features.shape
    console().print(f"wrote {path}: {count} images of {embedded.source.name}, {width} features each", markup=False)


def main() -> None:
    """The command line."""
    run_command("embed", EmbedConfig, embed_and_tell, leading_words(sys.argv[1:], ["encoder"]))


if __name__ == "__main__":
    main()
