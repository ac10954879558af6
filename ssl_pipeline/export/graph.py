"""A model as one graph without our code: ``torch.export`` and ONNX, written, checked and read again."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError, first_line
from ssl_pipeline.data.decode import as_8_bit
from ssl_pipeline.export.parts import ExportBundle
from ssl_pipeline.transforms.crop import central_boxes, resize_boxes, whole_boxes
from ssl_pipeline.transforms.preprocessing import Preprocessing, Resize, resize_and_crop

TOLERANCE = 1e-4
_METADATA = "ssl_pipeline.json"
_OPSET = 20


class ExportWrapper(nn.Module):
    """Images to logits or features.

    Args:
        parts: what is exported.
        raw: whether crop, resize and normalization are inside: then the input is uint8 (B, C, H, W) of any height and width,
            otherwise normalized float32 (B, C, size, size).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, parts: ExportBundle, raw: bool) -> None:
        super().__init__()
        blueprint = parts.card.blueprint
        self.module, self._run, self.raw, self.size = parts.module, parts.run, raw, blueprint.size
        whole = parts.gives == "mask"  # such a model reads whole images, and not their central square
        self.box = whole_boxes if whole else central_boxes
        self.resize = None if whole else blueprint.resize
        self.register_buffer("mean", torch.tensor(blueprint.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(blueprint.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(B, classes), (B, D), or (B, classes, size, size) for masks."""
        if not self.raw:
            return self._run(images)
        if self.resize is not None:
            cut = resize_and_crop(images, self.size, self.resize, self.mean)
        else:
            count, _, height, width = images.shape
            box = self.box(torch.full((1,), height), torch.full((1,), width))
            cut = resize_boxes(images, box.expand(count, 4), self.size)
        return self._run((cut - self.mean) / self.std)


def _output(parts: ExportBundle) -> str:
    return parts.gives if parts.gives in ("features", "values") else "logits"


def _metadata(parts: ExportBundle, raw: bool) -> dict[str, str]:
    """What a reader of the file needs, as JSON by key."""
    card, blueprint = parts.card, parts.card.blueprint
    facts: dict[str, Any] = {
        "made_by": "ssl_pipeline", "schema": 1, "kind": card.kind, "output": _output(parts), "gives": parts.gives,
        "classes": card.classes, "channels": blueprint.channels, "range": blueprint.range, "size": blueprint.size,
        "mean": blueprint.mean, "std": blueprint.std, "resize": blueprint.resize and blueprint.resize.model_dump(),
        "preprocessing": "inside" if raw else "outside", "backbone": blueprint.backbone.name, "data": card.data,
        "figures": card.figures, "created": card.created,
    }  # fmt: skip
    return {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}


def _sample(parts: ExportBundle, raw: bool, count: int) -> Tensor:
    if not raw:
        return parts.example(count, seed=count)
    size, channels = parts.card.blueprint.size, parts.card.blueprint.channels
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, size + 3 + count, size + 11), dtype=torch.uint8, generator=generator)


def _trace(graph: ExportWrapper, parts: ExportBundle, form: str) -> Any:
    """The graph for batches of any length.

    torch's ONNX exporter can trace by itself, but falls back silently to one fixed batch length where that fails.
    """
    sides = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)} if graph.raw else {}
    shapes = {"images": {0: torch.export.Dim("batch"), **sides}}
    try:
        return torch.export.export(graph, (_sample(parts, graph.raw, 2),), dynamic_shapes=shapes)
    except Exception as error:  # the tracer's errors have no common base
        name = parts.card.blueprint.backbone.name
        raise ConfigError(
            f"{form} can't hold {name} for batches of any length: {_start_of(error)} Export --to safetensors, or to the "
            "library that the backbone is from."
        ) from error


def write_torch_export(parts: ExportBundle, path: Path, raw: bool) -> float:
    """Writes a ``.pt2``; returns the greatest difference from the model itself, on a batch of another size."""
    graph = ExportWrapper(parts, raw).eval()
    program = _trace(graph, parts, "torch.export")
    torch.export.save(program, path, extra_files={_METADATA: json.dumps(_metadata(parts, raw))})
    again = torch.export.load(path).module()
    return _difference(graph, again, _sample(parts, raw, 3), path)


def write_onnx(parts: ExportBundle, path: Path, raw: bool) -> float:
    """Writes a ``.onnx`` in one file; returns the greatest difference in onnxruntime, on a batch of another size.

    Raises:
        ConfigError: the extra is absent, or onnxruntime computes something else.
    """
    _need_onnx("onnxscript")
    import onnx

    graph = ExportWrapper(parts, raw).eval()
    program = _trace(graph, parts, "ONNX")
    with warnings.catch_warnings():
        # torch's exporter itself uses deprecated parts of torch and onnxscript.
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            verbose=False,
            input_names=["images"],
            output_names=[_output(parts)],
        )
    assert written is not None
    model = written.model_proto
    _name_axes(model.graph)
    onnx.helper.set_model_props(model, _metadata(parts, raw))
    onnx.checker.check_model(model)
    onnx.save(model, path)
    session = _session(path)
    return _difference(graph, lambda images: _onnx_run(session, images), _sample(parts, raw, 3), path)


def _name_axes(graph: Any) -> None:
    """Names the free axes everywhere: the tracer only numbers them."""
    free = zip(("batch", "channels", "height", "width"), graph.input[0].type.tensor_type.shape.dim, strict=True)
    names = {axis.dim_param: name for name, axis in free if axis.dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:  # perhaps a sum of some
                axis.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), axis.dim_param)


@torch.no_grad()
def _difference(graph: nn.Module, again: Callable[[Tensor], Tensor], images: Tensor, path: Path) -> float:
    expected, found = graph(images), again(images)
    far = float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
    if not far <= TOLERANCE:
        path.unlink()
        raise ConfigError(
            f"what was written to {path} computes other values than the model (by {far:.1e}, and {TOLERANCE:g} is allowed), so it "
            "was removed: export to another format, and report the backbone."
        )
    return far


@dataclass(frozen=True)
class ExportedModel:
    """A graph from a file, ready for decoded images; without ``preprocessing`` the graph does it itself."""

    classes: tuple[str, ...]
    channels: int
    value_range: tuple[float, float] | None
    gives: str
    preprocessing: Preprocessing | None
    run: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def predict(self, images: list[Image.Image]) -> Tensor:
        """Logits for decoded images, one entry each."""
        if self.preprocessing is not None:
            return self.run(replace(self.preprocessing, whole=self.gives == "mask").of_files(images))
        mode = "L" if self.channels == 1 else "RGB"
        pixels = [torch.from_numpy(np.array(as_8_bit(image, mode))) for image in images]
        shaped = [p[None, None] if p.ndim == 2 else p.permute(2, 0, 1)[None] for p in pixels]
        return torch.cat([self.run(image.contiguous()) for image in shaped])


def load_torch_export(path: Path) -> ExportedModel:
    """A ``.pt2`` of ours.

    Raises:
        ConfigError: it is damaged, or somebody else's.
    """
    extra = {_METADATA: ""}
    torch_log = logging.getLogger("torch.export.pt2_archive._package")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)  # it warns of a file without our metadata, which is reported below
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # the archive's readers raise nearly anything
        raise ConfigError(f"{str(path)!r} can't be read as a torch.export file: {_start_of(error)}") from error
    finally:
        torch_log.setLevel(level)
    return _exported(path, json.loads(extra[_METADATA] or "{}"), program.module())


def load_onnx(path: Path) -> ExportedModel:
    """A ``.onnx`` of ours.

    Raises:
        ConfigError: the extra is absent, or the file is damaged or somebody else's.
    """
    session = _session(path)
    facts = session.get_modelmeta().custom_metadata_map
    return _exported(path, facts, lambda images: _onnx_run(session, images))


def _exported(path: Path, facts: dict[str, str], run: Callable[[Tensor], Tensor]) -> ExportedModel:
    known = {key: json.loads(value) for key, value in facts.items()} if "made_by" in facts else {}
    if known.get("made_by") != "ssl_pipeline":
        raise ConfigError(
            f"{str(path)!r} carries no metadata of ours (classes, preprocessing), so somebody else made it: run it with its "
            "maker's code, or export with `ssl-pipeline export`."
        )
    if known["kind"] != "model":
        raise ConfigError(f"{str(path)!r} is an encoder: it gives features and names no classes. Export a model.")
    preprocessing = None
    if known["preprocessing"] != "inside":
        resize = None if known.get("resize") is None else Resize.model_validate(known["resize"])
        preprocessing = Preprocessing(known["size"], tuple(known["mean"]), tuple(known["std"]), resize)
    gives = known.get("gives", "classes")  # the first files of this schema held classifiers alone
    value_range = None if known.get("range") is None else (known["range"][0], known["range"][1])
    return ExportedModel(tuple(known["classes"]), known["channels"], value_range, gives, preprocessing, run)


def _need_onnx(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f'ONNX needs {package}: pip install -e ".[onnx]" in the project\'s folder.')


def _session(path: Path) -> Any:
    _need_onnx("onnxruntime")
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ConfigError(f"{str(path)!r} can't be read as an ONNX file: {_start_of(error)}") from error


def _onnx_run(session: Any, images: Tensor) -> Tensor:
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(found)


def _start_of(error: Exception) -> str:
    return first_line(error)[:300]
