"""What the first images of a stream say of all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO

from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import Sample
from ssl_pipeline.data.decode import is_grayscale


def channels_of(samples: Sequence[Sample]) -> int:
    """What a few images say of all: 1 if they are all grayscale, 3 otherwise. One alone may be the only grayscale one.

    Raises:
        ConfigError: none of them is an image.
    """
    found = set[int]()
    for sample in samples:
        # Decoders answer damaged bytes with nearly any error; training tells it when the image's turn comes.
        with suppress(Exception), Image.open(BytesIO(sample.data)) as image:
            found.add(1 if is_grayscale(image.mode) else 3)
    if not found:
        raise ConfigError(
            f"{samples[0].name} can't be read as an image, so its channels are not known: set `data.channels`, or mend it."
        )
    return max(found)
