"""A damaged image is left out of probes and figures: no row of features is paired with another image's target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import BadFiles, parse_limit
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.targets import NumericTargets
from ssl_pipeline.domain.adaptation.source_only import Config as SourceOnly
from ssl_pipeline.domain.domain_split import split_domains
from ssl_pipeline.domain.plan import measure_across
from ssl_pipeline.downstream import classification, multi_label, regression
from ssl_pipeline.downstream.dense_task import DenseTask
from ssl_pipeline.downstream.labels import LabeledSplit
from ssl_pipeline.downstream.pooled_task import PooledConfig, PooledTask
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.evaluation.corruptions import Corrupted
from ssl_pipeline.evaluation.features import extract_readable
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Encoder, EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.study.jobs import rows_of
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.unit.test_loader import photos

CPU = DistInfo(0, 1, torch.device("cpu"))
PREPROCESSING = Preprocessing(16, (0.5,) * 3, (0.25,) * 3)
COUNT, BAD = 12, (3, 8)
GOOD = torch.tensor([i for i in range(COUNT) if i not in BAD])


def files(folder: Path, **known: Any) -> FileDataset:
    """Photos, two of which have whole headers and damaged bodies."""
    names = photos(folder, COUNT)
    for number in BAD:
        place = folder / names[number]
        place.write_bytes(place.read_bytes()[:700])
    return FileDataset("photos", folder, names, 3, bad_files=BadFiles(parse_limit("2"), COUNT), **known)


def encoder() -> Encoder:
    torch.manual_seed(0)
    neck, blank = NeckConfig(), (0.5,) * 3
    blueprint = EncoderSpec(backbone=BackboneConfig(width=4), neck=neck, channels=3, size=16, mean=blank, std=blank)
    return blueprint.build()[0]


def labeled(kind: str, folder: Path) -> tuple[IndexedDataset, PooledConfig]:
    if kind == "classification":
        source: IndexedDataset = files(folder, labels=torch.arange(COUNT) % 2, classes=("a", "b"))
        return source, classification.Config(name=kind)
    if kind == "regression":
        values = torch.linspace(0, 1, COUNT)[:, None]
        values[BAD[0]] = 1e4
        return files(folder).with_annotations(NumericTargets(values, ("age",))), regression.Config(name=kind)
    flags = torch.stack([torch.arange(COUNT) % 2, torch.arange(COUNT) // 6], 1).float()
    return files(folder).with_annotations(NumericTargets(flags, ("odd", "late"))), multi_label.Config(name=kind)


@pytest.mark.parametrize("kind", ["classification", "regression", "multi_label"])
def test_probe_and_figures_are_those_of_the_readable_images(kind: str, tmp_path: Path) -> None:
    source, config = labeled(kind, tmp_path)
    task = config.build(encoder(), 1 if kind == "regression" else 2)
    assert isinstance(task, PooledTask)
    probes, figures = list[dict[str, Tensor]](), list[dict[str, float]]()
    for images in (source, source.select(GOOD)):
        rows = task.read(images, PREPROCESSING, CPU)
        assert rows.index.tolist() == (GOOD.tolist() if images is source else list(range(len(GOOD))))
        assert len(rows.features) == len(rows.targets) == len(GOOD)
        task.fit_head(rows.features, rows.targets, 0.1)
        probes.append({name: value.clone() for name, value in task.head.state_dict().items()})
        figures.append(task.evaluate(images, PREPROCESSING, CPU))
    assert figures[0] == figures[1]
    assert all(torch.equal(probes[0][name], probes[1][name]) for name in probes[0])
    assert source.bad_files is not None
    assert len(source.bad_files.faults) == len(BAD)


def test_a_study_s_cached_features_keep_each_image_with_its_own_target(tmp_path: Path) -> None:
    source, _ = labeled("regression", tmp_path)
    asked = torch.arange(1, COUNT)
    network = encoder()
    rows, read = extract_readable(network, source, PREPROCESSING, CPU, asked, network.features)
    assert read.tolist() == [i for i in GOOD.tolist() if i > 0]
    drawn = rows_of({"index": asked, "train": rows, "train_read": read}, torch.tensor([2, 3, 4, 8, 11]), source)
    assert drawn.targets.tolist() == [[pytest.approx(i / (COUNT - 1))] for i in (2, 4, 11)]
    assert torch.equal(drawn.features, rows[torch.isin(read, torch.tensor([2, 4, 11]))])
    assert drawn.index.tolist() == [0, 2, 4]


class Numbered(DenseTask):
    """Says of each image which target it was compared with."""

    def __init__(self) -> None:
        super().__init__(encoder())

    def predict(self, images: Tensor) -> list[float]:
        return images.mean((1, 2, 3)).tolist()

    def compare(self, prediction: float, target: Tensor) -> tuple[float, float]:
        return prediction, float(target)

    def score(self, compared: list[tuple[float, float]]) -> dict[str, float]:
        self.compared = compared
        return {"images": float(len(compared))}

    def embed(self, batch: Any) -> Embeddings:
        raise NotImplementedError

    def objective(self, embeddings: Embeddings, batch: Any) -> StepOutput:
        raise NotImplementedError


def test_a_task_on_maps_goes_on_without_the_damaged_images(tmp_path: Path) -> None:
    source = files(tmp_path).with_annotations(NumericTargets(torch.arange(COUNT)[:, None].float(), ("number",)))
    task = Numbered()
    assert task.evaluate(source, PREPROCESSING, CPU) == {"images": len(GOOD)}
    found = task.compared
    assert [number for _, number in found] == GOOD.tolist()
    task.evaluate(source.select(GOOD), PREPROCESSING, CPU)
    assert task.compared == found
    with pytest.raises(ConfigError, match="none of its 2 images can be read"):
        task.evaluate(source.select(torch.tensor(BAD)), PREPROCESSING, CPU)
    with pytest.raises(ConfigError, match="none of its 2 images can be read"):
        extract_readable(task.encoder, source.select(torch.tensor(BAD)), PREPROCESSING, CPU)


def test_figures_across_domains_pair_each_image_with_its_own_label(tmp_path: Path) -> None:
    labels, domains = torch.arange(COUNT) % 3 // 2, torch.arange(COUNT) // 6
    source = files(tmp_path, labels=labels, classes=("a", "b"), domains=domains, domain_names=("photo", "sketch"))
    config = SourceOnly.model_validate({"name": "source_only", "target": ["sketch"]})
    classifier = classification.Config(name="classification").build(encoder(), 2)
    rows = classifier.read(source, PREPROCESSING, CPU)
    classifier.fit_head(rows.features, rows.targets, 0.01)
    figures = []
    for images in (source, source.select(GOOD)):
        across = split_domains(config, source, images)
        figures.append(measure_across(across, classifier, LabeledSplit(across.source, None), PREPROCESSING, CPU))
    assert figures[0] == figures[1]


def test_corrupted_images_are_left_out_too(tmp_path: Path) -> None:
    source = files(tmp_path, labels=torch.arange(COUNT) % 2, classes=("a", "b"))
    network = encoder()
    _, read = extract_readable(
        network, Corrupted(source, 16, "contrast", 1), PREPROCESSING, CPU, forward=network.features
    )
    assert read.tolist() == GOOD.tolist()
