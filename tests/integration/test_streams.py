"""Streams: the same samples whatever the workers, exactly resumed, and whole runs on them."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.decode import DecodeError, EncodedImage, decode
from ssl_pipeline.data.encoded import Sample, StreamDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.sources import webdataset
from ssl_pipeline.data.stream_loader import (
    StreamLoader,
    lanes_of_process,
    read_stream_crops,
    sample_id,
    samples_of_lane,
)
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.runs import same_bytes, tiny_pretrain
from tests.shards import png, write_shards, write_tar
from tests.unit.test_loader import FIRST, photos

CPU = torch.device("cpu")


class Sizes(StreamDataset):
    """Shards of given sizes that count what is read of them."""

    def __init__(self, sizes: list[int]) -> None:
        self.shards = tuple(f"{i}.tar" for i in range(len(sizes)))
        self.name, self.channels, self.sizes, self.given = "sizes", 1, sizes, 0

    def read(self, shard: int, start: int = 0) -> Iterator[Sample]:
        for position in range(start, self.sizes[shard]):
            self.given += 1
            yield Sample(position, b"", None, f"{shard}/{position}")

    def size(self, shard: int) -> int:
        return self.sizes[shard]

    def fingerprint(self) -> str:
        return str(self.sizes)


def drawn(stream: StreamDataset, count: int, start: int = 0, **keys: int) -> list[tuple[int, str]]:
    named = {"seed": 0, "epoch": 0, "lane": 0, "lanes": 1, "block": 4, **keys}
    samples = samples_of_lane(stream, **named, start=start)
    return [(number, sample.name) for number, sample in itertools.islice(samples, count)]


SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any)


@given(SIZES, st.integers(1, 7), st.integers(0, 60))
def test_a_resume_gives_what_would_have_come(sizes: list[int], block: int, start: int) -> None:
    stream = Sizes(sizes)
    assert drawn(stream, 20, start, block=block) == drawn(stream, start + 20, block=block)[start:]


@given(SIZES.filter(lambda sizes: all(sizes)), st.integers(1, 7), st.integers(1, 3))
def test_a_pass_gives_each_sample_once_over_all_lanes(sizes: list[int], block: int, lanes: int) -> None:
    lanes = min(lanes, len(sizes))
    stream = Sizes(sizes)
    first_pass = {sample_id(shard, i) for shard, size in zip(stream.shards, sizes, strict=True) for i in range(size)}
    found = []
    for lane in range(lanes):
        ids = [number for number, _ in drawn(stream, 40, lane=lane, lanes=lanes, block=block)]
        own = list(itertools.takewhile(lambda number: number in first_pass, ids))
        found += own
        assert len(set(ids)) == len(ids)  # what is seen again has another id, and so other views
    assert sorted(found) == sorted(first_pass)


def test_passing_over_reads_nothing_but_the_block_it_stops_in() -> None:
    stream = Sizes([100] * 50)
    drawn(stream, 1, 4321, block=10)
    assert stream.given == 10


def test_the_order_is_drawn_by_seed_and_epoch() -> None:
    stream = Sizes([4, 4, 4])
    orders = {tuple(drawn(stream, 12, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1
    shards = [name.split("/")[0] for _, name in drawn(stream, 12, block=12)]
    assert shards != sorted(shards)


def test_ids_have_63_bits_and_belong_to_the_name_and_place() -> None:
    ids = [sample_id(f"{shard}.tar", i, again) for shard in range(20) for i in range(50) for again in range(2)]
    assert len(set(ids)) == 2000
    assert all(0 <= number < 1 << 63 for number in ids)
    assert sum(number >> 62 for number in ids) == pytest.approx(1000, abs=120)
    assert sample_id("train-00.tar", 3) == 9141751189277192303


def test_shards_without_samples_are_no_endless_search() -> None:
    for start in (0, 100):
        with pytest.raises(ConfigError, match="hold no image"):
            drawn(Sizes([0, 0]), 1, start)


def test_lanes() -> None:
    assert [lanes_of_process(shards, 1) for shards in (1, 2, 3, 4, 7, 8, 9, 16, 32)] == [1, 2, 1, 4, 1, 8, 4 - 2, 8, 8]
    assert [lanes_of_process(shards, 4) for shards in (4, 7, 8, 32, 33, 128)] == [1, 1, 2, 8, 4 - 2, 8]


def batches_of(stream: StreamDataset, share: DistInfo = DistInfo(0, 1, CPU), **keys: Any) -> StreamLoader:  # noqa: B008
    views = Views(ViewsConfig(size=8).for_channels(1)[0], (0.5,), (0.5,), 0)
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0, "total_steps": 12, "workers": 0, **keys}
    return StreamLoader(stream, views, share=share, **settings)


def stream_of(folder: Path, sizes: list[int], **keys: Any) -> StreamDataset:
    if not folder.exists():
        write_shards(folder, sizes)
    return webdataset.Config(
        name="webdataset", path=str(folder), length=sum(sizes), shuffle_buffer=8, **keys
    ).open_stream()


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.clock == b.clock
        and torch.equal(a.index, b.index)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on two cores, on purpose
def test_batches_do_not_depend_on_workers_and_resume_anywhere(tmp_path: Path) -> None:
    stream = stream_of(tmp_path / "shards", [5, 6, 7, 6])
    whole = list(batches_of(stream).from_step(0))
    assert len(whole) == 12
    assert batches_of(stream).lanes == 4
    for workers in (1, 2, 3, 4):
        assert same(whole, list(batches_of(stream, workers=workers).from_step(0)))
    for start in range(13):
        assert same(whole[start:], list(batches_of(stream).from_step(start)))
    assert same(whole[7:], list(batches_of(stream, workers=2).from_step(7)))
    with pytest.MonkeyPatch.context() as patch:  # through pipes
        patch.setattr("ssl_pipeline.data.workers.free_shared_memory", lambda: 0)
        assert same(whole, list(batches_of(stream, workers=2).from_step(0)))
    assert not same(whole, list(batches_of(stream, seed=1).from_step(0)))


def test_an_epoch_on_two_processes_gives_each_sample_once(tmp_path: Path) -> None:
    stream = stream_of(tmp_path / "shards", [6, 6, 6, 6])
    for epoch in range(2):
        steps = range(epoch * 6, epoch * 6 + 6)
        ids: list[int] = []
        for rank in range(2):
            batches = list(batches_of(stream, DistInfo(rank, 2, CPU), with_labels=True).from_step(0))
            assert all(len(batch.index) == 2 for batch in batches)
            assert all(batch.label is not None for batch in batches)
            ids += [number for step in steps for number in batches[step].index.tolist()]
        assert Counter(ids) == Counter(sample_id(shard, i) for shard in stream.shards for i in range(6))


@pytest.mark.parametrize("known", [True, False])
def test_another_batch_size_goes_on_in_each_lane(tmp_path: Path, known: bool) -> None:
    """After eight steps each of four lanes has given half of its shard: the rest comes once, whatever a batch holds."""
    stream = stream_of(tmp_path / "shards", [16] * 4)
    stream.length = 64 if known else None
    before, after = (
        batches_of(stream, total_steps=16),
        batches_of(stream, batch_size=8, total_steps=16 if not known else 8),
    )
    made = list(before.from_step(0))[:8]
    step = after.resume(before.position(8), 8, in_steps=not known)
    assert (step, after.total_steps, after.offset) == ((4, 8, 4) if known else (4, 12, 4))
    rest = list(after.from_step(step))
    ids = torch.cat([batch.index for batch in [*made, *rest[:4]]]).tolist()
    assert len(set(ids)) == len(ids) == 64
    assert rest[0].clock.taken == 8
    again = batches_of(stream, batch_size=8, total_steps=16 if not known else 8)
    assert again.resume(after.position(6), 10, in_steps=not known) == 6  # stopped once more
    assert same(list(again.from_step(6)), rest[2:])


def test_fewer_shards_than_processes_are_told(tmp_path: Path) -> None:
    stream = stream_of(tmp_path / "shards", [8])
    with pytest.raises(ConfigError, match=r"1 shard\(s\), and 2 processes"):
        batches_of(stream, DistInfo(0, 2, CPU))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_run_or_gives_its_place_to_the_next(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    members = [(f"{i}.png", b"no image" if i in (1, 2) else png(i)) for i in range(8)]
    write_tar(tmp_path / "shards" / "a.tar", members)
    keys: dict[str, Any] = {"channels": 1}
    with pytest.raises(DecodeError, match=r"a\.tar/[12] can't be read as an image"):
        list(batches_of(stream_of(tmp_path / "shards", [8], **keys), workers=workers).from_step(0))
    batches = batches_of(stream_of(tmp_path / "shards", [8], on_error="skip", **keys), workers=workers, total_steps=2)
    with caplog.at_level(logging.WARNING):
        found = torch.cat([batch.index for batch in batches.from_step(0)]).tolist()
    assert set(found) == {sample_id("a.tar", i) for i in range(8) if i not in (1, 2)}
    assert len(found) == 8
    assert batches.unreadable == 2
    assert caplog.text.count("left out") == 1
    write_tar(tmp_path / "bad" / "a.tar", [(f"{i}.png", b"no image") for i in range(8)])
    with pytest.raises(DecodeError):
        list(batches_of(stream_of(tmp_path / "bad", [8], on_error="skip", **keys), workers=workers).from_step(0))


def with_domains(folder: Path, domains: list[str]) -> Path:
    """One shard, whose images of 12 × 10 pixels say where they are from; "" does not."""
    members: list[tuple[str, bytes]] = []
    for i, domain in enumerate(domains):
        members += [(f"{i:02}.png", png(i)), *([(f"{i:02}.from", domain.encode())] if domain else [])]
    write_tar(folder / "a.tar", members)
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_the_domains_of_a_stream_travel_with_its_images(tmp_path: Path, workers: int) -> None:
    names = ["ink", "oil", "oil", "ink", "oil", "ink", "ink", "ink"]
    stream = stream_of(with_domains(tmp_path / "shards", names), [8], domain="from")
    number_of = {sample_id("a.tar", i): name for i, name in enumerate(names)}
    found: dict[str, set[int]] = {"ink": set(), "oil": set()}
    for batch in batches_of(stream, workers=workers, total_steps=2).from_step(0):
        assert batch.domain is not None
        for index, domain in zip(batch.index.tolist(), batch.domain.tolist(), strict=True):
            found[number_of[index]].add(domain)
    assert [len(numbers) for numbers in found.values()] == [1, 1]
    assert found["ink"] != found["oil"]
    assert next(iter(batches_of(stream_of(tmp_path / "shards", [8])).from_step(0))).domain is None
    with pytest.raises(ConfigError, match=r"a\.tar/0[0-7] does not say what domain it is from"):
        list(batches_of(stream_of(with_domains(tmp_path / "no", [""] * 8), [8], domain="from")).from_step(0))


def test_large_photos_of_a_stream_are_decoded_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = photos(tmp_path / "photos", 6, 320, 240)
    members = [(name, (tmp_path / "photos" / name).read_bytes()) for name in names]
    members[2] = ("002.png", png(90, (12, 10)))  # of which nothing can be shrunk
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(tmp_path / "photos" / names[4]) as photo:
        photo.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    members[4] = ("004.jpg", (tmp_path / "turned.jpg").read_bytes())
    write_tar(tmp_path / "shards" / "a.tar", members)
    stream = stream_of(tmp_path / "shards", [6], channels=3)
    factors = dict[str, int]()
    whole = EncodedImage.decode

    def watched(self: EncodedImage, channels: int, factor: int, *rest: Any) -> Image.Image:
        factors[Path(self._name).name] = factor
        return whole(self, channels, factor, *rest)

    monkeypatch.setattr(EncodedImage, "decode", watched)
    of_size_8 = Views(ViewsConfig(size=8).for_channels(3)[0], (0.5,) * 3, (0.5,) * 3, 0)
    drawn = [(sample_id("a.tar", sample.position), sample) for sample in stream.read(0)]
    small = read_stream_crops(stream, of_size_8, FIRST, drawn, with_labels=False)
    assert factors.pop("002") == 1
    assert set(factors.values()) <= {4, 8}
    images = [decode(Path(sample.name), 3, data=sample.data) for _, sample in drawn]
    assert images[4].size == (240, 320)
    for one, other in zip(small.views, of_size_8.of_files(images, small.index, 0), strict=True):
        assert (one.float() - other.float()).abs().mean() < 2
        assert torch.equal(one[2], other[2])


def test_workers_are_those_of_one_machine_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    stream = stream_of(tmp_path / "shards", [1] * 32)
    assert batches_of(stream, DistInfo(0, 8, CPU), workers=None).num_workers == 4


def test_a_task_that_reads_labels_finds_them_missing(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "a.tar", [(f"{i}.png", png(i)) for i in range(8)])
    with pytest.raises(ConfigError, match="has no label, and this task reads labels"):
        list(batches_of(stream_of(tmp_path / "shards", [8]), with_labels=True).from_step(0))


def stream_run(output: Path, shards: Path, *overrides: str) -> Path:
    words = ["data=webdataset", f"data.path={shards}", "~data.val", "batch_size=8", "save_every=3 steps"]
    config = tiny_pretrain(output, *words, "steps=6", "num_workers=1", *overrides)
    return pretrain(config)


def figures(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "card.json").read_text())["figures"]
    return found


class StoppedError(Exception):
    """The plug was pulled."""


def test_a_stopped_run_on_a_stream_continues_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "shards", [7, 9, 8, 8])
    keys = ["data.length=32", f"data.val={tmp_path / 'shards'}", "data.classes=[even,odd]"]
    whole = stream_run(tmp_path / "whole", tmp_path / "shards", *keys)
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, state: Any) -> None:
        save(self, done, state)
        raise StoppedError

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(StoppedError):
        stream_run(tmp_path / "parts", tmp_path / "shards", *keys)
    monkeypatch.setattr(Checkpoints, "save", save)
    parts = stream_run(tmp_path / "parts", tmp_path / "shards", *keys, "resume=auto")
    assert same_bytes(whole, parts, ["encoder.safetensors"])
    lines = [line for line in read_metrics(whole) if "pretrain/loss" in line]
    assert all(0 <= line["system/data_wait"] <= 1 for line in lines)
    assert "eval/knn" in figures(whole)
    assert [line["pretrain/epoch"] for line in lines] == [step / 4 for step in range(1, 7)]


def test_a_run_on_a_stream_survives_bad_images_in_training_and_in_val(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for i in range(16):
        members += [(f"{i:02}.cls", str(i % 2).encode()), (f"{i:02}.png", b"no image" if i in (1, 6) else png(i))]
    write_tar(tmp_path / "shards" / "a.tar", members)
    keys = [f"data.val={tmp_path / 'shards'}", "data.classes=[even,odd]", "steps=1"]
    run = stream_run(tmp_path / "run", tmp_path / "shards", *keys, "data.on_error=skip")
    assert "eval/knn" in figures(run)
    with pytest.raises(DecodeError, match=r"a\.tar/01 can't be read as an image"):
        stream_run(tmp_path / "other", tmp_path / "shards", *keys)


def test_a_temperature_per_domain_reads_those_of_a_stream(tmp_path: Path) -> None:
    with_domains(tmp_path / "shards", ["ink", "oil"] * 8)
    keys = ["pretext=simclr", "pretext.temperature.other_domain=0.2", "steps=1"]
    run = stream_run(tmp_path / "run", tmp_path / "shards", *keys, "data.domain=from")
    assert (run / "encoder.safetensors").is_file()
    with pytest.raises(ConfigError, match="needs images with domains"):
        stream_run(tmp_path / "other", tmp_path / "shards", *keys)


def test_a_stream_of_unknown_length_needs_a_runs_length(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [8, 8])
    run = stream_run(tmp_path / "run", tmp_path / "shards")
    assert "eval/effective_rank" in figures(run)
    assert "eval/knn" not in figures(run)
    with pytest.raises(ConfigError, match=r"give the run's length by `steps`, or `data\.length`"):
        stream_run(tmp_path / "other", tmp_path / "shards", "steps=null")
    assert not (tmp_path / "other").exists()
