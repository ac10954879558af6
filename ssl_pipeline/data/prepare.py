"""``ssl-pipeline prepare FOLDER``: reads every image once, reports what is wrong with which, and makes every start fast.

What it finds is kept outside the folder, in which nothing is changed: an index, the list of bad files and, if asked, the decoded
images. Stopped and started again, it continues; so it does when images were added. Archives (``--data webdataset``) are read as
training does, from front to back; a stream needs no index, but its length, which is printed.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from ssl_pipeline.config import options as parsers
from ssl_pipeline.config.base import ConfigError, UserError, joined
from ssl_pipeline.config.command import exit_with_error
from ssl_pipeline.config.files import existing_folder
from ssl_pipeline.data.image_index import TRAITS, ImageIndex, causes, first_levels, index_folder
from ssl_pipeline.data.scan import counting_bar, index_images
from ssl_pipeline.data.source import LOOKED_AT
from ssl_pipeline.data.sources import folder, webdataset
from ssl_pipeline.data.value_range import COLUMNS as VALUE_COLUMNS
from ssl_pipeline.data.value_range import describe_range, settle
from ssl_pipeline.logging.progress import console, print_table

Kind = Literal["folder", "domain_folder", "table"]
BAD_FILES = "bad_files.txt"
_PRINTED = 20
_READ_AS = {
    "I;16": "16 bits", "I;16B": "16 bits", "I": "32-bit integers", "F": "floats", "RGB;16": "the upper 8 of 16 bits are read", "CMYK": "to RGB", "P": "by its palette", "1": "black and white",
}  # fmt: skip
_TREATED = {"animated": "the first frame is taken", "rotated": "turned upright by EXIF", "transparent": "laid on white"}


def prepare(
    path: str, output: str | None = None, cache_side: int = 0, recheck: bool = False, kind: Kind = "folder"
) -> int:
    """Checks all files of a folder and indexes them; for the source ``folder`` each of ``train``, ``val`` and ``test``.

    Args:
        path: the folder; of a table the one that its paths start from.
        output: where to write; None is this user's cache.
        cache_side: see :func:`index_images`.
        recheck: read the files that have not changed, too, and compare their digests.
        kind: which source is to read it.

    Returns:
        The number of usable images.

    Raises:
        ConfigError: there is no such folder, nothing can be written, or fewer than two images are usable.
    """
    roots = [existing_folder(path, "prepare")]
    if kind == "folder":
        roots = list(dict.fromkeys(folder.Config(name="folder", path=path).folders().values()))
    usable = 0
    for root in roots:
        place = _output_folder(root, output)
        report = Report(index_images(root, place, cache_side, pixels=True, recheck=recheck), kind)
        _print_bad_files(str(root), report.usable, report.bad, place)
        for line in [*report.remarks(), f"wrote {place}"]:
            _print(line)
        usable += report.usable
    return _enough(path, usable)


def prepare_shards(path: str, output: str | None = None) -> int:
    """Decodes every image of tar archives once; nothing in them is unpickled or extracted.

    Args:
        path: an archive, a folder of them, or a pattern, as `data.path` of the source.
        output: where to write the list of bad files; None is this user's cache.

    Returns and raises as :func:`prepare`.
    """
    config = webdataset.Config(name="webdataset", path=path, channels=3, on_error="skip")
    stream = config.open_stream()
    place = _output_folder(stream.folder, output)
    usable, bad = 0, dict[str, str]()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, counting_bar() as bar:
        task = bar.add_task("reading archives", total=len(stream.shards))
        for count, faults in pool.map(stream.examine, range(len(stream.shards))):
            usable, bad = usable + count, bad | faults
            bar.advance(task)
    _print_bad_files(stream.name, usable, bad, place)
    _print(f"archives: {len(stream.shards)}, with {usable} usable images: data.length={usable}")
    _print(f"wrote {place}")
    value_range = config.value_range() if usable > 1 else None
    if value_range is not None:
        _print(
            f"more than 8 bits: {describe_range(value_range)}, by the first {LOOKED_AT} images; data.range=auto takes that for all"
        )
    return _enough(path, usable)


def _enough(path: str, usable: int) -> int:
    if usable < 2:
        raise ConfigError(f"{path!r} holds {usable} usable images, and at least two are needed.")
    return usable


def _output_folder(root: Path, output: str | None) -> Path:
    """Where what is found about a root is written, which is not in there."""
    base = Path(output).expanduser().resolve() if output else None
    place = index_folder(root, base)
    if base is not None and base.is_relative_to(root):
        raise ConfigError(f"`--output`: {output!r} lies in the folder of images, in which nothing is changed.")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{str(place)!r} can't be written ({error.strerror}): give `--output FOLDER`.") from error
    return place


def _print_bad_files(title: str, usable: int, bad: Mapping[str, str], place: Path) -> None:
    """Prints the verdicts and the first bad files, and writes the whole list to a folder."""
    lines = "".join(f"{file}\t{fault}\n" for file, fault in bad.items())
    (place / BAD_FILES).write_bytes(os.fsencode(lines))
    kinds = Counter(re.sub(r"\d+", "N", fault) for fault in bad.values())  # one verdict whatever its numbers
    rows = [["usable", str(usable)], *([verdict, str(count)] for verdict, count in kinds.most_common())]
    print_table(title, ["verdict", "files"], rows)
    for file, fault in list(bad.items())[:_PRINTED]:
        _print(f"  {file}: {fault}")
    if len(bad) > _PRINTED:
        _print(f"  … and {len(bad) - _PRINTED} more, in {place / BAD_FILES}")


def _print(text: str) -> None:
    encoding = console().encoding  # names of files may hold what a terminal, or UTF-8, can't show
    console().print(text.encode(encoding, "backslashreplace").decode(encoding), markup=False)


class Report:
    """The report on a folder, all of whose pixels were checked.

    Attributes:
        usable: how many files are images.
        bad: per file that is none, what is wrong with it.
        repeated: groups of files with the same bytes.
        disagreeing: those of them that lie in different class folders.
        classes: the class folders that hold usable images; ``empty``, those that hold none.
        outside: how many usable images lie in no class folder, where all should.
    """

    def __init__(self, index: ImageIndex, kind: Kind = "folder") -> None:
        self._index, levels = index, parsers.LEVELS_OF_CLASSES[kind]
        good = index.files.select(index.columns["fault"] == 0)
        self._good, self.usable, self.bad = good, len(good), index.faults_of(index.files)
        places = [first_levels(folder, levels) for folder in index.folders]
        of_file = [places[number] for number in good.column("folder").tolist()]
        used = set(of_file) - {""}
        flat = kind == "folder" and (len(used) < 2 or "" in of_file)  # which is read without labels
        self.classes = [] if flat else sorted({place.rpartition("/")[2] for place in used})
        self.empty = sorted(set(places) - used - {""})
        self.outside = of_file.count("") if kind == "domain_folder" else 0
        self._one_class = next(iter(used)) if flat and used and "" not in of_file else None
        _, group, sizes = np.unique(good.column("digest"), return_inverse=True, return_counts=True)
        groups: dict[int, list[int]] = {}
        for i in (sizes[group] > 1).nonzero()[0].tolist():
            groups.setdefault(int(group[i]), []).append(i)
        self.repeated = [[good[i] for i in alike] for alike in groups.values()]
        self.disagreeing = [
            files
            for files, alike in zip(self.repeated, groups.values(), strict=True)
            if self.classes and len({of_file[i].rpartition("/")[2] for i in alike} - {""}) > 1
        ]

    def remarks(self) -> list[str]:
        """What is worth knowing of the usable ones, a line each."""
        index, good = self._index, self._good
        modes = Counter(np.array(list(index.modes))[good.column("mode")].tolist())
        stored = [f"{n} {mode}{f' ({_READ_AS[mode]})' if mode in _READ_AS else ''}" for mode, n in modes.most_common()]
        lines = [f"stored as: {', '.join(stored)}"]
        for bit, name in enumerate(TRAITS):
            if count := int((good.column("traits") >> bit & 1).sum()):
                lines.append(f"{name}: {count} ({_TREATED[name]})")
        if value_range := settle("auto", {name: good.column(name) for name in VALUE_COLUMNS}):
            lines.append(
                f"more than 8 bits: {int((good.column('kind') > 0).sum())} images, of which {describe_range(value_range)}; "
                "data.range=auto takes that for all"
            )
        if self.repeated:
            repeats = sum(len(files) - 1 for files in self.repeated)
            lines.append(
                f"repeats: {repeats} files have the bytes of another, such as {' = '.join(self.repeated[0][:3])}"
            )
        if self.disagreeing:
            lines.append(
                f"labels disagree: {len(self.disagreeing)} images lie in several classes, such as "
                f"{' and '.join(self.disagreeing[0][:3])}"
            )
        if self.classes:
            lines.append(f"classes: {len(self.classes)}")
        if self._one_class:
            lines.append(f"one class only, {self._one_class!r}: its images are taken without labels")
        if self.outside:
            lines.append(f"left alone: {self.outside} images lie at no domain/class")
        if self.empty:
            lines.append(f"folders without a usable image: {joined(self.empty, _PRINTED)}")
        if index.ignored:
            count = sum(one.count for one in index.ignored)
            lines.append(f"ignored: {count} files: {'; '.join(causes(index.ignored, {}))}")
        if index.cache_side:
            sides = [good.column(f"cached_{name}").astype(np.int64) for name in ("width", "height", "channels")]
            cached = good.column("shard") >= 0
            lines.append(
                f"cache: {int(cached.sum())} images, shorter side {index.cache_side} px at most, "
                f"{int(np.prod(sides, 0)[cached].sum()) / 2**30:.2f} GiB"
            )
        return lines


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
    table = ["data.path=TABLE", f"data.root={options.folder}"]
    words = table if options.data == "table" else [f"data.path={options.folder}"]
    words += [f"data.prepared={options.output}"] if options.output and not shards else []
    words += ["data.cache=true"] if options.cache else []
    _print(f"train: {shlex.join(['ssl-pipeline', 'pretrain', f'data={options.data}', *words])}")


if __name__ == "__main__":
    main()
