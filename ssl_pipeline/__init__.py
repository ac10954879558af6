"""Self-supervised pretraining for images: stage one learns a backbone, stage two puts a head on it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ssl-pipeline")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"
