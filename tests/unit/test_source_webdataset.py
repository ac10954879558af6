"""Tar shards: what is read, and what is refused without being opened, extracted or unpickled."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data import tar
from ssl_pipeline.data.encoded import Sample
from ssl_pipeline.data.prepare import BAD_FILES, prepare_shards
from ssl_pipeline.data.sources import webdataset
from ssl_pipeline.data.sources.webdataset import TarStream
from ssl_pipeline.data.tar import ShardError
from tests.runs import ssl_pipeline
from tests.shards import png, write_shards, write_tar


def opened(path: Path | str, **keys: Any) -> TarStream:
    return webdataset.Config(name="webdataset", path=str(path), **keys).open_stream()


def everything(stream: TarStream) -> list[Sample]:
    return [sample for shard in range(len(stream.shards)) for sample in stream.read(shard)]


def test_an_archive_is_read_in_its_order(tmp_path: Path) -> None:
    write_shards(tmp_path, [5, 3])
    stream = opened(tmp_path, classes=("even", "odd"))
    assert stream.shards == ("train-00.tar", "train-01.tar")
    assert stream.channels == 1
    samples = everything(stream)
    assert [sample.data for sample in samples] == [png(n) for n in range(8)]
    assert [sample.label for sample in samples] == [n % 2 for n in range(8)]
    assert [sample.position for sample in samples] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert [stream.size(0), stream.size(1)] == [5, 3]
    for start in range(6):
        assert list(stream.read(0, start)) == samples[start:5]


def test_what_is_passed_over_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [20])
    stream = opened(tmp_path)
    read = []
    extract = tarfile.TarFile.extractfile

    def noted(self: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
        read.append(member.name)
        return extract(self, member)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", noted)
    assert stream.size(0) == 20
    assert read == []
    assert len(list(stream.read(0, 18))) == 2
    assert read == ["0018.cls", "0018.png", "0019.cls", "0019.png"]


@pytest.mark.parametrize("ending", ["tar.gz", "tgz"])
def test_gzipped_archives_are_read_too(tmp_path: Path, ending: str) -> None:
    write_tar(tmp_path / f"a.{ending}", [("0.png", png(7)), ("1.png", png(8))], "w:gz")
    assert [sample.data for sample in everything(opened(tmp_path))] == [png(7), png(8)]


def test_archives_far_away_are_read_by_fsspec(tmp_path: Path) -> None:
    for path in write_shards(tmp_path, [3, 4]):
        with fsspec.open(f"memory://far/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    there, here = opened("memory://far/train-*.tar"), opened(tmp_path)
    assert there.shards == here.shards
    assert [sample.data for sample in everything(there)] == [sample.data for sample in everything(here)]
    assert list(there.read(1, 2)) == everything(there)[5:]
    with pytest.raises(ConfigError, match="would run a command"):
        opened("pipe:cat x.tar")
    with pytest.raises(ShardError, match="is not there"):
        opened("memory://far/nowhere.tar")
    with pytest.raises(ShardError, match="Protocol not known: nonsense"):
        opened("nonsense://x/a.tar")


def test_patterns_name_archives(tmp_path: Path) -> None:
    write_shards(tmp_path, [1] * 12)
    names = [f"train-{i:02}.tar" for i in range(12)]
    assert list(opened(tmp_path / "train-{08..11}.tar").shards) == names[8:]
    assert list(opened(tmp_path / "train-{00,03}.tar").shards) == ["train-00.tar", "train-03.tar"]
    assert list(opened(tmp_path / "train-0*.tar").shards) == names[:10]
    several = webdataset.Config(name="webdataset", path=(str(tmp_path / "train-01.tar"), str(tmp_path)))
    assert list(several.open_stream().shards) == [names[1], names[0], *names[2:]]
    for missing in ("val-*.tar", "train-{11..12}.tar", "nowhere"):
        with pytest.raises(ConfigError, match="is no archive"):
            opened(tmp_path / missing)


def test_names_and_digests_are_the_same_in_another_place(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_shards(tmp_path / place / "x", [2])
        write_shards(tmp_path / place / "y", [2])
    first, second = (opened(tmp_path / place / "*/*.tar") for place in ("a", "b"))
    assert first.shards == second.shards == ("x/train-00.tar", "y/train-00.tar")
    assert first.fingerprint() == second.fingerprint()
    write_shards(tmp_path / "b" / "y", [30])
    assert opened(tmp_path / "b" / "*/*.tar").fingerprint() != first.fingerprint()


def test_domains(tmp_path: Path) -> None:
    told = json.dumps({"class": 1, "from": "oil"}).encode()
    write_tar(tmp_path / "a.tar", [("0.png", png(1)), ("0.json", told), ("0.txt", b" ink\n"), ("1.png", png(2))])
    by_json = opened(tmp_path, label="json:class", domain="json:from")
    assert by_json.has_domains
    assert [(s.label, s.domain) for s in everything(by_json)] == [(1, "oil"), (None, None)]
    assert [s.domain for s in everything(opened(tmp_path, domain="txt"))] == ["ink", None]
    assert not opened(tmp_path).has_domains
    with pytest.raises(ConfigError, match=r"no key 'place': see `data\.domain`"):
        everything(opened(tmp_path, domain="json:place", channels=1))


def test_labels(tmp_path: Path) -> None:
    label = json.dumps({"class": "b"}).encode()
    write_tar(
        tmp_path / "a.tar", [("x/0.png", png(1)), ("x/0.json", label), ("x/0.txt", b"a caption"), ("x/1.png", png(2))]
    )
    assert [s.label for s in everything(opened(tmp_path, label="json:class", classes=("a", "b")))] == [1, None]
    assert [s.label for s in everything(opened(tmp_path, label=None))] == [None, None]
    with pytest.raises(ConfigError, match="its label is 'b', and a whole number"):
        everything(opened(tmp_path, label="json:class", channels=1))
    with pytest.raises(ConfigError, match="no key 'kind'"):
        everything(opened(tmp_path, label="json:kind", channels=1))
    with pytest.raises(ConfigError, match="one of c, d was expected"):
        everything(opened(tmp_path, label="json:class", classes=("c", "d"), channels=1))


def test_held_splits_are_labeled_and_in_memory(tmp_path: Path) -> None:
    write_shards(tmp_path, [6])
    keys: dict[str, Any] = {"name": "webdataset", "path": str(tmp_path), "val": str(tmp_path)}
    val = webdataset.Config(**keys, classes=("even", "odd"), max_val_images=4).open("val")
    assert val is not None
    assert val.labels is not None
    assert val.labels.tolist() == [0, 1, 0, 1]
    assert val.open_image(3).getpixel((0, 0)) == 3
    assert "0003" in val.describe(3)
    chosen = val.select(val.labels.argsort())
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [0, 0, 1, 1]
    assert chosen.fingerprint() != val.fingerprint()
    assert webdataset.Config(**keys).open("test") is None
    with pytest.raises(ConfigError, match="need labels"):
        webdataset.Config(**keys).open("val")
    with pytest.raises(ConfigError, match="numbered images are needed"):
        webdataset.Config(**keys).open("train")


class Canary:
    """Sings when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_loaded_and_nothing_is_extracted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    song = pickle.dumps(Canary(tmp_path / "sang"))
    link = tarfile.TarInfo("0003.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [
        ("0000.pyd", song), ("0000.png", png(0)), ("0001.pkl", song), ("0001.png", png(1)), ("0002.PTH", song),
        ("../../escaped.png", png(9)), ("/etc/absolute.png", png(9)), link, ("0004.cls", b"1"), ("0004.png", png(4)),
    ]  # fmt: skip
    write_tar(tmp_path / "shards" / "a.tar", members)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with caplog.at_level(logging.WARNING):
        for label in ("cls", "pyd", "pkl"):
            samples = everything(opened(tmp_path / "shards", label=label, channels=1))
            assert [sample.data for sample in samples] == [png(0), png(1), png(4)]
    assert "left out 6 members, such as 0000.pyd (a pickle" in caplog.text
    assert not (tmp_path / "sang").exists()
    assert not list(work.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "work"}
    pickle.loads(song)
    assert (tmp_path / "sang").exists()  # the canary can sing


def test_prepare_reports_what_is_wrong_with_archives(tmp_path: Path) -> None:
    song = pickle.dumps(Canary(tmp_path / "sang"))
    members = [
        ("0.pkl", song), ("0.png", png(0)), ("1.png", b"no image"), ("2.png", png(2)[:-24]), ("../../out.png", png(9)),
        ("deep/3.cls", b"1"), ("deep/3.png", png(3)),
    ]  # fmt: skip
    write_tar(tmp_path / "shards" / "a.tar", members)
    whole = write_tar(tmp_path / "b.tar", [(f"{n}.png", png(n)) for n in range(4)]).read_bytes()
    (tmp_path / "shards" / "b.tar").write_bytes(whole[: 1024 * 2 + 100])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    done = ssl_pipeline("prepare", tmp_path / "shards", "--data", "webdataset", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "data.length=3" in done.stdout
    assert f"data=webdataset data.path={tmp_path / 'shards'}\n" in done.stdout
    listed = next((tmp_path / "out").glob("shards-*")) / BAD_FILES
    told = dict(line.split("\t") for line in listed.read_text().splitlines())
    shards = tmp_path / "shards"
    words = {
        "a.tar/1.png": "it is no image of a known format", "a.tar/2.png": "image file is truncated",
        "a.tar/0.pkl": "not read: a pickle", "a.tar/../../out.png": "not read: its path climbs out of the archive",
        "b.tar": "can't be read as a whole tar archive",
    }  # fmt: skip
    assert told.keys() == {f"{shards}/{name}" for name in words}
    assert all(word in told[f"{shards}/{name}"] for name, word in words.items())
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before
    assert not (tmp_path / "sang").exists()
    write_tar(tmp_path / "none" / "a.tar", [("0.png", b"no image")])
    with pytest.raises(ConfigError, match="holds 0 usable images"):
        prepare_shards(str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="nothing is changed"):
        prepare_shards(str(tmp_path / "none"), str(tmp_path / "none" / "out"))
    assert "leave out --cache" in ssl_pipeline("prepare", shards, "--data", "webdataset", "--cache", "64").stderr


@pytest.mark.parametrize("gzipped", [False, True])
def test_a_cut_is_told_wherever_it_is(tmp_path: Path, gzipped: bool, caplog: pytest.LogCaptureFixture) -> None:
    name = "a.tar.gz" if gzipped else "a.tar"
    write_tar(tmp_path / name, [(f"{n}.png", png(n)) for n in range(4)], "w:gz" if gzipped else "w")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / "cut").mkdir()
    # In plain archives a member is a header of 512 bytes and one block: within a header, at its end, at a member's end.
    cuts = [len(whole) // 3, len(whole) // 2] if gzipped else [1024 * 2 + 100, 1024 * 2 + 512, 1024 * 2 + 600, 1024 * 2]
    for cut in cuts:
        (tmp_path / "cut" / name).write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=r"a\.tar.* can't be read as a whole tar archive .*"):
            everything(opened(tmp_path / "cut", channels=1))
        stream = opened(tmp_path / "cut", channels=1, on_error="skip")
        with caplog.at_level(logging.WARNING):
            samples = everything(stream)
        assert "The rest of it is left out" in caplog.text
        assert [sample.data for sample in samples] == [png(n) for n in range(len(samples))]
        assert stream.size(0) == len(samples)


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.png", png(n)) for n in range(4)])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[2 * 1024 + 150] ^= 0xFF  # of the third header's checksum
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardError, match="read as a whole tar archive"):
        everything(opened(tmp_path))


def test_archives_without_images_are_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.txt", b"words")])
    with pytest.raises(ConfigError, match=r"KEY\.jpg"):
        opened(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="is empty"):
        opened(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(ShardError, match="read as a whole tar archive"):
        opened(tmp_path)
    write_tar(tmp_path / "a.tar", [("0.png", b"no image")])
    with pytest.raises(ConfigError, match=r"set `data\.channels`"):
        opened(tmp_path)


def test_a_header_may_claim_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [3])
    monkeypatch.setattr(tar, "_LARGEST", 10)
    with pytest.raises(ConfigError, match=r"KEY\.jpg"):
        opened(tmp_path)


def test_endings_may_be_chosen(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.left.png", png(1)), ("0.right.png", png(2)), ("0.seg.png", png(3))])
    assert [sample.data for sample in everything(opened(tmp_path, image="right.png"))] == [png(2)]


PAIRS = [("png", png(3)), ("cls", b"1")]


@pytest.mark.parametrize(
    ("names", "keys"),
    [(("v0", "v1.1", "v2", "v1.3"), None), (("v1.0", "v1.1", "v1.2"), None), (("img", "img.v2"), None),
     (("a.b/x.1", "a.b/x.2"), None), (("./0", "./1"), ("0", "1"))],
)  # fmt: skip
def test_names_with_dots_are_samples_of_their_own(
    tmp_path: Path, names: tuple[str, ...], keys: tuple[str, ...] | None
) -> None:
    write_tar(tmp_path / "a.tar", [(f"{name}.{ending}", data) for name in names for ending, data in PAIRS])
    stream = opened(tmp_path, classes=("a", "b"))
    samples = everything(stream)
    assert [sample.name.partition(".tar/")[2] for sample in samples] == list(keys or names)
    assert [sample.label for sample in samples] == [1] * len(names)
    assert stream.size(0) == len(names)
    for start in range(len(names)):
        assert list(stream.read(0, start)) == samples[start:]


def test_further_images_of_a_sample_are_told_or_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [(f"{i}.{ending}", png(n)) for i in range(3) for n, ending in ((i, "png"), (90 + i, "seg.png"))]
    write_tar(tmp_path / "a.tar", members)
    assert [sample.data for sample in everything(opened(tmp_path))] == [png(0), png(1), png(2)]
    assert "left out 3 members, such as 0.seg.png (another image of sample '0'" in caplog.text
    assert [sample.data for sample in everything(opened(tmp_path, image="seg.png"))] == [png(90), png(91), png(92)]


def test_members_that_other_systems_leave_are_passed_over(tmp_path: Path) -> None:
    junk = b"\0\5\x16\7" + b"x" * 60
    members = [(f"{lead}{i}.{ending}", junk if lead else data) for i in range(3) for ending, data in PAIRS
               for lead in ("._", "__MACOSX/", "")]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    samples = everything(opened(tmp_path, classes=("a", "b")))
    assert [(sample.data, sample.label) for sample in samples] == [(png(3), 1)] * 3


@pytest.mark.parametrize("order", [("png", "cls"), ("cls", "png")])
def test_members_that_lie_apart_are_told(tmp_path: Path, order: tuple[str, str]) -> None:
    data = dict(PAIRS)
    write_tar(tmp_path / "a.tar", [(f"{i}.{ending}", data[ending]) for ending in order for i in range(3)])
    with pytest.raises(ShardError, match=r"sample '0' do not lie next to each other.*--sort=name"):
        everything(opened(tmp_path))


def test_archives_that_were_joined_may_repeat_their_keys(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", [(f"{i}.{ending}", data) for _ in range(2) for i in range(3) for ending, data in PAIRS]
    )
    assert len(everything(opened(tmp_path, classes=("a", "b")))) == 6


@pytest.mark.parametrize("ending", ["tar.bz2", "tar.xz", "zip", "tar"])
@pytest.mark.parametrize("folder", [False, True])
def test_other_archives_are_not_supported_rather_than_damaged(tmp_path: Path, ending: str, folder: bool) -> None:
    path = write_tar(tmp_path / f"a.{ending}", [("0.png", png(1))], "w:bz2")
    with pytest.raises(ConfigError, match=r"not supported: pack the files as \.tar or \.tar\.gz"):
        opened(tmp_path if folder else path)


def test_a_grayscale_first_image_makes_no_stream_grayscale(tmp_path: Path) -> None:
    color = io.BytesIO()
    Image.new("RGB", (12, 10), "red").save(color, "png")
    write_tar(tmp_path / "a.tar", [("0.png", png(1)), ("1.png", color.getvalue()), ("1.cls", b"0")])
    write_tar(tmp_path / "val" / "b.tar", [("0.png", png(1)), ("0.cls", b"0")])
    stream = opened(tmp_path, val=str(tmp_path / "val"), classes=("a",))
    assert stream.channels == 3
    val = webdataset.Config(
        name="webdataset", path=str(tmp_path / "a.tar"), val=str(tmp_path / "val"), classes=("a",)
    ).open("val")
    assert val is not None
    assert val.channels == 3  # what the network reads, though all of these are grayscale
    assert opened(tmp_path / "val").channels == 1


def test_a_label_that_says_there_is_none_is_none(tmp_path: Path) -> None:
    told = [b"nan", b"None", b"N/A", b"", b"-1", b" 1\n", b"1.0"]
    write_tar(
        tmp_path / "a.tar", [x for i, text in enumerate(told) for x in ((f"{i}.png", png(i)), (f"{i}.cls", text))]
    )
    assert [sample.label for sample in everything(opened(tmp_path))] == [None] * 5 + [1, 1]
    json_tar = tmp_path / "json" / "b.tar"
    write_tar(
        json_tar, [("0.png", png(1)), ("0.json", b'{"y": null}'), ("1.png", png(1)), ("1.json", b'{"y": [0, 1]}')]
    )
    with pytest.raises(ConfigError, match="multi_label"):
        everything(opened(json_tar, label="json:y"))
