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
from ssl_pipeline.config.files import atomic_write
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.image_index import as_text
from ssl_pipeline.data.splits import Split
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

    split: Literal["all", "train", "val", "test"] = "all"
    output: str = "features.parquet"


@dataclass(frozen=True)
class Embeddings:
    """Features, float32 of shape (N, D), of sources by split, one after the other; ``about`` is the file's metadata."""

    features: Tensor
    sources: dict[Split, IndexedDataset]
    about: dict[str, str]

    @property
    def first(self) -> IndexedDataset:
        """The source that names classes and domains for all."""
        return next(iter(self.sources.values()))

    @property
    def ids(self) -> list[str]:
        """Each image's file, or its number in its split."""
        return [source.describe(i) for source in self.sources.values() for i in range(len(source))]

    @property
    def splits(self) -> list[str]:
        return [split for split, source in self.sources.items() for _ in range(len(source))]

    def annotations(self) -> dict[str, tuple[Tensor | None, tuple[str, ...] | None]]:
        """``label`` and ``domain``: int64 of shape (N,), −1 where an image has none; None where no source has any. And their names."""
        labels = [source.labels for source in self.sources.values()]
        domains = [source.domains for source in self.sources.values()]
        return {
            "label": (self._joined(labels), self.first.classes),
            "domain": (self._joined(domains), self.first.domain_names),
        }

    def _joined(self, numbers: list[Tensor | None]) -> Tensor | None:
        if all(part is None for part in numbers):
            return None
        parts = zip(numbers, self.sources.values(), strict=True)
        return torch.cat([torch.full((len(source),), -1) if part is None else part for part, source in parts])


def embed(config: EmbedConfig) -> Embeddings:
    """Runs an encoder over a split, or all of them.

    Raises:
        ConfigError: the data has no such split, or the encoder can't be opened for it.
    """
    sources = open_sources(config, config.split)
    source = next(iter(sources.values()))
    opened = open_encoder(config, source)
    for note in opened.notes:
        console().print(note, markup=False)
    features = [extract(opened.encoder, part, opened.preprocessing, opened.share) for part in sources.values()]
    prints = [part.fingerprint() for part in sources.values()]
    joined = hashlib.blake2b("".join(prints).encode(), digest_size=16).hexdigest()
    facts = {
        "made_by": "ssl_pipeline",
        "encoder": Path(config.encoder).name if config.encoder else config.backbone.name,
        "data": source.name,
        "fingerprint": prints[0] if len(prints) == 1 else joined,
        "split": config.split,
        "classes": source.classes,
        "blueprint": opened.blueprint.model_dump(mode="json"),
    }
    about = {key: as_text(json.dumps(value, ensure_ascii=False)) for key, value in facts.items()}
    return Embeddings(torch.cat(features), sources, about)


def open_sources(config: EncoderConfig, split: Split | Literal["all"]) -> dict[Split, IndexedDataset]:
    """A split that must be there, or all of them; a file that can't be decoded is an error.

    Training takes its neighbor instead, whose features would stand here under the name of the file.
    """
    if split == "all":
        sources = config.scaled_data.open_every()
    else:
        source = config.scaled_data.open(split)
        if source is None:
            raise ConfigError(f"`split`: this data has no `{split}`; `train` is always there.")
        sources = {split: source}
    for source in sources.values():
        source.bad_files = None
    return sources


def write_parquet(embedded: Embeddings, path: Path) -> None:
    """Columns ``id``, ``split``, ``label`` and ``domain`` (where known, by name) and ``features`` (a list of fixed length)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = embedded.features.numpy()
    columns: dict[str, Any] = {"id": pa.array(map(as_text, embedded.ids)), "split": pa.array(embedded.splits)}
    for name, (numbers, names) in embedded.annotations().items():
        if numbers is not None:
            values = [None if n < 0 else as_text(names[n] if names else str(n)) for n in numbers.tolist()]
            columns[name] = pa.array(values, pa.string())
    columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    pq.write_table(pa.table(columns).replace_schema_metadata(embedded.about), path)


def write_npz(embedded: Embeddings, path: Path) -> None:
    """Arrays ``id``, ``split``, ``features``, ``label`` and ``domain`` (numbers), ``classes``, ``domain_names``; no pickle."""
    arrays: dict[str, Any] = {"id": np.array(embedded.ids), "split": np.array(embedded.splits)}
    arrays["features"] = embedded.features.numpy()
    for name, (numbers, names) in embedded.annotations().items():
        if numbers is not None:
            arrays[name] = numbers.numpy()
        if names is not None:
            arrays["classes" if name == "label" else "domain_names"] = np.array(names)
    with path.open("wb") as file:  # numpy adds an ending to a path
        np.savez(file, about=np.array(json.dumps(embedded.about, ensure_ascii=False)), **arrays)


def check_output(text: str) -> Path:
    """The file to be written; a ConfigError where its ending is no format's, or its folder or the format's extra is absent."""
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
    with atomic_write(path) as temporary:
        (write_parquet if path.suffix == ".parquet" else write_npz)(embedded, temporary)
    count, width = embedded.features.shape
    parts = ", ".join(f"{len(source)} {split}" for split, source in embedded.sources.items())
    text = f"wrote {path}: {count} images of {embedded.first.name} ({parts}), {width} features each"
    console().print(text, markup=False)


def main() -> None:
    """The command line."""
    run_command("embed", EmbedConfig, embed_and_tell, describe_encoder(sys.argv[1:], ["encoder"]))


if __name__ == "__main__":
    main()
