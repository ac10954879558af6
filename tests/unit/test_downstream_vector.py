"""Tasks on one row of features, on images whose right answer is known."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, f1_score, r2_score, recall_score
from timm.models import group_parameters
from timm.optim._param_groups import param_groups_layer_decay

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.targets import NumericTargets
from ssl_pipeline.downstream import classification, multi_label, regression, retrieval
from ssl_pipeline.downstream.labels import LabelsConfig, draw
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.downstream.retrieval import KNNHead
from ssl_pipeline.downstream.task import DownstreamTask
from ssl_pipeline.evaluation.result import Result
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.metrics.linear_probe import fit_labels, fit_ridge
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Encoder, EncoderSpec
from ssl_pipeline.models.heads import LinearHead
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from tests.runs import same_bytes
from tests.shapes import number_table, scene


def encoder(name: str = "small_resnet", size: int = 16) -> Encoder:
    blueprint = EncoderSpec(
        backbone=BackboneConfig(name=name, width=4),
        neck=NeckConfig(),
        channels=3,
        size=size,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    return blueprint.build()[0]


def run(output: Path, *overrides: str) -> Result:
    known = any(override.startswith("encoder=") for override in overrides)
    fresh = [] if known else ["init=random", "backbone.width=8"]
    common = ["tracking=off", "num_workers=0", f"output={output}", *fresh]
    return finetune(load("finetune", FinetuneConfig, [*common, *overrides]))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return number_table(tmp_path_factory.mktemp("numbers"), 160)


@pytest.fixture(scope="module")
def stage_one(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps, for BatchNorm's statistics: without them the features of a probe are not those of training."""
    words = [
        "tracking=off", "num_workers=0", "data=table", f"data.path={table}", "transform=small", "backbone.width=8", "batch_size=32",
        "steps=20", "pretext.hidden_width=16", "pretext.projection_width=16", "evaluate_every=0 steps",
    ]  # fmt: skip
    return pretrain(load("pretrain", PretrainConfig, [*words, f"output={tmp_path_factory.mktemp('one') / 'run'}"]))


LABELS = ["downstream=multi_label", "data.target_columns=[square,circle]"]
VALUES = ["downstream=regression", "data.target_columns=[red]"]


@pytest.mark.parametrize(("task", "figure", "least"), [(LABELS, "mean_average_precision", 0.9), (VALUES, "r2", 0.5)])
@pytest.mark.parametrize("regime", ["frozen", "lp_ft", "end_to_end", "scratch"])
def test_numbers_are_learned_in_every_regime(
    table: Path, stage_one: Path, tmp_path: Path, task: list[str], figure: str, least: float, regime: str
) -> None:
    lengths = [] if regime == "frozen" else ["regime.length=40 steps", "regime.min_steps=0", "regime.batch_size=32"]
    data = ["data=table", f"data.path={table}", f"regime={regime}", "labels.validation=0"]
    rate = [] if regime == "frozen" else ["regime.optim.lr=0.01"]
    result = run(tmp_path / "run", *data, *task, *lengths, *rate, "regime.weight_decays=[1.0]", f"encoder={stage_one}")
    assert result.interval(figure).mean > least
    assert next(iter(result.figures[0])) == figure
    model = load_model(result.folder)
    assert model.card.classes == (("square", "circle") if figure != "r2" else ("red",))
    blank = scene(0)
    blank.image[:] = 90
    answer = model.predict([Image.fromarray(blank.image)])
    assert answer.shape == (1, len(model.card.classes or ()))


@given(seed=st.integers(0, 2**31), decay=st.sampled_from([1e-3, 0.1]))
@settings(max_examples=15, deadline=None)
def test_solved_heads_are_sklearns(seed: int, decay: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(60, 5, generator=generator) * torch.tensor([1.0, 5, 0.1, 2, 1]) + 3
    values = features @ torch.randn(5, 2, generator=generator) + torch.randn(60, 2, generator=generator)
    values[torch.rand(60, 2, generator=generator) < 0.2] = torch.nan
    weight, bias = fit_ridge(features, values, decay)
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    labels = torch.where(values.isnan(), values, (values > values.nanmean(0)).float())
    label_weight, label_bias = fit_labels(features, labels, decay)
    for column in range(2):
        known = ~values[:, column].isnan()
        x, y = standard[known].double().numpy(), values[known, column].double().numpy()
        ridge = Ridge(alpha=decay * len(y)).fit(x, y)
        mine = (features @ weight[column] + bias[column])[known]
        np.testing.assert_allclose(mine.numpy(), ridge.predict(x), rtol=1e-3, atol=1e-3)
        logistic = LogisticRegression(C=1 / (decay * len(y)), tol=1e-8, max_iter=1000)
        logistic.fit(x, labels[known, column].numpy())
        logits = (features @ label_weight[column] + label_bias[column])[known]
        np.testing.assert_allclose(logits.numpy(), logistic.decision_function(x), rtol=0.02, atol=0.02)


def test_figures_of_numbers_are_sklearns_and_pass_over_what_is_not_known() -> None:
    torch.manual_seed(0)
    predictions, truth = torch.randn(50, 2), torch.randn(50, 2)
    truth[::7, 0] = torch.nan
    known = ~truth.isnan()
    values = regression.Config(name="regression").build(encoder(), 2)
    expected = np.mean([r2_score(truth[known[:, k], k], predictions[known[:, k], k]) for k in range(2)])
    assert values.score(predictions, truth)["r2"] == pytest.approx(expected, abs=1e-5)
    labels = torch.where(truth.isnan(), truth, (truth > 0).float())
    task = multi_label.Config(name="multi_label").build(encoder(), 2)
    expected = np.mean([average_precision_score(labels[known[:, k], k], predictions[known[:, k], k]) for k in range(2)])
    assert task.score(predictions, labels)["mean_average_precision"] == pytest.approx(expected, abs=1e-5)


def test_labels_that_nothing_can_be_measured_of_are_left_out_and_counted() -> None:
    torch.manual_seed(0)
    logits, truth = 30 * torch.randn(60, 5), (torch.rand(60, 5) < 0.3).float()
    truth[:, 1], truth[:, 3] = 0, 1  # without a positive, and without a negative
    truth[::5] = torch.nan
    known = ~truth[:, 0].isnan()
    task = multi_label.Config(name="multi_label").build(encoder(), 5)
    figures, measured = task.score(logits, truth), [0, 2, 4]
    precisions = [average_precision_score(truth[known, k], logits[known, k]) for k in measured]
    f1s = [f1_score(truth[known, k], logits[known, k] > 0) for k in measured]
    assert figures["mean_average_precision"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert figures["f1"] == pytest.approx(np.mean(f1s), abs=1e-6)
    assert figures["labels_measured"] == 3
    perfect = task.score(truth.nan_to_num() * 10 - 5, truth)
    assert perfect == {"mean_average_precision": 1, "f1": 1, "labels_measured": 3}
    assert task.score(logits[:, [1, 3]], truth[:, [1, 3]]) == {"labels_measured": 0}
    alone = task.score(logits[:, :1], truth[:, :1])  # one label, and nothing left out
    assert alone["mean_average_precision"] == pytest.approx(precisions[0], abs=1e-6)
    assert "labels_measured" not in alone


def test_devues_without_spread_and_classes_without_images_are_left_out_and_counted() -> None:
    torch.manual_seed(0)
    predictions, truth = torch.randn(30, 4), torch.randn(30, 4)
    truth[:, 1], truth[:, 2] = 3, torch.nan
    values = regression.Config(name="regression").build(encoder(), 4)
    figures = values.score(predictions, truth)
    assert figures["r2"] == pytest.approx(r2_score(truth[:, [0, 3]], predictions[:, [0, 3]]), abs=1e-5)
    error = (predictions - truth)[:, [0, 1, 3]].abs().mean()  # nothing is known of column 2
    assert figures["mean_absolute_error"] == pytest.approx(float(error), abs=1e-6)
    assert figures["values_measured"] == 2
    assert values.score(predictions[:1], truth[:1])["values_measured"] == 0  # one image has no spread
    task = classification.Config(name="classification").build(encoder(), 4)
    labels = torch.tensor([0, 2, 3])[torch.randint(0, 3, (30,))]
    classes = task.score(predictions, labels)
    expected = recall_score(labels, predictions.argmax(1), labels=[0, 2, 3], average="macro")
    assert classes["class_mean_accuracy"] == pytest.approx(expected, abs=1e-6)
    assert classes["classes_measured"] == 3
    assert "classes_measured" not in task.score(predictions[:4], torch.arange(4))
    rows = Result(Path("run"), "test", [classes]).rows(in_percent=True)
    assert rows[-1] == ["classes_measured", "3"]


def test_held_out_images_that_nothing_can_be_measured_on_are_refused() -> None:
    images = ArrayDataset("x", torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    train, held_out = torch.tensor([[0.0], [1], [0], [1]]), torch.full((4, 1), 1.0)
    sides = [images.with_annotations(NumericTargets(values, ("day",))) for values in (train, held_out)]
    assert "each label is the same in all images to measure on" in multi_label.Config(name="m").check(*sides)[0]
    assert "each value is the same in all images to measure on" in regression.Config(name="r").check(*sides)[0]
    assert not multi_label.Config(name="m").check(sides[0], sides[0])


def test_a_query_without_a_match_lowers_no_mean_and_is_counted() -> None:
    torch.manual_seed(0)
    task = retrieval.Config(name="retrieval", k=3, recall_at=(1, 5)).build(encoder(), 4)
    task.fit_head(torch.randn(20, task.width), torch.arange(20) % 3, 0.0)
    queries, labels = torch.randn(16, task.width), torch.arange(16) % 4  # nothing remembered is of class 3
    known = labels < 3
    figures, of_known = task.evaluate_features(queries, labels), task.evaluate_features(queries[known], labels[known])
    assert figures["queries_measured"] == 12
    for name in ("mean_average_precision", "recall_at_1", "recall_at_5"):
        assert figures[name] == of_known[name]
    assert figures["knn_accuracy"] == pytest.approx(of_known["knn_accuracy"] * 12 / 16)
    assert "queries_measured" not in of_known


@pytest.mark.parametrize("truth", [[[2.0], [2.0], [2.0]], [[2.0]], [[torch.nan], [2.0], [torch.nan]]])
def test_targets_that_are_all_the_same_have_no_r2(truth: list[list[float]]) -> None:
    """Divided by almost nothing it would be a number of minus ten digits, and a mean over values would be that number."""
    targets = torch.tensor(truth)
    task = regression.Config(name="regression").build(encoder(), 1)
    assert task.score(torch.ones(len(targets), 1), targets) == {"mean_absolute_error": 1.0, "values_measured": 0}
    both = torch.cat([targets, torch.arange(len(targets))[:, None].float()], 1)
    if len(targets) > 1:  # the other value's counts alone
        assert task.score(both.nan_to_num(0), both)["r2"] == pytest.approx(1.0)


def test_a_value_that_is_not_known_teaches_nothing() -> None:
    torch.manual_seed(0)
    task = regression.Config(name="regression", loss="huber").build(encoder(), 2)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    values = torch.tensor([[1.0, torch.nan], [3.0, 5.0], [5.0, torch.nan], [7.0, 9.0]])
    task.look_at(ArrayDataset("x", pixels).with_annotations(NumericTargets(values, ("a", "b"))))
    torch.testing.assert_close(task.mean, torch.tensor([4.0, 7.0]))
    torch.testing.assert_close(task.std, torch.tensor([5**0.5, 2.0]))
    from ssl_pipeline.data.batch import Batch
    from ssl_pipeline.schedules import TrainProgress

    images = torch.randn(4, 3, 16, 16)
    losses = []
    for images_of_unknown in (images, torch.cat([10 * images[:1], images[1:]])):
        standardized = {
            "standardized": torch.tensor([[0.0, 9.0 * float(images_of_unknown[0, 0, 0, 0])], [0, 0], [0, 1], [0, 0]])
        }
        losses.append(
            task.objective(standardized, Batch(TrainProgress(0, 1, 1), torch.arange(4), [images], target=values)).loss
        )
    assert torch.equal(*losses)


def test_balanced_weights_make_a_rare_class_count_as_much() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0] * 90 + [1] * 10)
    features = torch.randn(100, 3) + labels[:, None] * 0.8
    source = ArrayDataset("x", torch.zeros(100, 1, 8, 8, dtype=torch.uint8), labels, ("many", "few"))
    figures = {}
    for kind in ("none", "balanced"):
        config = classification.Config.model_validate({"name": "classification", "class_weights": kind})
        task = config.build(encoder(), 2)
        task.head = LinearHead(3, 2)
        task.look_at(source)
        task.fit_head(features, labels, 1e-3)
        figures[kind] = task.score(task.head(features).detach(), labels)
        assert float(task.class_weight @ torch.tensor([90.0, 10.0])) == pytest.approx(100)
    assert figures["balanced"]["class_mean_accuracy"] > figures["none"]["class_mean_accuracy"] + 0.05
    assert figures["balanced"]["accuracy"] < figures["none"]["accuracy"]


def test_ranking_is_that_of_a_loop() -> None:
    torch.manual_seed(0)
    queries, bank = torch.randn(20, 4), torch.randn(40, 4)
    labels, bank_labels = torch.randint(0, 6, (20,)), torch.randint(0, 5, (40,))  # of class 5 there is none
    precision, first = retrieval.ranking(queries, labels, bank, bank_labels)
    for i in range(20):
        cosines = torch.nn.functional.cosine_similarity(queries[i][None], bank)
        right = bank_labels == labels[i]
        if not right.any():
            assert (float(precision[i]), int(first[i])) == (0, 40)
            continue
        assert float(precision[i]) == pytest.approx(average_precision_score(right, cosines), abs=1e-5)
        assert int(first[i]) == int((cosines > cosines[right].max()).sum())


def test_retrieval_trains_nothing_and_its_memory_travels(tmp_path: Path) -> None:
    overrides = ["data.val=4000", "labels.per_class=10", "split=val", "downstream=retrieval", "transform.size=12"]
    with pytest.raises(ConfigError, match=r"retrieval trains nothing.*regime=frozen"):
        run(tmp_path / "no", *overrides)
    result = run(tmp_path / "run", *overrides, "regime=frozen", "downstream.k=5")
    assert result.interval("recall_at_5").mean > result.interval("recall_at_1").mean > 0.3
    model = load_model(result.folder)
    assert isinstance(model.task.head, KNNHead)
    assert len(model.task.head.rows) == 100  # nothing is chosen, so nothing is held out
    file = Image.new("L", (28, 28), 0)
    assert float(model.predict([file]).exp().sum()) == pytest.approx(1, abs=1e-4)


def test_permuting_held_out_numbers_changes_no_weight(table: Path, tmp_path: Path) -> None:
    lines = table.read_text().splitlines()
    split = [line + (",test" if i % 4 == 0 else ",train") for i, line in enumerate(lines[1:])]
    changed = [line.replace(",0,", ",1,") if line.endswith("test") and i % 8 else line for i, line in enumerate(split)]
    assert split != changed
    folders = []
    for name, rows in (("a", split), ("b", changed)):
        path = table.parent / f"{name}.csv"
        path.write_text("\n".join([lines[0] + ",split", *rows]))
        overrides = ["data=table", f"data.path={path}", *LABELS, "regime.length=4 steps", "regime.min_steps=0"]
        folders.append(run(tmp_path / name, *overrides, "labels.validation=0.3").folder)
    assert same_bytes(folders[0], folders[1], ["model.safetensors"])
    assert not same_bytes(folders[0], folders[1], ["results.json"])


@pytest.mark.parametrize(
    ("name", "last"), [("small_resnet", 4), ("vit_b_32", 13), ("timm/resnet18", 8), ("convnext_tiny", 19)]
)
def test_deeper_layers_learn_faster(name: str, last: int) -> None:
    built = encoder(name, 32)
    layers = built.layer_ids()[0]
    places = list(layers.values())
    assert places == sorted(places)
    assert set(places) == set(range(last + 1))
    task: DownstreamTask = classification.Config(name="classification").build(built, 2)
    task.backbone_lr_factor, task.layer_decay = 0.1, 0.5
    groups = {group["lr_factor"]: [n for n, _ in group["params"]] for group in task.param_groups()}
    # A final norm is of the head's layer; where there is none, the last block is one layer below it.
    has_norm = name in ("vit_b_32", "convnext_tiny")
    assert sorted(groups, reverse=True)[:3] == ([1.0, 0.1, 0.05] if has_norm else [1.0, 0.05, 0.025])
    assert set(groups[1.0]) == {"head.weight", "head.bias"}
    first = next(n for n, _ in built.named_parameters())
    assert f"encoder.{first}" in groups[min(groups)]
    assert sum(map(len, groups.values())) == len(list(task.parameters()))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"])
def test_rates_of_timms_trunks_are_timms(name: str) -> None:
    task: DownstreamTask = classification.Config(name="classification").build(encoder(f"timm/{name}", 32), 7)
    task.layer_decay = 0.75
    ours = {n.rpartition("trunk.")[2]: g["lr_factor"] for g in task.param_groups() for n, _ in g["params"]}
    options: dict[str, Any] = {"img_size": 32} if name.startswith("vit") else {}
    whole: Any = timm.create_model(name, num_classes=7, **options)
    names = {id(parameter): n for n, parameter in whole.named_parameters()}
    groups = param_groups_layer_decay(whole, layer_decay=0.75)
    theirs = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(ours) == len(theirs)
    head = dict.fromkeys(theirs.keys() - ours.keys(), 1.0)  # by another name here
    assert theirs == pytest.approx({n: factor for n, factor in ours.items() if n in theirs} | head)


@pytest.mark.parametrize(
    ("name", "timms", "size"), [("vit_b_32", "vit_base_patch32_224", 32), ("convnext_tiny", "convnext_tiny", 32)]
)
def test_layers_of_torchvisions_networks_are_those_of_timms(name: str, timms: str, size: int) -> None:
    built = encoder(name, size)
    options: dict[str, Any] = {"img_size": size} if name.startswith("vit") else {}
    whole: Any = timm.create_model(timms, **options)
    theirs = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
    parameters = [dict(network.named_parameters()) for network in (built, whole)]
    counts = [
        Counter({n: sum(of[p].numel() for p, number in layers.items() if number == n) for n in set(layers.values())})
        for of, layers in zip(parameters, (built.layer_ids()[0], theirs), strict=True)
    ]
    head = built.layer_ids()[1]
    assert head == max(theirs.values())
    if name == "vit_b_32":  # the final norm is the head's, as BEiT and MAE have it; timm takes it to the last block
        norm = whole.norm.weight.numel() * 2
        assert counts[0][head] == norm
        counts[0][head - 1] += norm
    assert [counts[0][n] for n in range(head)] == [counts[1][n] for n in range(head)]


def test_what_is_missing_is_told(table: Path, tmp_path: Path) -> None:
    data = ["data=table", f"data.path={table}"]
    wrong = {
        ("downstream=multi_label", "data.target_columns=[red]"): "a label is 0 or 1; numbers are downstream=regression",
        ("downstream=multi_label",): "needs numbers beside its images",
        ("downstream=regression", "data.target_columns=[path]"): "'000.png' in 'path' is no number",
        ("downstream=regression", "data.target_columns=[hue]"): "no column 'hue'",
        ("downstream=classification", "data.target_columns=[red]"): "needs labels",
        ("downstream=regression", "data.target_columns=[red]", "labels.per_class=3"): "labels.fraction",
    }
    for overrides, sentence in wrong.items():
        with pytest.raises(ConfigError, match=sentence):
            run(tmp_path / "x", *data, *overrides)
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="not both"):
        load("finetune", FinetuneConfig, [*data, "data.target_columns=[red]", "data.label_column=square"])


def test_a_class_that_only_the_test_has_is_told() -> None:
    pixels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    train = ArrayDataset("t", pixels, torch.tensor([0, 0, 1, 1]), ("a", "b", "c"))
    held_out = ArrayDataset("t", pixels, torch.tensor([0, 1, 2, -1]), ("a", "b", "c"))
    unseen, unlabeled = classification.Config(name="classification").check(train, held_out)
    assert "'c'" in unseen
    assert "1 images to measure on have no label" in unlabeled


def test_numbers_are_drawn_by_share(table: Path) -> None:
    config = load("finetune", FinetuneConfig, ["data=table", f"data.path={table}", *VALUES])
    pool = config.data.open("train")
    assert pool is not None
    assert pool.annotations is not None
    half = draw(LabelsConfig(fraction=0.5, validation=0.5), config.downstream, pool, 3)
    assert half.validation is not None
    assert len(half.train) == len(half.validation)
    again = draw(LabelsConfig(fraction=0.5, validation=0.5), config.downstream, pool, 3)
    assert half.train.fingerprint() == again.train.fingerprint() != half.validation.fingerprint()


def test_of_a_class_s_only_label_nothing_is_held_out() -> None:
    config = classification.Config(name="classification")
    lonely_first = torch.tensor([*range(1, 10), 0, 0, 0])
    pool = ArrayDataset("t", torch.zeros(12, 1, 8, 8, dtype=torch.uint8), lonely_first, tuple("abcdefghij"))
    for seed in range(5):
        for share in (0.2, 0.9):
            learned = draw(LabelsConfig(validation=share), config, pool, seed).train.labels
            assert learned is not None
            assert set(learned.tolist()) == set(range(10))
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    pool = ArrayDataset("t", torch.zeros(6, 1, 8, 8, dtype=torch.uint8), labels, ("a", "b", "c"))
    assert draw(LabelsConfig(per_class=1, validation=0.4), config, pool, 0).validation is None
    for seed in range(5):
        drawn = draw(LabelsConfig(validation=0.9), config, pool, seed)
        assert drawn.validation is not None
        assert len(drawn.train) + len(drawn.validation) == 6
        assert len(drawn.train) >= 3
        assert drawn.train.labels is not None
        assert set(drawn.train.labels.tolist()) == {0, 1, 2}
