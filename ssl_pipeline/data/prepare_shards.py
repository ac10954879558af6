"""``ssl-pipeline prepare SHARDS --data webdataset``: decodes every image of tar archives once, and says what is wrong with which.

Archives are read from front to back as training does, and nothing in them is unpickled or extracted. A stream needs no manifest; what
it does need is its length, which is told.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.manifest import made_place
from ssl_pipeline.data.scan import counting_bar
from ssl_pipeline.data.source import LOOKED_AT
from ssl_pipeline.data.sources.webdataset import Config
from ssl_pipeline.data.value_range import describe_range
from ssl_pipeline.data.verdicts import log_bad_files, print_bad_files


def prepare_shards(path: str, output: str | None = None) -> int:
    """Looks at archives.

    Args:
        path: an archive, a folder of them, or a pattern, as `data.path` of the source.
        output: where to write the list of what is bad; None is this user's cache.

    Returns:
        The number of usable images.

    Raises:
        ConfigError: there are no archives, nothing can be written, or fewer than two images are usable.
    """
    config = Config(name="webdataset", path=path, channels=3, on_unreadable="skip")
    stream = config.open_stream()
    place = made_place(stream.folder, output)
    usable, bad = 0, dict[str, str]()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, counting_bar() as bar:
        row = bar.add_task("reading archives", total=len(stream.shards))
        for count, faults in pool.map(stream.examine, range(len(stream.shards))):
            usable, bad = usable + count, bad | faults
            bar.advance(row)
    print_bad_files(stream.name, usable, bad, place)
    log_bad_files(f"archives: {len(stream.shards)}, with {usable} usable images: data.length={usable}")
    log_bad_files(f"wrote {place}")
    if usable < 2:
        raise ConfigError(f"{path!r} holds {usable} usable images, and at least two are needed.")
    value_range = config.value_range()
    if value_range is not None:
        log_bad_files(
            f"more than 8 bits: {describe_range(value_range)}, by the first {LOOKED_AT} images; data.range=auto takes that for all"
        )
    return usable
