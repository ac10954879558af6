from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking import knn_predict as lightlys_knn
from scipy.stats import ttest_1samp
from sklearn.linear_model import LogisticRegression

from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.evaluation.online import OnlineEvaluation
from ssl_pipeline.metrics import collapse
from ssl_pipeline.metrics.interval import holm, interval, paired_difference
from ssl_pipeline.metrics.knn import knn_accuracy, knn_predict
from ssl_pipeline.metrics.linear_probe import fit_linear
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec, finite
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing


def blobs(seed: int = 0, count: int = 60, classes: int = 3, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centers = torch.eye(classes, width) * 3
    return centers[labels] + torch.randn(count, width, generator=generator), labels


def test_knn_is_lightlys() -> None:
    bank, labels = blobs()
    queries, _ = blobs(1)
    theirs = lightlys_knn(F.normalize(queries), F.normalize(bank).T, labels, 3, knn_k=7, knn_t=0.1)[:, 0]
    assert torch.equal(knn_predict(queries, bank, labels, 3, k=7), theirs)


def test_knn_takes_all_rows_where_there_are_fewer_than_k() -> None:
    bank, labels = blobs(count=6)
    assert knn_accuracy(bank, labels, bank, labels, 3, k=50) == 1.0


def test_rows_without_a_label_neither_vote_nor_count() -> None:
    bank, labels = blobs()
    queries, asked = blobs(1, 30)
    hidden = labels.clone()
    hidden[::4] = -1
    unknown = asked.clone()
    unknown[::3] = -1
    known = unknown >= 0
    expected = knn_accuracy(queries[known], asked[known], bank[hidden >= 0], hidden[hidden >= 0], 3, k=5)
    assert knn_accuracy(queries, unknown, bank, hidden, 3, k=5) == expected
    for none, of in ((torch.full_like(asked, -1), labels), (asked, torch.full_like(labels, -1))):
        assert math.isnan(knn_accuracy(queries, none, bank, of, 3))  # which `finite` leaves out of every report


def test_collapse_figures_tell_collapse_from_health() -> None:
    torch.manual_seed(0)
    healthy, one_direction = torch.randn(200, 16), torch.randn(200, 1) * torch.ones(16)
    constant = torch.ones(200, 16) + 1e-5 * torch.randn(200, 16)
    assert collapse.feature_std(healthy) == pytest.approx(1, abs=0.05)
    assert collapse.feature_std(constant) < 1e-3
    assert collapse.effective_rank(healthy) > 14
    assert collapse.effective_rank(one_direction) == pytest.approx(1, abs=1e-3)
    assert collapse.effective_rank(torch.ones(9, 4)) == 1.0
    assert collapse.uniformity(constant) == pytest.approx(0, abs=1e-3)
    assert collapse.uniformity(healthy) < -3
    assert collapse.alignment(healthy, 3 * healthy) == pytest.approx(0, abs=1e-6)

    def verdict(features: torch.Tensor) -> str | None:
        figures = {"feature_std": collapse.feature_std(features), "effective_rank": collapse.effective_rank(features)}
        return collapse.verdict(figures, features.shape[1])

    assert verdict(healthy) is None
    assert "collapsed" in str(verdict(constant))
    assert "directions" in str(verdict(one_direction))


ROWS = {
    "none": torch.zeros(0, 6), "one": torch.ones(1, 6), "equal": torch.ones(3, 6), "zero": torch.zeros(3, 6),
    "two": torch.eye(2, 6), "not finite": torch.full((3, 6), torch.nan), "half finite": torch.tensor([[1.0] * 6, [torch.inf] * 6]),
}  # fmt: skip


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_a_figure_of_odd_rows_is_a_number_or_is_left_out(rows: torch.Tensor) -> None:
    labels, bank = torch.zeros(len(rows), dtype=torch.int64), torch.eye(6)
    measured = {
        "feature_std": collapse.feature_std(rows),
        "effective_rank": collapse.effective_rank(rows),
        "alignment": collapse.alignment(rows, rows),
        "uniformity": collapse.uniformity(rows),
        "knn": knn_accuracy(rows, labels, bank, torch.arange(6), 6),
        "knn_of_bank": knn_accuracy(bank, torch.arange(6), rows, labels, 6),
    }
    kept = finite(measured)
    assert all(math.isfinite(value) for value in kept.values())
    assert set(kept) == {name for name, value in measured.items() if math.isfinite(value)}
    if len(rows) > 1 and rows.isfinite().all():
        assert set(kept) == set(measured)
    if not rows.isfinite().all():  # an accuracy at chance level would hide that there are no features
        assert "knn" not in kept
        assert "knn_of_bank" not in kept
    collapse.verdict(kept, 6)  # says nothing of what is absent


def test_probe_is_scikit_learns() -> None:
    features, labels = blobs()
    standard = ((features - features.mean(0)) / features.std(0, correction=0)).double()
    decay = 0.01
    theirs = LogisticRegression(C=1 / (decay * len(labels)), tol=1e-10, max_iter=10_000).fit(standard, labels)
    weight, bias = fit_linear(features, labels, 3, decay, iterations=1000)
    ours = torch.softmax((features @ weight.T + bias).double(), 1)
    torch.testing.assert_close(ours, torch.as_tensor(theirs.predict_proba(standard)), atol=1e-4, rtol=0)


def test_interval_is_students() -> None:
    found = interval([0.70, 0.72, 0.74])
    assert found.mean == pytest.approx(0.72)
    assert found.half == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-5)
    assert interval([0.5]).half == math.inf
    assert interval([0.5]).percent() == "50.0"
    assert paired_difference([0.8, 0.9], [0.7, 0.8]).mean == pytest.approx(0.1)
    assert paired_difference([0.8, 0.9], [0.7, 0.8]).half == pytest.approx(0, abs=1e-9)


def test_p_values_are_scipys_and_holms_correction_is_the_step_down_of_a_loop() -> None:
    differences = [[0.10, 0.14, 0.06], [0.3, -0.1, 0.2, 0.25], [-0.2, -0.21, -0.19], [0.05, 0.02, 0.03, 0.04, 0.01]]
    p_values = [interval(values).p for values in differences]
    for p, values in zip(p_values, differences, strict=True):
        assert p == pytest.approx(float(ttest_1samp(values, 0).pvalue), abs=1e-12)
    order, allowed, rejected = sorted(range(4), key=lambda i: p_values[i]), 4, set[int]()
    for place in order:  # Holm's own words: compare the smallest with α/m, the next with α/(m − 1), until one fails
        if p_values[place] > 0.05 / allowed:
            break
        rejected.add(place)
        allowed -= 1
    corrected = holm(p_values)
    assert {i for i, p in enumerate(corrected) if p <= 0.05} == rejected == {2, 3}
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    alone = holm([math.nan, 0.02])
    assert math.isnan(alone[0])
    assert alone[1] == 0.02
    assert (interval([0.1, 0.1]).p, interval([0.0, 0.0]).p) == (0.0, 1.0)
    assert math.isnan(interval([0.1]).p)
    assert holm([]) == []


def test_online_knn_asks_labeled_images_alone_and_is_absent_without_any() -> None:
    pixels = torch.randint(0, 256, (24, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train = ArrayDataset("train", pixels[:16], torch.arange(16) % 2, ("a", "b"))
    known = torch.tensor([0, 1, 0, 1, -1, -1, -1, -1])
    config = ViewsConfig.model_validate({"size": 12}).for_channels(3)[0]
    views, preprocessing = Views(config, (0.5,) * 3, (0.25,) * 3, 0), Preprocessing(12, (0.5,) * 3, (0.25,) * 3)
    backbone, neck = BackboneConfig(width=4), NeckConfig()
    encoder, _ = EncoderSpec(
        backbone=backbone, neck=neck, channels=3, size=12, mean=(0.5,) * 3, std=(0.25,) * 3
    ).build()

    def knn(val: ArrayDataset) -> float | None:
        found = OnlineEvaluation(train, val, views, preprocessing, DistInfo(0, 1, torch.device("cpu")))(encoder)
        return found.get("eval/knn")

    whole = ArrayDataset("val", pixels[16:], known, ("a", "b"))
    assert knn(whole) == knn(whole.select(torch.arange(4)))
    assert knn(whole.select(torch.arange(4, 8))) is None
