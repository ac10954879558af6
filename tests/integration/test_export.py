"""One model in every format: the same probabilities, by the readers of others and by ``predict``."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.config.options import FORMATS
from ssl_pipeline.data.decode import decode
from ssl_pipeline.downstream.load_model import Model, load_model
from ssl_pipeline.export import hub
from ssl_pipeline.export.export import default_name, export, main
from ssl_pipeline.export.parts import ExportBundle, Part, open_parts
from ssl_pipeline.export.predict import image_files, open_predictor, predict
from ssl_pipeline.export.predict import main as predict_main
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.models.encoder import load_encoder
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.pictures import color_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("images"), 10)


def trained(images: Path, output: Path, *overrides: str) -> Path:
    wanted = [
        "data=folder", f"data.path={images}", "init=random", "regime=frozen", "labels.validation=0", "tracking=off",
        "transform.size=16", "backbone.width=4", f"output={output}",
    ]  # fmt: skip
    return finetune(load("finetune", FinetuneConfig, [*wanted, *overrides])).folder


@pytest.fixture(scope="module")
def small(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(images, tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="module")
def exports(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model in every format that ``predict`` reads."""
    folders = {form: tmp_path_factory.mktemp("export") for form in ("safetensors", "hub", "torch.export", "onnx")}
    paths = {form: folder / FORMATS[form][1] for form, folder in folders.items()}
    for form, path in paths.items():
        export(open_parts(small), form, path)
    return paths


@pytest.fixture(scope="module")
def resnet(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["backbone.name=resnet18", "backbone.stem=imagenet", "transform.size=32"]
    return trained(images, tmp_path_factory.mktemp("resnet") / "run", *words)


@pytest.fixture(scope="module")
def published(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on weights whose publisher resizes to 168 px and cuts out 160."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pth")
    words = ["backbone.name=timm/test_resnet", f"backbone.weights={folder / 'weights.pth'}", "transform.size=160"]
    return trained(images, folder / "run", *words)


def photos(images: Path) -> list[Path]:
    return sorted(images.rglob("*.png"))[::7]


def logits(model: Any, images: Path) -> Tensor:
    found: Tensor = model.predict([decode(file, model.channels) for file in photos(images)])
    return found


def normalized(model: Model, images: Path) -> Tensor:
    blueprint = model.card.blueprint
    return Preprocessing.of(blueprint).of_files([decode(file, blueprint.channels) for file in photos(images)])


def run_lines(lines: list[str]) -> nn.Module:
    """What the lines of Python that an export prints make."""
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model.eval()


@pytest.mark.parametrize("form", ["safetensors", "hub", "torch.export", "onnx"])
def test_every_format_that_predict_reads_predicts_the_same(
    form: str, small: Path, exports: dict[str, Path], images: Path
) -> None:
    again = open_predictor(exports[form])
    assert again.classes == ("blue", "green", "red")
    torch.testing.assert_close(logits(again, images), logits(load_model(small), images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("form", "name"), [("torch.export", "small"), ("onnx", "small"), ("onnx", "published")])
def test_preprocessing_inside_takes_raw_images_of_any_size(
    form: str, name: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(name)
    path = tmp_path / FORMATS[form][1]
    export(open_parts(run), form, path, preprocessing=True)
    if form == "onnx":
        graph = onnx.load(path).graph
        shown = {
            value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in graph.input
        }
        assert shown == {"images": ["batch", 3, "height", "width"]}
        free = {
            word
            for value in graph.value_info
            for axis in value.type.tensor_type.shape.dim
            for word in re.findall("[a-z]\\w*", axis.dim_param)
        }
        assert {"batch", "height", "width"} <= free
        assert not any(re.fullmatch(r"s\d+", word) for word in free)
    big = tmp_path / "wide.png"
    Image.open(photos(images)[0]).resize((61, 37)).save(big)
    model, again = load_model(run), open_predictor(path)
    for file in (big, photos(images)[1]):
        image = decode(file, 3)
        ours, theirs = (torch.softmax(m.predict([image]), 1) for m in (model, again))
        torch.testing.assert_close(theirs, ours, atol=0.02, rtol=0)  # Pillow rounds the resized image to 1/255
    raw = torch.from_numpy(np.array(decode(big, 3))).permute(2, 0, 1)[None]
    exact = model.task.predict(Preprocessing.of(model.card.blueprint).of_pixels(raw))
    torch.testing.assert_close(again.predict([decode(big, 3)]), exact.detach(), atol=1e-4, rtol=1e-4)


def test_a_graph_is_fed_as_its_weights_were_published(published: Path, images: Path, tmp_path: Path) -> None:
    model = load_model(published)
    assert model.card.blueprint.mean == (0.5, 0.5, 0.5)
    assert model.card.blueprint.resize is not None
    assert model.card.blueprint.resize.resize_size == 168
    path = tmp_path / "model.pt2"
    export(open_parts(published), "torch.export", path)
    torch.testing.assert_close(logits(open_predictor(path), images), logits(model, images), atol=1e-4, rtol=1e-4)
    assert "shorter side resized to 168 px (bilinear), central 160 px" in hub.page(model.card, "model")


def test_onnx_stands_alone_and_carries_the_classes(small: Path, exports: dict[str, Path], images: Path) -> None:
    path = exports["onnx"]
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]  # no data in a second file
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    size = load_model(small).card.blueprint.size
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("images", ["batch", 3, size, size])]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("logits", ["batch", 3])]
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["blue", "green", "red"]
    model = load_model(small)
    every = normalized(model, images)
    for count in (1, len(every)):
        (found,) = session.run(["logits"], {"images": every[:count].numpy()})
        torch.testing.assert_close(
            torch.from_numpy(found), model.task.predict(every[:count]).detach(), atol=1e-4, rtol=1e-4
        )


def test_torchvision_and_timm_load_it_strictly(resnet: Path, images: Path, tmp_path: Path) -> None:
    model = load_model(resnet)
    expected = model.task.predict(normalized(model, images)).detach()
    written = dict[str, list[str]]()
    for form in ("torchvision", "timm"):
        written[form] = export(open_parts(resnet), form, tmp_path / f"{form}.safetensors")
    theirs = models.resnet18(num_classes=3)
    theirs.load_state_dict(load_file(tmp_path / "torchvision.safetensors"))
    timms = timm.create_model("resnet18", num_classes=3, checkpoint_path=str(tmp_path / "timm.safetensors"))
    told = [run_lines(lines) for lines in written.values()]
    with torch.no_grad():
        for network in (theirs.eval(), timms.eval(), *told):
            torch.testing.assert_close(network(normalized(model, images)), expected, atol=1e-4, rtol=1e-4)
    with safe_open(tmp_path / "torchvision.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["blue", "green", "red"]


@pytest.mark.parametrize("part", ["model", "encoder"])
@pytest.mark.parametrize(
    ("name", "neck", "size", "form"),
    [
        ("vit_b_16", "tokens", 32, "torchvision"),
        ("convnext_tiny", "gap", 32, "torchvision"),
        ("mobilenet_v2", "gap", 32, "torchvision"),
        ("swin_t", "gap", 32, "torchvision"),
        ("efficientnet_b0", "gap", 32, "torchvision"),
        ("timm/vit_tiny_patch16_224", "tokens", 32, "timm"),
        ("timm/convnext_atto", "gap", 32, "timm"),
    ],
)
@pytest.mark.slow
def test_every_family_is_loaded_by_the_lines_that_are_told(
    name: str, neck: str, size: int, form: str, part: Part, images: Path, tmp_path: Path
) -> None:
    words = [f"backbone.name={name}", "backbone.stem=imagenet", f"neck.name={neck}", f"transform.size={size}"]
    run = trained(images, tmp_path / "run", *words)
    parts = open_parts(run, part)
    theirs = run_lines(export(parts, form, tmp_path / "x.safetensors"))
    every = normalized(load_model(run), images)
    with torch.no_grad():
        expected = parts.run(every)
        torch.testing.assert_close(theirs(every), expected, atol=1e-4, rtol=1e-4)
    for graph in ("torch.export", "onnx"):
        assert export(parts, graph, tmp_path / FORMATS[graph][1])


def test_the_encoder_alone(resnet: Path, images: Path, tmp_path: Path) -> None:
    parts = open_parts(resnet, "encoder")
    export(parts, "safetensors", tmp_path / "folder")
    encoder, card = load_encoder(tmp_path / "folder")
    every = normalized(load_model(resnet), images)
    with torch.no_grad():
        expected = encoder.eval()(every)
        lines = export(parts, "torchvision", tmp_path / "t.safetensors")
        torch.testing.assert_close(run_lines(lines)(every), expected)
    assert card.kind == "encoder"
    assert card.classes is None
    with pytest.raises(ConfigError, match="holds an encoder and no model"):
        open_parts(tmp_path / "folder", "model")


def test_grayscale_kernels_are_shared_out(images: Path, tmp_path: Path) -> None:
    words = ["backbone.name=resnet18", "backbone.stem=imagenet", "transform.size=32", "data.channels=1"]
    run = trained(images, tmp_path / "run", *words)
    notes = export(open_parts(run), "torchvision", tmp_path / "t.safetensors")
    assert any("feed grayscale images as RGB" in note for note in notes)
    model, theirs = load_model(run), run_lines(notes[:-1])
    every = normalized(model, images)
    with torch.no_grad():
        found = theirs.eval()(every.expand(-1, 3, -1, -1))
        torch.testing.assert_close(found, model.task.predict(every), atol=1e-4, rtol=1e-4)


def test_no_place_of_this_machine_leaves_the_house(exports: dict[str, Path]) -> None:
    mine = exports["hub"]
    for file in mine.iterdir():
        if file.suffix != ".safetensors":
            assert str(mine.parent.parent) not in file.read_text()
    text = (mine / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: ssl-pipeline\npipeline_tag: image-classification\n")
    assert "blue, green, red" in text
    assert "| accuracy | 1 |" in text


@pytest.mark.parametrize(
    ("task", "tag", "read"),
    [
        ("classification", "image-classification", "central square"), ("multi_label", "image-classification", "central square"),
        ("regression", None, "central square"), ("retrieval", "image-feature-extraction", "central square"),
        ("segmentation", "image-segmentation", "whole image"), ("detection", "object-detection", "whole image"),
        ("of_somebody.else", None, "central square"), (None, "image-feature-extraction", "central square"),
    ],
)  # fmt: skip
def test_the_hubs_page_names_the_task(small: Path, task: str | None, tag: str | None, read: str) -> None:
    card = open_parts(small).card
    kind: Any = {"kind": "model" if task else "encoder"}
    page = hub.page(card.model_copy(update={**kind, "config": {**card.config, "downstream": {"name": task}}}), "name")
    head = yaml.safe_load(page.split("---")[1])
    assert head.get("pipeline_tag") == tag
    assert head["library_name"] == "ssl-pipeline"
    assert (task in (None, "of_somebody.else")) or task.replace("_", "-") in head["tags"]
    assert f"channel(s), {read}" in page


def test_what_can_not_be_exported_is_told(small: Path, resnet: Path, images: Path, tmp_path: Path) -> None:
    def refused(run: Path, form: str, path: Path, message: str, preprocessing: bool = False) -> None:
        with pytest.raises(ConfigError, match=message):
            export(open_parts(run), form, path, preprocessing)

    refused(small, "onxx", tmp_path / "x.onnx", r"no format 'onxx'\. Did you mean 'onnx'")
    refused(small, "torchvision", tmp_path / "x.safetensors", "small_resnet is a network of ours")
    refused(small, "onnx", tmp_path / "x.pt", r"must end in \.onnx")
    refused(resnet, "timm", tmp_path / "x.safetensors", "no graph", preprocessing=True)
    refused(small, "hub", images, "not empty and holds no model")
    shrunk = trained(images, tmp_path / "shrunk", "backbone.name=resnet18")
    refused(shrunk, "torchvision", tmp_path / "x.safetensors", r"has the stem for small images \(conv1\.weight\)")
    pooled = trained(
        images,
        tmp_path / "pooled",
        "backbone.name=resnet18",
        "backbone.stem=imagenet",
        "neck.name=gem",
        "transform.size=64",
    )
    refused(pooled, "torchvision", tmp_path / "x.safetensors", "computes other values")
    assert not list(tmp_path.glob("x.*"))


def test_files_of_others_and_damaged_ones_are_told(small: Path, exports: dict[str, Path], tmp_path: Path) -> None:
    proto = onnx.load(exports["onnx"])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "theirs.onnx")
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "theirs.pt2")
    export(open_parts(small, "encoder"), "torch.export", tmp_path / "encoder.pt2")
    (tmp_path / "damaged.onnx").write_bytes(b"half a fi")
    (tmp_path / "damaged.pt2").write_bytes(b"half a fi")
    for name, message in {
        "theirs.onnx": "carries no metadata of ours", "theirs.pt2": "carries no metadata of ours",
        "damaged.onnx": "can't be read as an ONNX file", "damaged.pt2": r"can't be read as a torch\.export file",
        "encoder.pt2": "is an encoder", "nowhere.onnx": "there is no file",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            open_predictor(tmp_path / name)


def test_no_export_takes_the_place_of_another() -> None:
    ways = itertools.product(FORMATS, (None, "encoder"), (False, True))
    kept = [default_name(form, part, raw) for form, part, raw in ways if not raw or form in ("torch.export", "onnx")]  # type: ignore[arg-type]
    assert len(set(kept)) == len(kept)
    assert {"model.onnx", "model_preprocessing.onnx", "encoder.onnx", "hub", "torchvision.safetensors"} < set(kept)


@pytest.mark.parametrize("form", ["torch.export", "onnx"])
def test_a_network_that_fixes_its_batch_is_refused(
    form: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_two(self: ExportBundle, images: Tensor) -> Tensor:
        return self.encoder.features(images)[torch.arange(len(images))]

    monkeypatch.setattr(ExportBundle, "run", of_two)
    with pytest.raises(ConfigError, match="can't hold small_resnet for batches of any length"):
        export(open_parts(small), form, tmp_path / FORMATS[form][1])
    assert not list(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_is_removed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_pipeline.export.graph._onnx_run", lambda session, images: torch.zeros(len(images), 3))
    with pytest.raises(ConfigError, match="computes other values than the model"):
        export(open_parts(small), "onnx", tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_paths_by_the_input_one_broken_among_them(
    small: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = photos(images)[:2], tmp_path / "broken.png"
    broken.write_bytes(good[0].read_bytes()[:60])
    lines = [str(good[0]), str(broken), str(tmp_path / "gone.png"), str(good[1]), str(good[1])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n\n"))
    with pytest.raises(SystemExit) as left:
        predict_main([str(small), "-", "--format", "jsonl", "--top", "1"])
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert left.value.code == 2
    assert "2 file(s) could not be read as images; all others were predicted" in told.err
    assert [row["file"] for row in rows] == lines
    assert ["error" in row for row in rows] == [False, True, True, False, False]
    assert rows[0]["classes"] == [good[0].parent.name]
    assert rows[3] == rows[4]


def test_files_are_read_a_few_at_a_time(small: Path, images: Path) -> None:
    asked = 0

    def without_end() -> Any:
        nonlocal asked
        while True:
            asked += 1
            yield photos(images)[0]

    next(predict(load_model(small), without_end()))
    assert asked <= 64
    with pytest.raises(ConfigError, match="there is no file or folder"):
        image_files([str(images), "nowhere.png"])


def test_the_command_writes_beside_the_model(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(small), "--to", "torch.export", "--part", "encoder"])
    assert (small / "exports" / "encoder.pt2").is_file()
    assert "wrote" in capsys.readouterr().out
    for words, message in {
        ("--to", "onnx", "--push", "me/mine"): "--push goes with --to hub",
        ("--to", "hub", "--public"): "--public goes with --push",
    }.items():
        with pytest.raises(SystemExit):
            main([str(small), *words])
        assert message in capsys.readouterr().err


def test_pushing_is_private_unless_asked_and_its_failures_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
            calls.append((repository, private))
            return f"https://hub/{repository}"

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, folder_path))

    monkeypatch.setattr(hub, "HfApi", Api)
    assert hub.push(tmp_path, "me/mine", public=False) == "https://hub/me/mine"
    assert calls == [("me/mine", True), ("me/mine", tmp_path)]

    def offline(self: Api, repository: str, private: bool, exist_ok: bool) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(Api, "create_repo", offline)
    with pytest.raises(ConfigError, match="was not sent to 'me/mine': no route"):
        hub.push(tmp_path, "me/mine", public=False)
