"""What is looked at while stage one runs: never the test set."""

from __future__ import annotations

import torch

from ssl_pipeline.data.loader import Preprocessing, Share
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.draws import permutation
from ssl_pipeline.evaluate import collapse
from ssl_pipeline.evaluate.features import extract, extract_readable, two_views
from ssl_pipeline.evaluate.knn import knn_accuracy
from ssl_pipeline.model.encoder import Encoder
from ssl_pipeline.views.policy import Views


class OnlineEvaluation:
    """kNN accuracy on ``dev`` where labels exist, and the collapse figures always.

    Args:
        train: the pretraining images; with labels, up to ``bank_size`` of them are kNN's bank.
        dev: held-out training images with labels, or None.
        views: two random views of an image give alignment.
        preprocessing: what the encoder expects.
        share: this process's share.
        k: neighbours.
        bank_size: most rows in kNN's bank.
        sample: most images for the collapse figures.

    Attributes:
        seen: images, the numbers of those that were looked at last, and their features (N, D): pictures are drawn of them.
    """

    def __init__(
        self,
        train: Indexed,
        dev: Indexed | None,
        views: Views,
        preprocessing: Preprocessing,
        share: Share,
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
        self._queries = torch.arange(0)
        if dev is not None and dev.labels is not None:
            self._queries = (dev.labels >= 0).nonzero()[:, 0]
        self._looked_at = dev if dev is not None else train
        self._sample = permutation(len(self._looked_at), "online evaluation", "sample")[:sample].sort().values
        self.seen: tuple[Indexed, torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """The figures of an encoder: ``eval/knn``, ``eval/feature_std``, ``eval/effective_rank`` and others."""
        figures = self._collapse(encoder)
        if self._dev is not None and len(self._queries) and self._train.labels is not None and len(self._bank):
            figures["knn"] = self._knn(encoder, self._dev)
        return {f"eval/{name}": value for name, value in figures.items()}

    def _knn(self, encoder: Encoder, dev: Indexed) -> float:
        assert self._train.labels is not None
        assert dev.labels is not None
        assert dev.classes is not None
        bank, voting = extract_readable(encoder, self._train, self._preprocessing, self._share, self._bank)
        queries, asked = extract_readable(encoder, dev, self._preprocessing, self._share, self._queries)
        labels = self._train.labels[voting]
        return knn_accuracy(queries, dev.labels[asked], bank, labels, len(dev.classes), self._k)

    def _collapse(self, encoder: Encoder) -> dict[str, float]:
        features = extract(encoder, self._looked_at, self._preprocessing, self._share, self._sample)
        self.seen = self._looked_at, self._sample, features
        first, second = two_views(encoder, self._looked_at, self._views, self._share.device, self._sample[:128])
        return {
            "feature_std": collapse.feature_std(features),
            "effective_rank": collapse.effective_rank(features),
            "alignment": collapse.alignment(first, second),
            "uniformity": collapse.uniformity(features),
        }
