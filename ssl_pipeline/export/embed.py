"""``ssl-pipeline embed ENCODER data=… output=features.parquet``: the features of a data set, one row an image, with ids."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import check_folder_of, run_command
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.file_table import as_text
from ssl_pipeline.data.source import Split
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.evaluation.load_encoder import EncoderConfig, describe_encoder, open_encoder
from ssl_pipeline.logging.progress import console

_ENDINGS = (".parquet", ".npz")


class EmbedConfig(EncoderConfig):
    """Which images' features, and where to.

    Attributes:
        split: of the data; ``all`` takes every image and says in a column which split it is of.
        output: a ``.parquet`` or ``.npz`` file.
    """

    split: Literal["all", "train", "dev", "test"] = "all"
    output: str = "features.parquet"


@dataclass(frozen=True)
class Embeddings:
    """Features and what they are of, in the source's order.

    Attributes:
        features: float32 of shape (N, D).
        sources: by split, one after the other.
        about: facts that travel in the file, as text.
    """

    features: Tensor
    sources: dict[Split, IndexedDataset]
    about: dict[str, str]

    @property
    def first(self) -> IndexedDataset:
        """The source that names classes and domains for all."""
        return next(iter(self.sources.values()))

    @property
    def ids(self) -> list[str]:
        """What each image is called: a file's path, or its number in its split."""
        return [source.describe(i) for source in self.sources.values() for i in range(len(source))]

    @property
    def splits(self) -> list[str]:
        """Which split each image is of."""
        return [split for split, source in self.sources.items() for _ in range(len(source))]

    @property
    def labels(self) -> Tensor | None:
        """int64 of shape (N,), −1 where an image has none; None where no source has labels."""
        return self._joined([source.labels for source in self.sources.values()])

    @property
    def domains(self) -> Tensor | None:
        return self._joined([source.domains for source in self.sources.values()])

    def _joined(self, numbers: list[Tensor | None]) -> Tensor | None:
        if all(part is None for part in numbers):
            return None
        sizes = [len(source) for source in self.sources.values()]
        return torch.cat(
            [torch.full((n,), -1) if part is None else part for part, n in zip(numbers, sizes, strict=True)]
        )

    def names(self, numbers: Tensor | None, names: tuple[str, ...] | None) -> list[str | None] | None:
        """Labels or domains by name; None where an image has none."""
        if numbers is None:
            return None
        return [None if n < 0 else names[n] if names is not None else str(n) for n in numbers.tolist()]


def embed(config: EmbedConfig) -> Embeddings:
    """Runs an encoder over a split, or all of them.

    Raises:
        ConfigError: the data has no such split, or the encoder can't be opened for it.
    """
    sources = open_every(config) if config.split == "all" else {config.split: open_split(config, config.split)}
    source = next(iter(sources.values()))
    opened = open_encoder(config, source)
    for note in opened.notes:
        console().print(note, markup=False)
    features = [extract(opened.encoder, part, opened.preprocessing, opened.share) for part in sources.values()]
    digest = hashlib.blake2b("".join(part.fingerprint() for part in sources.values()).encode(), digest_size=16)
    facts = {
        "made_by": "ssl_pipeline",
        "encoder": Path(config.encoder).name if config.encoder else config.backbone.name,
        "data": source.name,
        "fingerprint": source.fingerprint() if len(sources) == 1 else digest.hexdigest(),
        "split": config.split,
        "classes": source.classes,
        "blueprint": opened.blueprint.model_dump(mode="json"),
    }
    return Embeddings(
        torch.cat(features),
        sources,
        {key: as_text(json.dumps(value, ensure_ascii=False)) for key, value in facts.items()},
    )


def open_split(config: EncoderConfig, split: Split) -> IndexedDataset:
    """A split that must be there; a file of it that can't be decoded will be an error.

    While training its neighbor would take its place; here the neighbor's features would stand under its name.
    """
    source = config.scaled_data.open(split)
    if source is None:
        raise ConfigError(f"`split`: this data has no `{split}`; `train` is always there.")
    source.bad_files = None
    return source


def open_every(config: EncoderConfig) -> dict[Split, IndexedDataset]:
    """All images by their splits; likewise."""
    sources = config.scaled_data.open_every()
    for source in sources.values():
        source.bad_files = None
    return sources


def write_parquet(embedded: Embeddings, path: Path) -> None:
    """Columns ``id``, ``split``, ``label`` and ``domain`` (where known, by name) and ``features`` (a list of fixed length)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, rows = embedded.first, embedded.features.numpy()
    columns: dict[str, Any] = {
        "id": pa.array([as_text(name) for name in embedded.ids]),
        "split": pa.array(embedded.splits),
    }
    for name, values in (
        ("label", embedded.names(embedded.labels, source.classes)),
        ("domain", embedded.names(embedded.domains, source.domain_names)),
    ):
        if values is not None:
            columns[name] = pa.array([None if value is None else as_text(value) for value in values], pa.string())
    columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    pq.write_table(pa.table(columns).replace_schema_metadata(embedded.about), path)


def write_npz(embedded: Embeddings, path: Path) -> None:
    """Arrays ``id``, ``split``, ``features``, ``label`` and ``domain`` (numbers), ``classes``, ``domain_names``; no pickle."""
    source = embedded.first
    arrays: dict[str, Any] = {"id": np.array(embedded.ids), "split": np.array(embedded.splits)}
    arrays["features"] = embedded.features.numpy()
    for name, numbers, names_key, names in (
        ("label", embedded.labels, "classes", source.classes),
        ("domain", embedded.domains, "domain_names", source.domain_names),
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
        raise ConfigError(
            '`output`: Parquet needs pyarrow: pip install -e ".[parquet]" in the project\'s folder; or end it in .npz.'
        )
    return path


def embed_and_tell(config: EmbedConfig) -> None:
    """Writes the features of a data set, one row an image."""
    path = check_output(config.output)
    embedded = embed(config)
    temporary = path.with_name(f".{path.name}.partial{path.suffix}")
    (write_parquet if path.suffix == ".parquet" else write_npz)(embedded, temporary)
    temporary.replace(path)
    count, width = embedded.features.shape
    parts = ", ".join(f"{len(source)} {split}" for split, source in embedded.sources.items())
    text = f"wrote {path}: {count} images of {embedded.first.name} ({parts}), {width} features each"
    console().print(text, markup=False)


def main() -> None:
    """The command line."""
    run_command("embed", EmbedConfig, embed_and_tell, describe_encoder(sys.argv[1:], ["encoder"]))


if __name__ == "__main__":
    main()
