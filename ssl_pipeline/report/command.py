"""``ssl-pipeline report RUN…``: what runs learned, on one page that needs no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ssl_pipeline.config import options as parsers
from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.command import check_folder_of, exit_with_error
from ssl_pipeline.config.files import atomic_write_text
from ssl_pipeline.logging.progress import console
from ssl_pipeline.report.images import RunImages, run_images
from ssl_pipeline.report.page import page
from ssl_pipeline.report.read import RunRecord, read_runs


def report(
    folders: Sequence[Path], output: Path | None = None, refresh: int = 0,
    images: Callable[[RunRecord], RunImages] = run_images,
) -> tuple[Path, list[RunRecord]]:  # fmt: skip
    """Writes the page; returns its place, and the runs on it.

    Args:
        folders: of runs, or of folders of runs.
        output: the page; by default ``report.html`` in the one folder, or in the current one for several.
        refresh: seconds after which the page reloads itself while a run goes on; 0 for never.
        images: gives what there is to see of a run.

    Raises:
        ConfigError: a folder that holds no run, or a page that can't be written.
    """
    path = output or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output: {str(path)!r} is no page's name: end it in .html.")
    if output is not None:
        check_folder_of(path, "--output")
    runs = read_runs(folders)
    text = page(runs, refresh if _going(runs) else 0, images)
    try:
        atomic_write_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} can't be written ({error.strerror}): name another file by --output."
        ) from error
    return path, runs


def _going(runs: Sequence[RunRecord]) -> bool:
    return any(run.state == "running" for run in runs)


def watch(folders: Sequence[Path], output: Path | None, seconds: int) -> Path:
    """Writes the page again and again until no run is going any more; see :func:`report`."""
    images = ImagesCache()
    path, runs = report(folders, output, seconds, images)
    console().print(f"wrote {path}: open it, it refreshes itself every {seconds} s (Ctrl-C ends this)", markup=False)
    while _going(runs):
        time.sleep(seconds)
        path, runs = report(folders, output, seconds, images)
    console().print(f"no run is going any more: {path} is as it stays", markup=False)
    return path


class ImagesCache:
    """Keeps each run's images until its encoder is written again: a watched page is written every few seconds."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Path, float], RunImages] = {}

    def __call__(self, run: RunRecord) -> RunImages:
        weights = run.folder / "encoder.safetensors"
        key = run.folder, weights.stat().st_mtime if weights.is_file() else 0.0
        if key not in self._seen:
            self._seen[key] = run_images(run)
        return self._seen[key]


def main() -> None:
    """The command line."""
    options = parsers.parser("report").parse_args()
    try:
        if options.watch is None:
            path, _ = report(options.run, options.output)
            console().print(f"wrote {path}", markup=False)
        else:
            watch(options.run, options.output, options.watch)
    except UserError as error:
        exit_with_error(error, "ssl-pipeline report --help")
    except KeyboardInterrupt:
        console().print("stopped; the page stays as it was written last", markup=False)


if __name__ == "__main__":
    main()
