"""What is looked at while stage one runs: never the test set."""

from __future__ import annotations

import torch

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.evaluation.features import extract, extract_readable, two_views
from ssl_pipeline.metrics import collapse
from ssl_pipeline.metrics.knn import knn_accuracy
from ssl_pipeline.models.artifact import finite
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing

_FEW_IMAGES = 32  # fewer give figures of collapse that say more about their number than about the features
_FEWEST_FOR_RANK = 8


class OnlineEvaluation:
    """kNN accuracy on ``dev`` where labels exist, and the collapse figures always.

    The collapse figures need no held-out images: where ``dev`` has only a few, training images are taken.

    Args:
        train: the pretraining images; with labels, up to ``bank_size`` of them are kNN's bank.
        dev: held-out training images with labels, or None.
        views: two random views of an image give alignment.
        preprocessing: what the encoder expects.
        share: this process's share.
        k: neighbors.
        bank_size: most rows in kNN's bank.
        sample: most images for the collapse figures.

    Attributes:
        seen: images, the numbers of those that were looked at last, and their features (N, D): pictures are drawn of them.
    """

    def __init__(
        self,
        train: IndexedDataset,
        dev: IndexedDataset | None,
        views: Views,
        preprocessing: Preprocessing,
        share: DistInfo,
        k: int = 20,
        bank_size: int = 10_000,
        sample: int = 512,
    ) -> None:
        self._train, self._dev, self._views, self._k = train, dev, views, k
        self._preprocessing, self._share = preprocessing, share
        bank = permutation(len(train), "online evaluation", "bank")
        if train.labels is not None:
            bank = bank[train.labels[bank] >= 0]  # −1: this image has no label to vote with
        self._bank = bank[:bank_size].sort().values
        labels = dev.labels if dev is not None else None
        self._queries = (labels >= 0).nonzero()[:, 0] if labels is not None else torch.arange(0)
        self._looked_at = dev if dev is not None and len(dev) >= min(_FEW_IMAGES, len(train)) else train
        self._sample = permutation(len(self._looked_at), "online evaluation", "sample")[:sample].sort().values
        self.seen: tuple[IndexedDataset, torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """The figures of an encoder: ``eval/knn``, ``eval/feature_std``, ``eval/effective_rank`` and others.

        Each one is finite; what can't be measured, such as kNN without a labeled image, is absent.
        """
        figures = self._collapse(encoder)
        if self.knn_images:
            figures["knn"] = self._knn(encoder)
        return finite({f"eval/{name}": value for name, value in figures.items()})

    @property
    def knn_images(self) -> int:
        """How many images kNN is measured on: those of ``dev`` with a label, 0 where no training image has one."""
        return len(self._queries) if self._train.labels is not None and len(self._bank) else 0

    def _knn(self, encoder: Encoder) -> float:
        train, dev = self._train, self._dev
        assert train.labels is not None
        assert dev is not None
        assert dev.labels is not None
        assert dev.classes is not None
        bank, voting = extract_readable(encoder, train, self._preprocessing, self._share, self._bank)
        queries, asked = extract_readable(encoder, dev, self._preprocessing, self._share, self._queries)
        return knn_accuracy(queries, dev.labels[asked], bank, train.labels[voting], len(dev.classes), self._k)

    def _collapse(self, encoder: Encoder) -> dict[str, float]:
        features = extract(encoder, self._looked_at, self._preprocessing, self._share, self._sample)
        self.seen = self._looked_at, self._sample, features
        first, second = two_views(encoder, self._looked_at, self._views, self._share.device, self._sample[:128])
        figures = {"feature_std": collapse.feature_std(features)}
        if len(features) >= _FEWEST_FOR_RANK:
            figures["effective_rank"] = collapse.effective_rank(features)
        return {
            **figures,
            "alignment": collapse.alignment(first, second),
            "uniformity": collapse.uniformity(features),
        }
