"""``ssl-pipeline evaluate`` on a planted signal: colors tell the classes apart, and nothing else does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.sources.folder import Config as Folder
from ssl_pipeline.evaluation.evaluate import EvaluateConfig, Evaluation, evaluate, main
from ssl_pipeline.evaluation.load_encoder import describe_encoder
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Card, EncoderSpec, save
from ssl_pipeline.models.neck import NeckConfig
from tests.pictures import color_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    blueprint = EncoderSpec(
        backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=3, size=16, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    card = Card(kind="encoder", blueprint=blueprint, config={}, data={}, figures={}, versions={})
    save(folder, blueprint.build()[0], card)
    return folder


def config(run: Path, images: Path, *overrides: str) -> EvaluateConfig:
    words = describe_encoder([str(run)], ["encoder"])
    few = ["few_shot.per_class=[2,999]", "few_shot.seeds=2", "probe.epochs=10", "probe.lrs=[0.1,1e-9]"]
    return load(
        "evaluate", EvaluateConfig, [*words, "data=folder", f"data.path={images}", "transform=small", *few, *overrides]
    )


def values(found: Evaluation) -> dict[str, float]:
    return {figure.name: figure.value for figure in found.figures}


def test_a_planted_signal_is_found_by_every_measure(run: Path, images: Path) -> None:
    found = evaluate(config(run, images, "knn.k=[1,5]"))
    figures = values(found)
    assert figures["knn_1"] == figures["knn_5"] == figures["probe"] == 1.0
    assert figures["few_shot_2"] > 0.8
    assert 1 <= figures["effective_rank"] <= 32
    assert 0 <= figures["alignment"] <= 4
    assert figures["probe_pixelate"] > 0.9  # the color stays
    assert figures["probe_contrast"] < figures["probe_pixelate"] + 1e-9
    assert {f"knn_5_{name}" for name in ("jpeg", "brightness", "corrupted")} <= set(figures)
    assert len(found.trials) == 4 * 2  # neck, c2, c3, c4 and two rates
    assert any("few_shot of 999: left out" in note for note in found.notes)


def test_test_labels_choose_nothing(run: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(run, images, "metrics=[probe]")
    before = evaluate(wanted)
    opened = Folder.open

    def shuffled(self: Folder, split):  # type: ignore[no-untyped-def]
        source = opened(self, split)
        assert isinstance(source, FileDataset)
        if split != "train":
            source = source.select(torch.arange(len(source)))
            assert source.labels is not None
            source.labels = (source.labels + 1) % 3
        return source

    monkeypatch.setattr(Folder, "open", shuffled)
    after = evaluate(wanted)
    assert after.trials == before.trials
    assert [figure.how for figure in after.figures] == [figure.how for figure in before.figures]
    assert values(after)["probe"] == 0 < values(before)["probe"]


def test_images_without_labels_are_looked_at_as_far_as_can_be(run: Path, images: Path, tmp_path: Path) -> None:
    found = evaluate(config(run, images / "red"))
    assert set(values(found)) == {"effective_rank", "feature_std", "uniformity", "alignment"}
    assert any("has no labels" in note for note in found.notes)
    with pytest.raises(ConfigError, match=r"`metrics` asks for knn, probe, and .* has no labels"):
        evaluate(config(run, images / "red", "metrics=[knn,probe]"))


def test_what_can_not_be_is_told(run: Path, images: Path) -> None:
    for overrides, message in {
        "knn.k=[5,500]": r"`knn\.k` is 500, and the bank has only",
        "probe.layers=[c9]": "no 'c9'. Known: neck, c2, c3, c4",
        "data.channels=1": r"reads 3 channel\(s\), and .* has 1: set `data\.channels=3`",
    }.items():
        with pytest.raises(ConfigError, match=message):
            evaluate(config(run, images, "metrics=[knn,probe]", overrides))


def test_features_that_are_no_numbers_are_told(images: Path, tmp_path: Path) -> None:
    blueprint = EncoderSpec(
        backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=3, size=16, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    encoder, _ = blueprint.build()
    for parameter in encoder.backbone.trunk.get_submodule("bn1").parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    save(tmp_path, encoder, Card(kind="encoder", blueprint=blueprint, config={}, data={}, figures={}, versions={}))
    with pytest.raises(ConfigError, match="no numbers"):
        evaluate(config(tmp_path, images, "metrics=[alignment_uniformity]"))


def test_the_command_prints_a_table_and_writes_the_file(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    words = [str(run), "data=folder", f"data.path={images}", "metrics=[knn]", f"output={output}"]
    monkeypatch.setattr(sys, "argv", ["ssl-pipeline", *words])
    main()
    assert "knn_20" in capsys.readouterr().out
    record = json.loads(output.read_text())
    assert record["figures"]["knn_1"] == 1.0
    assert "τ = 0.1" in record["how"]["knn_1"]
    assert record["config"]["knn"]["k"] == [1, 20]
    monkeypatch.setattr(sys, "argv", ["ssl-pipeline", *words[:-1], f"output={tmp_path}/nowhere/x.json"])
    with pytest.raises(SystemExit):
        main()
    assert "there is no folder" in capsys.readouterr().err
