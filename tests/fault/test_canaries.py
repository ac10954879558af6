"""Malicious files, offered wherever a file is read: each is refused in words, and the canary in it stays silent."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import ResNet18_Weights

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.sources import huggingface, torchvision
from ssl_pipeline.data.tar import ShardError, read_groups
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.engine.checkpoint import CheckpointError, Checkpoints
from ssl_pipeline.finetune import finetune
from ssl_pipeline.models.encoder import load_encoder
from ssl_pipeline.models.weights import read_weights
from ssl_pipeline.pretrain import pretrain
from tests.runs import tiny_finetune, tiny_pretrain
from tests.shards import write_tar


class Canary:
    """Sings when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def plain(canary: Canary) -> bytes:
    return pickle.dumps(canary, protocol=2)  # torch's own, so that its reader gets as far as the canary


def saved_by_torch(canary: Canary) -> bytes:
    file = io.BytesIO()
    torch.save({"done": 1, "data": "data", "state_dict": canary}, file)
    return file.getvalue()


def saved_by_old_torch(canary: Canary) -> bytes:
    file = io.BytesIO()
    torch.save({"done": 1, "state_dict": canary}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def among_arguments(canary: Canary) -> bytes:
    """Inside an object of a kind that is read as a blank."""
    file = io.BytesIO()
    torch.save({"done": 1, "state_dict": {"w": torch.zeros(1)}, "args": argparse.Namespace(data=canary)}, file)
    return file.getvalue()


def saved_by_numpy(canary: Canary) -> bytes:
    file = io.BytesIO()
    np.savez(file, weight=np.array([canary], dtype=object))
    return file.getvalue()


def tar_with_pickle(canary: Canary) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("pickle", "tensors", "storages", "sys_info"):  # as torch before 0.1.10 wrote
            header = tarfile.TarInfo(name)
            header.size = len(plain(canary))
            archive.addfile(header, io.BytesIO(plain(canary)))
    return file.getvalue()


FORMS = [plain, saved_by_torch, saved_by_old_torch, among_arguments, saved_by_numpy, tar_with_pickle]
Form = Callable[[Canary], bytes]


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "sang")


def silent(canary: Canary) -> bool:
    """Whether it has not sung; it then proves that it can."""
    quiet = not canary.path.exists()
    if quiet:
        pickle.loads(plain(canary))
        assert canary.path.exists()
        canary.path.rmdir()
    return quiet


@pytest.mark.parametrize("form", FORMS)
def test_as_a_runs_own_checkpoint(form: Form, canary: Canary, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"task": {}})
    (file,) = (path for path in checkpoints.folder.iterdir() if path.name.startswith("step-"))
    content = form(canary)
    # Whoever forges one can write the right checksum, too.
    file.write_bytes(content + b"sha256:" + hashlib.sha256(content).digest())
    with pytest.raises(CheckpointError, match="checkpoint"):
        checkpoints.load()
    assert silent(canary)


@pytest.mark.parametrize("ending", [".pth", ".bin", ".safetensors", ".npz"])
@pytest.mark.parametrize("form", FORMS)
def test_as_weights(form: Form, ending: str, canary: Canary, tmp_path: Path) -> None:
    file = tmp_path / f"weights{ending}"
    file.write_bytes(form(canary))
    with pytest.raises(ConfigError, match=r"no code is ever run|can't be read as weights"):
        read_weights("resnet18", str(file))
    assert silent(canary)


@pytest.mark.filterwarnings(
    "ignore:Falling back to the old format"
)  # torch takes any zip for weights of its early days
@pytest.mark.parametrize("form", FORMS)
def test_as_official_weights_that_lie_in_torchs_cache(
    form: Form, canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints" / Path(ResNet18_Weights.IMAGENET1K_V1.url).name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(form(canary))
    with pytest.raises(ConfigError, match=r"backbone\.weights"):
        read_weights("resnet18", "IMAGENET1K_V1")
    assert silent(canary)


def test_as_an_encoder_and_as_code_beside_a_model(
    canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretrain(tiny_pretrain(tmp_path / "run", "steps=1"))
    whole = (run / "encoder.safetensors").read_bytes()
    for form in FORMS:
        (run / "encoder.safetensors").write_bytes(form(canary))
        with pytest.raises(ConfigError, match="is damaged"):
            load_encoder(run)
    (run / "encoder.safetensors").write_bytes(whole)
    model = finetune(tiny_finetune(run, tmp_path / "model", "regime=frozen")).folder
    card = model / "card.json"
    text = card.read_text()
    assert '"name": "classification"' in text
    card.write_text(text.replace('"name": "classification"', '"name": "payload.task"'))
    (model / "payload").mkdir()
    (model / "payload" / "__init__.py").write_text(f"import os; os.mkdir({str(canary.path)!r})")
    (model / "payload" / "task.py").write_text("")
    monkeypatch.chdir(model)
    monkeypatch.syspath_prepend(str(model))
    with pytest.raises(ConfigError, match="code that comes with a model is not run"):
        load_model(model)
    assert silent(canary)


@pytest.mark.parametrize("named", ["pandas", "parquet"])
def test_as_data_of_hugging_faces_library(named: str, canary: Canary, tmp_path: Path) -> None:
    (tmp_path / "rows.pkl").write_bytes(plain(canary))
    config = huggingface.Config(name="huggingface", path=named, data_files=str(tmp_path / "rows.pkl"))
    with pytest.raises(ConfigError, match="pickles can run code"):
        config.open("train")
    assert silent(canary)


def test_as_a_script_in_a_dataset_of_hugging_faces(canary: Canary, tmp_path: Path) -> None:
    folder = tmp_path / "flowers"
    folder.mkdir()
    (folder / "flowers.py").write_text(f"import os; os.mkdir({str(canary.path)!r})")
    (folder / "rows.pickle").write_bytes(plain(canary))
    with pytest.raises(ConfigError, match="can't be loaded"):
        huggingface.Config(name="huggingface", path=str(folder)).open("train")
    assert silent(canary)


def test_as_a_pickle_of_cifar(canary: Canary, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(plain(canary))
    with pytest.raises(ConfigError, match="can't be read"):
        torchvision.Config(name="torchvision", dataset="CIFAR10", path=str(tmp_path)).open("train")
    assert silent(canary)


@pytest.mark.parametrize("dataset", ["ImageNet", "MNIST"])
def test_as_what_torchvision_keeps_of_a_dataset(dataset: str, canary: Canary, tmp_path: Path) -> None:
    for name in ("meta.bin", "MNIST/processed/training.pt", "MNIST/processed/test.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(saved_by_torch(canary))
    with pytest.raises(ConfigError, match="can't be read"):
        torchvision.Config(name="torchvision", dataset=dataset, path=str(tmp_path)).open("train")
    assert silent(canary)


def climbing(folder: Path) -> Path:
    """An archive whose members would leave it, each in its own way."""
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [
        ("../../up.png", b"x"), ("a/../../../up.png", b"x"), (str(folder / "absolute.png"), b"x"),
    ]  # fmt: skip
    for name, kind, target in (
        ("link.png", tarfile.SYMTYPE, "/etc/passwd"), ("up.png", tarfile.SYMTYPE, "../../.."), ("up.png/x.png", tarfile.REGTYPE, ""),
        ("hard.png", tarfile.LNKTYPE, "/etc/passwd"), ("pipe.png", tarfile.FIFOTYPE, ""), ("device.png", tarfile.CHRTYPE, ""),
    ):  # fmt: skip
        header = tarfile.TarInfo(name)
        header.type, header.linkname = kind, target
        members.append(header)
    return write_tar(folder / "climbing.tar", [*members, ("good.png", b"good")])


def test_an_archive_that_climbs_out_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    archive = climbing(tmp_path)
    monkeypatch.chdir(inside)
    groups = list(read_groups(str(archive), lambda e: e == "png", lambda e: e == "png"))
    assert {name: group.files for group in groups for name in [group.key]} == {
        "up.png/x": {"png": b""},
        "good": {"png": b"good"},
    }
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c", "climbing.tar"]


def test_a_password_in_an_address_is_not_told() -> None:
    url = "file://me:hunter2@localhost/none.tar?X-Amz-Signature=abc"
    with pytest.raises(ShardError, match=r"none\.tar is not there") as caught:
        list(read_groups(url, lambda _: True, lambda _: True))
    assert "hunter2" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_zip_is_no_weights_either(canary: Canary, tmp_path: Path) -> None:
    """Torch's cache takes official weights in zips of their own, too: what is in them is read as strictly."""
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("../../escaped.pth", saved_by_torch(canary))
    with pytest.raises(ConfigError, match=r"backbone\.weights"):
        read_weights("resnet18", str(tmp_path / "weights.pth"))
    assert silent(canary)
    assert not list(tmp_path.parent.glob("escaped*"))
    shutil.rmtree(tmp_path)
