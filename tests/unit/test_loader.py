"""Loading files: any number of workers gives the same batches, photos are decoded small, damaged files are replaced."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import BadFiles, parse_limit, warn_once
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.build import AnnotatedLoader
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader, read_crops
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.data.targets import NumericTargets
from ssl_pipeline.data.workers import shared_memory_needed
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.crop import reductions
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing

CPU = torch.device("cpu")
FIRST = TrainProgress(0, 1, 1)


def photos(folder: Path, count: int, width: int = 96, height: int = 64) -> list[str]:
    """Smooth pictures that differ, as JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rough = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:03}.jpg", quality=95)
    return [f"{number:03}.jpg" for number in range(count)]


def views(size: int = 16, **keys: object) -> Views:
    config = ViewsConfig.model_validate({"size": size, **keys}).for_channels(3)[0]
    return Views(config, (0.5,) * 3, (0.25,) * 3, seed=0)


def batches(source: IndexedDataset, workers: int, rank: int = 0, processes: int = 1, steps: int = 4) -> list[Batch]:
    made = IndexedLoader(source, views(), 4, 3, DistInfo(rank, processes, CPU), steps, workers, with_labels=True)
    return list(made.from_step(0))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_number_of_workers_changes_no_bit(tmp_path: Path, workers: int) -> None:
    names = photos(tmp_path, 11)
    (tmp_path / names[4]).write_bytes(b"text")
    source = FileDataset("photos", tmp_path, names, 3, torch.arange(11) % 2, bad_files=BadFiles(parse_limit("1"), 11))
    for one, other in zip(batches(source, 0), batches(source, workers), strict=True):
        assert torch.equal(one.index, other.index)
        assert one.label is not None
        assert other.label is not None
        assert torch.equal(one.label, other.label)
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


@pytest.fixture
def little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's default and less: what a worker puts there is lost."""

    def lost(_: torch.UntypedStorage) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lost)
    monkeypatch.setattr("ssl_pipeline.data.workers.free_shared_memory", lambda: 64 * 2**10)
    monkeypatch.setenv("SSL_PIPELINE_TIMEOUT", "10")
    warn_once.cache_clear()


@pytest.mark.usefixtures("little_shared_memory")
def test_where_shared_memory_is_too_small_batches_come_another_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = photos(tmp_path, 64)
    source = FileDataset("photos", tmp_path, names, 3, torch.arange(64) % 2)

    def made(workers: int) -> list[Batch]:
        return list(IndexedLoader(source, views(32), 16, 3, DistInfo(0, 1, CPU), 3, workers).from_step(0))

    for one, other in zip(made(0), made(2), strict=True):
        assert torch.equal(one.index, other.index)
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
    made(1)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "/dev/shm has 0 MB of room" in told
    assert "--shm-size=1024m" in told


def test_the_room_that_workers_want() -> None:
    """Of 2 × 256 views of 224 px, with two batches made ahead by each worker and one in use, twice."""
    item = views(224).bytes_of(256, 3)
    assert item == 2 * 256 * 3 * 224 * 224
    assert shared_memory_needed(item, workers=8, processes=1) == 2 * 17 * item
    assert shared_memory_needed(item, workers=4, processes=2) == 2 * 2 * 9 * item


@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_no_bit(tmp_path: Path, processes: int) -> None:
    names = photos(tmp_path, 11)
    (tmp_path / names[4]).write_bytes(b"text")
    source = FileDataset("photos", tmp_path, names, 3, bad_files=BadFiles(parse_limit("1"), 11))
    alone = [torch.cat([batch.views[1] for batch in batches(source, 0)[step : step + 1]]) for step in range(4)]
    shares = [batches(source, 0, rank, processes) for rank in range(processes)]
    for step, whole in enumerate(alone):
        together = torch.cat([share[step].views[1] for share in shares])
        assert torch.equal(whole, together)


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=8), st.integers(8, 600))
def test_a_reduction_leaves_the_view_its_pixels(shapes: list[tuple[int, int]], size: int) -> None:
    boxes = torch.tensor([[0, 0, height, width] for height, width in shapes])
    for (height, width), factor in zip(shapes, reductions(boxes, size).tolist(), strict=True):
        side = min(height, width)
        allowed = [f for f in (1, 2, 4, 8) if f == 1 or side >= f * size]
        assert factor == max(allowed)


def test_a_photo_is_decoded_once_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = photos(tmp_path, 6, 640, 480)
    source = FileDataset("photos", tmp_path, names, 3)
    opened = []
    whole = FileDataset.open_reduced

    def watched(self: FileDataset, index: int, factor: int) -> Image.Image:
        opened.append((index, factor, whole(self, index, factor).size))
        return whole(self, index, factor)

    monkeypatch.setattr(FileDataset, "open_reduced", watched)
    index = torch.arange(6)
    small = read_crops(source, views(), FIRST, index)
    assert [entry[0] for entry in opened] == list(range(6))
    assert {factor for _, factor, _ in opened} <= {4, 8}
    assert all(size == (640 // factor, 480 // factor) for _, factor, size in opened)
    large = views().of_files([source.open_image(i) for i in range(6)], index, 0)
    for one, other in zip(small.views, large, strict=True):
        difference = (one.float() - other.float()).abs()
        assert difference.mean() < 2  # the same boxes, of smooth pictures: shrinking in two steps changes little
        assert difference.max() < 24


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_is_told_is_told_as_it_is(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FileDataset, index: int, factor: int) -> Image.Image:
        raise ConfigError("mend this.")

    monkeypatch.setattr(FileDataset, "open_reduced", refuse)
    with pytest.raises(ConfigError) as told:
        batches(FileDataset("photos", tmp_path, photos(tmp_path, 8), 3), workers)
    assert str(told.value) == "mend this."


@pytest.mark.parametrize("workers", [0, 1])
def test_an_annotated_photo_is_decoded_small_and_a_neighbor_brings_its_own_annotation(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = photos(tmp_path, 12, 640, 480)
    broken = tmp_path / names[5]
    broken.write_bytes(broken.read_bytes()[:900])  # its header is whole, so that no start finds it
    images = FileDataset("photos", tmp_path, names, 3, bad_files=BadFiles(parse_limit("1"), 12))
    source = images.with_annotations(NumericTargets(torch.arange(12.0)[:, None], ("value",)))
    factors = list[int]()
    whole = FileDataset.open_reduced

    def watched(self: FileDataset, index: int, factor: int) -> Image.Image:
        factors.append(factor)
        return whole(self, index, factor)

    monkeypatch.setattr(FileDataset, "open_reduced", watched)
    made = AnnotatedLoader(source, views(), 4, 3, DistInfo(0, 1, CPU), 3, workers)
    epoch = list(made.from_step(0))
    assert all(batch.target[:, 0].tolist() == batch.index.tolist() for batch in epoch)
    assert 5 not in torch.cat([batch.index for batch in epoch]).tolist()
    assert made.unreadable == 1
    assert set(factors) <= {4, 8}
    plain = IndexedLoader(source, views(), 4, 3, DistInfo(0, 1, CPU), 3, workers)  # stage one's
    for one, other in zip(plain.from_step(0), epoch, strict=True):
        assert torch.equal(one.views[0], other.views[0])


def test_a_small_photo_is_decoded_whole(tmp_path: Path) -> None:
    source = FileDataset("photos", tmp_path, photos(tmp_path, 3, 40, 30), 3)
    index = torch.arange(3)
    whole = views(24).of_files([source.open_image(i) for i in range(3)], index, 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(read_crops(source, views(24), TrainProgress(2, 3, 1), index).views, whole, strict=True)
    )


def test_a_bad_file_gives_way_to_its_neighbor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = photos(tmp_path, 8)
    for bad in (2, 3, 7):
        (tmp_path / names[bad]).write_bytes((tmp_path / names[bad]).read_bytes()[:700])
    source = FileDataset("photos", tmp_path, names, 3, bad_files=BadFiles(parse_limit("3"), 8))
    crops = read_crops(source, views(), FIRST, torch.tensor([0, 2, 7, 3]))
    assert crops.index.tolist() == [0, 4, 0, 4]
    assert sorted(crops.faults) == [2, 3, 7]
    alone = read_crops(source, views(), FIRST, torch.tensor([4]))
    assert torch.equal(crops.views[0][1], alone.views[0][0])  # under the neighbor's own number: its own views
    made = IndexedLoader(source, views(), 4, 0, DistInfo(0, 1, CPU), 8, 0)
    with caplog.at_level(logging.WARNING):
        assert len(list(made.from_step(0))) == 8
    assert source.bad_files is not None
    assert sorted(source.bad_files.faults) == [str(tmp_path / names[i]) for i in (2, 3, 7)]
    assert sum("can't be read as an image" in text for text in caplog.messages) == 3  # once each, in four epochs


def test_too_many_bad_files_stop_the_run_with_the_list(tmp_path: Path) -> None:
    names = photos(tmp_path, 8)
    for bad in (2, 3, 7):
        (tmp_path / names[bad]).write_bytes(b"text")
    source = FileDataset("photos", tmp_path, names, 3, bad_files=BadFiles(parse_limit("25%"), 8))
    with pytest.raises(ConfigError) as told:
        list(IndexedLoader(source, views(), 4, 0, DistInfo(0, 1, CPU), 8, 1).from_step(0))
    assert all(names[bad] in str(told.value) for bad in (2, 3, 7))
    assert "3 of 8 files can't be read as images, and `data.max_bad_files=25%` allows 2" in str(told.value)


def test_a_neighbor_is_of_the_same_class(tmp_path: Path) -> None:
    names = photos(tmp_path, 6)
    source = FileDataset("photos", tmp_path, names, 3, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert [source.neighbor(i) for i in range(6)] == [2, 3, 4, 5, 0, 1]
    assert FileDataset("photos", tmp_path, names, 3).neighbor(5) == 0


def test_evaluation_goes_on_with_a_neighbor(tmp_path: Path) -> None:
    names = photos(tmp_path, 6)
    (tmp_path / names[1]).write_bytes(b"")
    source = FileDataset(
        "photos", tmp_path, names, 3, torch.tensor([0, 1, 0, 1, 0, 1]), bad_files=BadFiles(parse_limit("1"), 6)
    )
    images = torch.cat(list(read_in_order(source, Preprocessing(16, (0.5,) * 3, (0.5,) * 3), CPU)))
    assert len(images) == 6
    assert torch.equal(images[1], images[3])
    source.bad_files = None
    with pytest.raises(ValueError, match=r"001\.jpg"):
        list(read_in_order(source, Preprocessing(16, (0.5,) * 3, (0.5,) * 3), CPU))


def test_a_file_that_has_changed_its_size_is_told(tmp_path: Path) -> None:
    names = photos(tmp_path, 3, 320, 240)
    source = FileDataset("photos", tmp_path, names, 3, bad_files=BadFiles(parse_limit("1"), 3))
    source.sizes(torch.arange(3))
    photos(tmp_path, 1, 480, 240)
    faults = read_crops(source, views(), FIRST, torch.arange(3)).faults
    assert "it is not 320×240 any more" in str(faults[0])


@pytest.mark.parametrize(("text", "files", "allowed"), [("1%", 250, 2), ("20", 250, 20), ("0", 9, 0), ("100%", 7, 7)])
def test_limits(text: str, files: int, allowed: int) -> None:
    limit = parse_limit(text)
    assert limit.of(files) == allowed
    assert str(limit) == text
    assert parse_limit(str(limit)) == limit


@pytest.mark.parametrize("text", ["many", "-1", "0.5", "1 percent"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(ValueError, match="write a share of the files or their number"):
        parse_limit(text)


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_epochs_with_one_bad_file_in_ten(steps: int, tmp_path: Path) -> None:
    names = photos(tmp_path, 40, 12, 10)
    bad = names[3::10]
    for name in bad:
        (tmp_path / name).write_bytes(b"no image")
    source = FileDataset("photos", tmp_path, names, 3, bad_files=BadFiles(parse_limit("10%"), 40))
    made = IndexedLoader(source, views(8), 4, 0, DistInfo(0, 1, CPU), steps, 0)
    assert [batch.clock.step for batch in made.from_step(0)] == list(range(steps))
    assert made.unreadable == 4
    assert source.bad_files is not None
    assert sorted(source.bad_files.faults) == [str(tmp_path / name) for name in bad]
    made.check_bad_files()
    made.merge_errors([made.new_errors(), {"another": "it is empty"}])
    with pytest.raises(ConfigError, match="5 of 40 files"):
        made.check_bad_files()  # what another process has found counts, too
