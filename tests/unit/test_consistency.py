"""Learning from images without labels: the loss against a loop, what it may see, and that it helps where labels are few."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.bad_files import BadFiles, parse_limit
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.paired import PairedLoader
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.consistency import Consistency, ConsistencyConfig
from ssl_pipeline.downstream.labels import LabeledSplit, LabelsConfig, draw_index, unlabeled_pool
from ssl_pipeline.downstream.plan import Plan, Start
from ssl_pipeline.downstream.regime import TrainContext, train
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.runs import tiny_finetune

SHARE = DistInfo(0, 1, torch.device("cpu"))
BLUEPRINT = EncoderSpec(
    backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=1, size=12, mean=(0.5,), std=(0.3,)
)
TOLD = ["tracking=off", "unlabeled=consistency", "regime=scratch"]


def context_of(config: FinetuneConfig, pool: ArrayDataset, labeled: LabeledSplit) -> TrainContext:
    views, _ = config.transform.model_copy(update={"size": 12}).for_channels(1)
    plan = Plan(
        downstream=config.downstream, regime=config.regime, labels=config.labels, unlabeled=config.unlabeled, views=views,
        pool=pool, held_out=pool, start=Start(BLUEPRINT), workers=0,
    )  # fmt: skip
    return dataclasses.replace(plan.context(0, Accelerator(cpu=True)), labeled=labeled)


def settled(*words: str) -> tuple[FinetuneConfig, ConsistencyConfig]:
    config = load("finetune", FinetuneConfig, [*TOLD, *words])
    assert config.unlabeled is not None
    return config, config.unlabeled


def tiny(classes: int = 3, *words: str) -> Consistency:
    """A teacher and a tiny classifier; the labels that it is taught have shares of 1/2, 1/4, 1/4."""
    config, unlabeled = settled(*words)
    torch.manual_seed(0)
    classifier = config.downstream.build(BLUEPRINT.build()[0], classes)
    assert isinstance(classifier, Classification)
    return Consistency(unlabeled, classifier, torch.tensor([0, 0, 1, 2]))


def images(count: int, seed: int = 0) -> ArrayDataset:
    """Stripes of any width and place in noise, across or along."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    phase, width = (torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    across = torch.sin(torch.arange(12) * (0.6 + 1.2 * width) + 6.3 * phase).expand(count, 12, 12)
    grayscale = 128 + 50 * torch.where((labels == 1)[:, None, None], across, across.mT)
    pixels = (grayscale + 25 * torch.randn(count, 12, 12, generator=generator)).clamp(0, 255).byte()[:, None]
    return ArrayDataset("stripes", pixels, labels, ("along", "across"))


def step_of(task: Consistency, labeled: int, step: int = 0, seed: int = 0) -> Batch:
    """Random images: ``labeled`` ones, and ``ratio`` times as many others, which have two views."""
    generator = torch.Generator().manual_seed(seed)
    others = labeled * task.config.ratio
    views = [torch.randn(count, 1, 12, 12, generator=generator) for count in (labeled + others, others)]
    label = torch.cat([torch.arange(labeled) % task.classifier.classes, torch.full((others,), -1)])
    return Batch(TrainProgress(step, 10, 1), torch.arange(labeled + others), views, label)


@given(st.integers(1, 4), st.integers(1, 3), st.floats(0.2, 0.95), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_loss_is_a_sum_over_what_the_teacher_is_sure_of(
    labeled: int, ratio: int, confidence: float, seed: int
) -> None:
    task = tiny(3, f"unlabeled.ratio={ratio}", f"unlabeled.confidence={confidence}", "unlabeled.weight=0.7")
    batch = step_of(task, labeled)
    generator = torch.Generator().manual_seed(seed)
    logits, taught = (2 * torch.randn(len(view), 3, generator=generator) for view in batch.views)
    task.mean.copy_(torch.tensor([0.2, 0.5, 0.3]))
    output = task.objective({"logits": logits, "taught": taught}, batch)

    def log_share(row: Tensor, of_class: int) -> float:
        return float(row[of_class]) - math.log(sum(math.exp(float(value)) for value in row))

    assert batch.label is not None
    supervised = -sum(log_share(logits[i], int(batch.label[i])) for i in range(labeled)) / labeled
    terms, sure = [], 0
    for strong, mild in zip(logits[labeled:], taught, strict=True):
        p = [math.exp(log_share(mild, c)) * share / mean for c, (share, mean) in enumerate(
            zip((0.5, 0.25, 0.25), (0.2, 0.5, 0.3), strict=True)
        )]  # fmt: skip
        surest = max(range(3), key=lambda c: p[c])
        counts = p[surest] / sum(p) >= confidence
        sure += counts
        terms.append(-log_share(strong, surest) if counts else 0.0)
    assert float(output.loss) == pytest.approx(supervised + 0.7 * sum(terms) / len(terms), rel=1e-4, abs=1e-5)
    assert float(output.metrics["sure"]) == pytest.approx(sure / len(terms))


def test_the_teacher_has_no_gradient_and_follows_from_the_start() -> None:
    task = tiny()
    task.train()
    before = copy.deepcopy(task.teacher.network.state_dict())
    task(step_of(task, 4)).loss.backward()
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert all(parameter.grad is not None for parameter in task.classifier.parameters())
    learned = {id(parameter) for group in task.param_groups() for _, parameter in group["params"]}
    assert learned == {id(parameter) for parameter in task.classifier.parameters()}
    with torch.no_grad():
        for parameter in task.classifier.parameters():
            parameter.add_(1)
    task.after_step(step_of(task, 4, step=3))  # a plain mean over four steps, as momentum would keep more
    for name, parameter in task.classifier.named_parameters():
        assert torch.allclose(task.teacher.network.get_parameter(name), 0.75 * before[name] + 0.25 * parameter)
    task.after_step(step_of(task, 4, step=0))
    for name, parameter in task.classifier.named_parameters():
        assert torch.equal(task.teacher.network.get_parameter(name), parameter)


@pytest.mark.parametrize(("frozen", "regime"), [(True, "lp_ft"), (True, "end_to_end"), (False, "end_to_end")])
def test_kept_statistics_are_stage_ones_for_classifier_and_teacher(frozen: bool, regime: str) -> None:
    told = ["unlabeled=consistency", f"regime={regime}", f"regime.freeze_bn_stats={frozen}", "regime.length=2 steps",
            "regime.min_steps=0", "regime.optim.lr=0.01", "unlabeled.ratio=2"]  # fmt: skip
    config = load("finetune", FinetuneConfig, ["tracking=off", *told])
    pool = images(24)
    torch.manual_seed(0)
    task = config.downstream.build(BLUEPRINT.build()[0], 2)
    around = context_of(config, pool, LabeledSplit(pool, None))
    before, learners = copy.deepcopy(task.encoder.state_dict()), list[Consistency]()
    with pytest.MonkeyPatch.context() as patched:
        after_step = Consistency.after_step

        def noted(self: Consistency, batch: Batch) -> None:
            learners.append(self)
            after_step(self, batch)

        patched.setattr(Consistency, "after_step", noted)
        train(config.regime, task, around)
    taught = learners[0].teacher.network
    assert isinstance(taught, Classification)
    assert any(not torch.equal(value, before[name]) for name, value in task.encoder.named_parameters())
    for encoder in (task.encoder, taught.encoder):
        moved = [name for name, value in encoder.named_buffers() if not torch.equal(value, before[name])]
        assert bool(moved) == (not frozen)


def test_a_batch_has_ratio_times_as_many_images_and_their_second_view_is_theirs_alone() -> None:
    config, unlabeled = settled("unlabeled.ratio=2")
    policies = [
        policy.model_copy(update={"size": 12}).for_channels(1)[0] for policy in (config.transform, unlabeled.transform)
    ]
    ours, theirs = (Views(policy, (0.5,), (0.3,), seed) for seed, policy in enumerate(policies))
    others = images(30, 1)
    others.labels = others.classes = None
    for batch in PairedLoader(images(12), others, ours, theirs, 4, 0, SHARE, 3, target_size=8).from_step(0):
        assert batch.label is not None
        assert [len(view) for view in batch.views] == [12, 8]
        assert batch.label.tolist() == [i % 2 for i in batch.index[:4].tolist()] + [-1] * 8


def test_a_damaged_file_counts_on_its_own_side() -> None:
    config, _ = settled()
    views = Views(config.transform.model_copy(update={"size": 12}).for_channels(1)[0], (0.5,), (0.3,), 0)
    ours, theirs = images(12), images(200, 1)
    ours.bad_files, theirs.bad_files = BadFiles(parse_limit("1%"), 12), BadFiles(parse_limit("1%"), 200)
    batches = PairedLoader(ours, theirs, views, views, 4, 0, SHARE, 3)
    theirs.bad_files.learn({"photo": "truncated"})
    assert batches.unreadable == 1
    batches.check_bad_files()  # two of 200 are allowed, and none of 12
    ours.bad_files.learn({"labeled": "truncated"})
    with pytest.raises(ConfigError, match="1 of 12 files"):
        batches.check_bad_files()


@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_what_is_held_out_is_not_seen_and_no_label_is_there_to_be_read(validation: float) -> None:
    config, _ = settled()
    pool, labels = images(40), LabelsConfig(per_class=4, validation=validation)
    _, held_out = draw_index(labels, config.downstream, pool, 3)
    others = unlabeled_pool(labels, config.downstream, pool, 3)
    assert others.labels is None
    assert others.classes is None
    assert len(others) == 40 - round(validation * 8)
    assert others.pixels is not None
    assert pool.pixels is not None
    for i in [] if held_out is None else held_out.tolist():
        assert not (others.pixels == pool.pixels[i]).flatten(1).all(1).any()
    assert pool.labels is not None  # its own are still there


def accuracy(*words: str) -> float:
    """Of a network that was trained from scratch on two labels a class."""
    config = load("finetune", FinetuneConfig, ["tracking=off", "regime=scratch", "regime.min_steps=200", *words,
        "labels.per_class=2", "labels.validation=0", "transform.crop.scale=[0.9,1.0]", "regime.length=1 steps", "regime.batch_size=4"])  # fmt: skip
    pool, held_out, preprocessing = images(200), images(200, 1), Preprocessing(12, (0.5,), (0.3,))
    torch.manual_seed(0)
    task = config.downstream.build(BLUEPRINT.build()[0], 2)
    index, _ = draw_index(config.labels, config.downstream, pool, 0)
    around = context_of(config, pool, LabeledSplit(pool.select(index), None))
    train(config.regime, task, around)
    return task.evaluate(held_out, preprocessing, SHARE)["accuracy"]


def test_it_helps_where_labels_are_few() -> None:
    assert accuracy("unlabeled=consistency", "unlabeled.ratio=8") > accuracy() + 0.08


@pytest.mark.parametrize(("words", "said"), [
    (["regime=frozen"], "`unlabeled` trains all layers, and regime `frozen` the head alone"),
    (["downstream=regression"], "`unlabeled` is for downstream=classification, and this is regression"),
    (["domain=mcc", "domain.target=[a]"], "`domain` and `unlabeled` both bring images without labels"),
    (["unlabeled.transform.num_views=1", "unlabeled.transform.second_view=null"], "`unlabeled.transform` makes 1 view\\(s\\) of an image, and 2 are needed"),
    (["unlabeled.transform.local_views.count=2"], "`unlabeled.transform` makes 4 view\\(s\\)"),
    (["unlabeled.transform.amplitude_mix.probability=0.5"], "`unlabeled.transform.amplitude_mix` is for stage one"),
    (["unlabeled.transform.grayscale=0.2"], "`unlabeled.transform.grayscale` needs RGB images"),
    (["unlabeled.transform.second_view.grayscale=0.2"], "`unlabeled.transform.second_view.grayscale` needs RGB images"),
    (["unlabeled.path=nowhere"], "`unlabeled.path`: 'nowhere' does not exist"),
    (["unlabeled.ratio=21"], "`unlabeled.ratio` is 21, and stripes has 40 images: take at most 20"),
])  # fmt: skip
def test_what_does_not_go_together_is_told(words: list[str], said: str) -> None:
    config, _ = settled(*words)
    with pytest.raises(ConfigError, match=said):
        config.check(images(40), images(10, 1))


def test_a_folder_of_images_may_stand_beside_the_data(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (20 + i, 14), (40 * i, 0, 0)).save(photos / ("below" if i % 2 else ".") / f"{i}.png")
    words = [
        "regime=scratch",
        "regime.length=2 steps",
        "regime.min_steps=0",
        "unlabeled=consistency",
        "unlabeled.ratio=1",
    ]
    run = ["backbone.width=4", "num_workers=0", "labels.validation=0", f"unlabeled.path={photos}"]
    config = tiny_finetune(tmp_path / "none", tmp_path / "run", *words, *run, "encoder=null")
    seen = list[int]()
    with pytest.MonkeyPatch.context() as patched:
        objective = Consistency.objective

        def noted(self: Consistency, embeddings: Embeddings, batch: Batch) -> StepOutput:
            seen.extend(batch.index[len(batch.index) // 2 :].tolist())
            return objective(self, embeddings, batch)

        patched.setattr(Consistency, "objective", noted)
        finetune(config)
    assert seen
    assert set(seen) <= set(range(5))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"`unlabeled.path`: .*empty' holds 0 images"):
        finetune(
            tiny_finetune(
                tmp_path / "none", tmp_path / "other", *words, "encoder=null", f"unlabeled.path={tmp_path / 'empty'}"
            )
        )
    assert not (tmp_path / "other").exists()
