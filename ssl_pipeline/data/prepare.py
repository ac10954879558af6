"""``ssl-pipeline prepare FOLDER``: reads every image once, says what is wrong with which, and makes every start fast.

What it finds is kept outside the folder, in which nothing is changed: a manifest, the list of bad files and, on wish, the
decoded images. Stopped and started again, it goes on where it was; so it does when images were added.
"""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ssl_pipeline.config import options as parsers
from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.command import exit_with_error
from ssl_pipeline.data.lost_files import causes, total
from ssl_pipeline.data.manifest import TRAITS, Manifest, made_place
from ssl_pipeline.data.prepare_shards import prepare_shards
from ssl_pipeline.data.scan import Wanted, scan_images
from ssl_pipeline.data.sources.folder import Config, existing_folder
from ssl_pipeline.data.value_range import describe_range, settle
from ssl_pipeline.data.verdicts import TOLD, log_bad_files, print_bad_files

Kind = Literal["folder", "domain_folder", "table"]
_READ_AS = {
    "I;16": "16 bits", "I;16B": "16 bits", "I": "32-bit integers", "F": "floats", "RGB;16": "the upper 8 of 16 bits are read", "CMYK": "to RGB", "P": "by its palette", "1": "black and white",
}  # fmt: skip


def prepare(
    path: str, output: str | None = None, cache_side: int = 0, recheck: bool = False, kind: Kind = "folder"
) -> int:
    """Looks at a folder as the source of its kind does: ``folder`` looks at each of its ``train``, ``val`` and ``test``.

    Args:
        path: the folder; of a table the one that its paths start from.
        output: where to write; None is this user's cache.
        cache_side: also write the decoded images, their shorter sides limited to so many pixels; 0 for none.
        recheck: read the files that have not changed, too, and compare their digests.
        kind: which source is to read it.

    Returns:
        The number of usable images.

    Raises:
        ConfigError: there is no such folder, nothing can be written, or fewer than two images are usable.
    """
    usable = 0
    for root in _roots(path, kind):
        place = made_place(root, output)
        manifest = scan_images(root, place, Wanted(True, cache_side, recheck))
        report = Report(manifest, kind)
        report.show(place)
        usable += report.usable
    if usable < 2:
        raise ConfigError(f"{path!r} holds {usable} usable images, and at least two are needed.")
    return usable


def _roots(path: str, kind: Kind) -> list[Path]:
    """The folders that a source of this kind has a manifest of each."""
    if kind == "folder":
        return list(dict.fromkeys(Config(name="folder", path=path).folders().values()))
    return [existing_folder(path, "prepare")]


class Report:
    """What is told of a folder.

    Args:
        manifest: of the folder, all pixels checked.
        kind: which source reads it: what its folders mean.

    Attributes:
        usable: how many files are images.
        bad: per file that is none, what is wrong with it.
        alike: groups of files with the same bytes.
        disagreeing: those of them that lie in different class folders.
        classes: the names of the class folders that hold usable images.
        empty: those that hold none.
        outside: how many usable images lie in no class folder, where all should.
    """

    def __init__(self, manifest: Manifest, kind: Kind = "folder") -> None:
        self._manifest, files, rows = manifest, manifest.files, manifest.rows()
        self._good = rows["fault"] == 0
        self._rows = rows
        self.usable = int(self._good.sum())
        self.bad = {files[i]: manifest.faults[rows["fault"][i]] for i in (~self._good).nonzero()[0].tolist()}
        self.alike = self._same_bytes()
        levels = parsers.LEVELS_OF_CLASSES[kind]
        places = [_first(folder, levels) for folder in manifest.folders]
        of_file = [places[number] for number in rows["folder"][self._good].tolist()]
        used = set(of_file) - {""}
        flat = kind == "folder" and (len(used) < 2 or "" in of_file)  # which is read without labels
        self.classes = [] if flat else sorted({place.rpartition("/")[2] for place in used})
        self.empty = sorted(set(places) - used - {""})
        self.outside = of_file.count("") if kind == "domain_folder" else 0
        self.disagreeing = [group for group in self.alike if self.classes and len(_classes_of(group, levels)) > 1]
        self._one_class = next(iter(used)) if flat and used and "" not in of_file else None

    def _same_bytes(self) -> list[list[str]]:
        good = self._good.nonzero()[0]
        _, group, sizes = np.unique(self._rows["digest"][good], return_inverse=True, return_counts=True)
        repeated = good[sizes[group] > 1]
        groups: dict[int, list[str]] = {}
        for row in repeated.tolist():
            groups.setdefault(int(self._rows["digest"][row]), []).append(self._manifest.files[row])
        return list(groups.values())

    def remarks(self) -> list[str]:
        """What is worth knowing of the usable ones."""
        manifest, rows, remarks = self._manifest, self._rows[self._good], list[str]()
        modes = Counter(manifest.modes[code] for code in rows["mode"].tolist())
        stored = [
            f"{n} {mode} ({_READ_AS[mode]})" if mode in _READ_AS else f"{n} {mode}" for mode, n in modes.most_common()
        ]
        remarks.append(f"stored as: {', '.join(stored)}")
        treated = {
            "animated": "the first frame is taken",
            "rotated": "turned upright by EXIF",
            "transparent": "laid on white",
        }
        for bit, name in enumerate(TRAITS):
            count = int((rows["traits"] >> bit & 1).sum())
            if count:
                remarks.append(f"{name}: {count} ({treated[name]})")
        value_range = settle("auto", manifest.files.select(torch.from_numpy(self._good.nonzero()[0])))
        if value_range is not None:
            deep = int((rows["kind"] > 0).sum())
            remarks.append(
                f"more than 8 bits: {deep} images, of which {describe_range(value_range)}; data.range=auto takes that for all"
            )
        if self.alike:
            repeats = sum(len(group) - 1 for group in self.alike)
            remarks.append(
                f"repeats: {repeats} files have the bytes of another, such as {' = '.join(self.alike[0][:3])}"
            )
        if self.disagreeing:
            told = " and ".join(self.disagreeing[0][:3])
            remarks.append(f"labels disagree: {len(self.disagreeing)} images lie in several classes, such as {told}")
        if self.classes:
            remarks.append(f"classes: {len(self.classes)}")
        if self._one_class is not None:
            remarks.append(f"one class only, {self._one_class!r}: its images are taken without labels")
        if self.outside:
            remarks.append(f"left alone: {self.outside} images lie at no domain/class")
        if self.empty:
            remarks.append(f"folders without a usable image: {', '.join(self.empty[:TOLD])}")
        if manifest.others:
            remarks.append(f"ignored: {total(manifest.others)[0]} files: {'; '.join(causes(manifest.others, {}))}")
        if manifest.cache_side:
            cached = rows["shard"] >= 0
            size = (rows["cached_width"].astype(np.int64) * rows["cached_height"] * rows["cached_channels"])[
                cached
            ].sum()
            remarks.append(
                f"cache: {int(cached.sum())} images, shorter side {manifest.cache_side} px at most, {size / 2**30:.2f} GiB"
            )
        return remarks

    def show(self, place: Path) -> None:
        """Prints it, and writes the whole list of bad files beside the manifest."""
        print_bad_files(str(self._manifest.root), self.usable, self.bad, place)
        for remark in self.remarks():
            log_bad_files(remark)
        log_bad_files(f"wrote {place}")


def _first(folder: str, levels: int) -> str:
    """The first levels of a folder's path, "" if it has fewer."""
    names = [] if folder == "." else folder.split("/")
    return "/".join(names[:levels]) if len(names) >= levels else ""


def _classes_of(files: list[str], levels: int) -> set[str]:
    return {_first(file.rpartition("/")[0] or ".", levels).rpartition("/")[2] for file in files} - {""}


def main() -> None:
    """The command line."""
    parser = parsers.parser("prepare")
    options = parser.parse_args()
    if options.cache and options.cache < 8:
        parser.error("--cache must be 8 pixels or more")
    shards = options.data == "webdataset"
    if shards and (options.cache or options.recheck):
        parser.error("archives have no cache, and are read whole each time: leave out --cache and --recheck")
    try:
        if shards:
            prepare_shards(options.folder, options.output)
        else:
            prepare(options.folder, options.output, options.cache, options.recheck, options.data)
    except UserError as error:
        exit_with_error(error, "ssl-pipeline prepare --help")
    where = (
        ["data.path=TABLE", f"data.root={options.folder}"]
        if options.data == "table"
        else [f"data.path={options.folder}"]
    )
    then = [f"data.prepared={options.output}"] if options.output and not shards else []
    cached = ["data.cache=true"] if options.cache else []
    log_bad_files(f"train: {shlex.join(['ssl-pipeline', 'pretrain', f'data={options.data}', *where, *then, *cached])}")


if __name__ == "__main__":
    main()
