"""Methods across domains: each loss against a loop, each method's contract, and what none of them may see."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.config.schema import names
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader
from ssl_pipeline.data.paired import PairedLoader
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.domain.adaptation.dance import DANCE, entropy_separation, neighborhood_entropy
from ssl_pipeline.domain.adaptation.dann import ramp, reverse_gradient
from ssl_pipeline.domain.adaptation.exemplar_memory import memory_loss
from ssl_pipeline.domain.losses import class_confusion, coral_loss, entropy, information_maximization, mmd_loss
from ssl_pipeline.domain.method import JointConfig, Method, MethodConfig, update_bn
from ssl_pipeline.domain.metrics import soft_neighborhood_density
from ssl_pipeline.domain.plan import train_across
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.labels import LabeledSplit
from ssl_pipeline.downstream.regime import TrainContext
from ssl_pipeline.engine.loop import fit
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.batch_norm import batch_norms
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.heads import CosineHead
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.tasks import Recorder

SHARE = DistInfo(0, 1, torch.device("cpu"))
PREPROCESSING = Preprocessing(12, (0.5,), (0.3,))
METHODS = names("domain")


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_coral_is_the_papers_sum(n: int, m: int, width: int, seed: int) -> None:
    first, second = rows(n, width, seed), 2 * rows(m, width, seed + 1) + 1

    def cov(x: Tensor, i: int, j: int) -> float:
        a, b = x[:, i].double(), x[:, j].double()
        return float(((a - a.mean()) * (b - b.mean())).sum() / (len(x) - 1))

    by_hand = sum((cov(first, i, j) - cov(second, i, j)) ** 2 for i in range(width) for j in range(width))
    assert float(coral_loss(first, second)) == pytest.approx(by_hand / (4 * width**2), rel=1e-4, abs=1e-6)


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_mmd_is_the_sum_over_all_pairs(n: int, m: int, seed: int) -> None:
    first, second = rows(n, 3, seed), rows(m, 3, seed + 1) + 1
    both = torch.cat([first, second]).double()
    scale = float(torch.pdist(both).square().mean())

    def kernel(a: Tensor, b: Tensor) -> float:
        return sum(math.exp(-float((a - b).square().sum()) / (s * scale)) for s in (0.5, 2.0)) / 2

    def mean(x: Tensor, y: Tensor) -> float:
        return sum(kernel(a, b) for a in x.double() for b in y.double()) / (len(x) * len(y))

    by_hand = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    assert float(mmd_loss(first, second, (0.5, 2.0))) == pytest.approx(by_hand, abs=1e-5)


def test_alignment_of_a_set_with_itself_is_nothing() -> None:
    x = rows(7, 4)
    assert float(coral_loss(x, x)) == 0
    assert float(mmd_loss(x, x, (1.0,))) == pytest.approx(0, abs=1e-6)


def test_the_reversed_gradient_is_the_gradient_times_minus_strength() -> None:
    x = rows(5, 3).requires_grad_()
    weight = rows(5, 3, 1)
    (plain,) = torch.autograd.grad((x * weight).sin().sum(), x)
    (reverse,) = torch.autograd.grad((reverse_gradient(x, 0.7) * weight).sin().sum(), x)
    assert torch.allclose(reverse, -0.7 * plain, atol=1e-6)


def test_the_ramp_is_the_papers() -> None:
    assert ramp(TrainProgress(0, 100, 10), 10) == 0
    assert ramp(TrainProgress(50, 100, 10), 10) == pytest.approx(2 / (1 + math.exp(-5)) - 1)
    assert ramp(TrainProgress(99, 100, 10), 10) > 0.999


def test_class_confusion_is_the_papers_sum() -> None:
    logits, temperature = 3 * rows(6, 4), 2.5
    p = (logits / temperature).softmax(1)
    weight = [1 + math.exp(float((row * row.log()).sum())) for row in p]
    weight = [6 * w / sum(weight) for w in weight]
    c = [[sum(weight[i] * float(p[i, a] * p[i, b]) for i in range(6)) for b in range(4)] for a in range(4)]
    c = [[value / sum(row) for value in row] for row in c]
    off_diagonal = sum(c[a][b] for a in range(4) for b in range(4) if a != b) / 4
    assert float(class_confusion(logits, temperature)) == pytest.approx(off_diagonal, abs=1e-5)


def test_information_is_greatest_where_certain_and_diverse() -> None:
    certain = 50 * torch.eye(4).repeat(3, 1)
    assert float(information_maximization(certain)) == pytest.approx(-math.log(4), abs=1e-5)
    assert float(information_maximization(torch.zeros(5, 4))) == pytest.approx(0, abs=1e-6)
    assert float(information_maximization(certain[:1].repeat(6, 1))) == pytest.approx(
        0, abs=1e-5
    )  # certain, but one class


@pytest.mark.parametrize("loss", [
    information_maximization, lambda z: entropy(z).mean(), lambda z: class_confusion(z, 2.5), lambda z: entropy_separation(z, 0.5),
])  # fmt: skip
def test_gradients_are_numbers_where_shares_underflow(loss: Any) -> None:
    logits = (1000 * rows(6, 4)).requires_grad_()
    loss(logits).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_memorys_loss_is_a_sum_over_itself_and_its_neighbors() -> None:
    bank, x, index = F.normalize(rows(9, 4)), rows(3, 4, 1), torch.tensor([2, 0, 7])
    losses = []
    for row, i in zip(F.normalize(x), index.tolist(), strict=True):
        similarity = [float(k @ row) for k in bank]
        total = sum(math.exp(s / 0.05) for s in similarity)
        others = sorted((j for j in range(9) if j != i), key=lambda j: -similarity[j])[:2]
        own = [math.log(math.exp(similarity[j] / 0.05) / total) for j in (i, *others)]
        losses.append(-own[0] - (own[1] + own[2]) / 2)
    assert float(memory_loss(x, bank, index, 0.05, 2)) == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_neighborhood_entropy_leaves_a_row_itself_out() -> None:
    bank, x, index, prototypes = F.normalize(rows(5, 3)), rows(2, 3, 1), torch.tensor([4, 1]), rows(3, 3, 2)
    entropies = []
    for row, i in zip(F.normalize(x), index.tolist(), strict=True):
        candidates = [bank[j] for j in range(5) if j != i] + list(F.normalize(prototypes))
        p = torch.stack([c @ row / 0.05 for c in candidates]).softmax(0)
        entropies.append(-float((p * p.clamp_min(1e-38).log()).sum()))
    assert float(neighborhood_entropy(x, bank, index, prototypes, 0.05)) == pytest.approx(sum(entropies) / 2, abs=1e-5)


def test_dances_term_is_the_papers_sum_with_the_classes_of_a_cosine_head() -> None:
    task, config, target = tiny_method("dance")
    assert isinstance(task, DANCE)
    head = task.classifier.head
    assert isinstance(head, CosineHead)
    prime(task, target)
    batch = next(tiny_batches(config, target).from_step(0))
    embeddings = task.embed(batch)
    source, theirs = ({name: part.chunk(2)[half] for name, part in embeddings.items()} for half in (0, 1))
    prototypes, memory = F.normalize(head.weight), task.bank.rows
    gathered, separated = [], []
    for row, index in zip(F.normalize(theirs["features"]), batch.index.chunk(2)[1].tolist(), strict=True):
        to_classes = [row @ prototype / 0.05 for prototype in prototypes]
        to_others = [row @ memory[j] / 0.05 for j in range(len(memory)) if j != index]
        share = torch.stack([*to_others, *to_classes]).softmax(0)
        gathered.append(-(share * share.clamp_min(1e-38).log()).sum())
        p = torch.stack(to_classes).softmax(0)
        distance = (-(p * p.clamp_min(1e-38).log()).sum() - math.log(3) / 2).abs()
        separated.append(distance if distance > 0.5 else torch.zeros(()))
    expected = torch.stack(gathered).mean() - torch.stack(separated).mean()
    assert float(task.term(source, theirs, batch).detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


def test_dance_without_the_cosine_head_is_refused() -> None:
    refused, taken = (
        load("finetune", FinetuneConfig, ["domain=dance", f"downstream.head={head}"]) for head in ("linear", "cosine")
    )
    assert refused.domain is not None
    assert refused.domain.check(taken.downstream, taken.regime) == []
    assert "set downstream.head=cosine" in refused.domain.check(refused.downstream, refused.regime)[0]


def test_entropies_within_the_margin_are_left_alone() -> None:
    middle = torch.tensor([[0.0, 0.0, -50.0, -50.0]])  # log 2 is half of log 4
    assert float(entropy_separation(middle, 0.1)) == 0
    certain, unsure = torch.tensor([[50.0, 0, 0, 0]]), torch.zeros(1, 4)
    for logits in (certain, unsure):
        assert float(entropy_separation(logits, 0.1)) == pytest.approx(-math.log(4) / 2, abs=1e-5)


def test_predictions_in_dense_groups_have_a_greater_density() -> None:
    torch.manual_seed(0)
    grouped = 20 * F.one_hot(torch.arange(40) % 4, 4).float()
    scattered = 3 * torch.randn(40, 4)
    assert soft_neighborhood_density(grouped) > soft_neighborhood_density(scattered)


def images(count: int, seed: int) -> ArrayDataset:
    pixels = torch.randint(0, 256, (count, 1, 12, 12), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    labels, domains = torch.arange(count) % 3, torch.arange(count) % 2
    return ArrayDataset("random", pixels, labels, ("a", "b", "c"), domains=domains, domain_names=("one", "two"))


def tiny_method(name: str, *overrides: str) -> tuple[Method, MethodConfig, ArrayDataset]:
    """A method around a tiny classifier, and its target."""
    wanted = [f"domain={name}", "downstream.bottleneck.width=6", *overrides]
    config = load("finetune", FinetuneConfig, wanted)
    assert config.domain is not None
    torch.manual_seed(0)
    backbone = BackboneConfig(width=4)
    blueprint = EncoderSpec(backbone=backbone, neck=NeckConfig(), channels=1, size=12, mean=(0.5,), std=(0.3,))
    classifier = config.downstream.build(blueprint.build()[0], 3)
    assert isinstance(classifier, Classification)
    target = images(17, 1)
    target.labels = target.classes = None
    return config.domain.build(classifier, target), config.domain, target


def context() -> TrainContext:
    policy, _ = load("finetune", FinetuneConfig).transform.model_copy(update={"size": 12}).for_channels(1)
    labeled, views = LabeledSplit(images(24, 0), None), Views(policy, (0.5,), (0.3,), 0)
    return TrainContext(labeled, views, PREPROCESSING, 0, Accelerator(cpu=True), 0)


def tiny_batches(config: MethodConfig, target: ArrayDataset, total: int = 4) -> IndexedLoader:
    policy, _ = load("finetune", FinetuneConfig).transform.model_copy(update={"size": 12}).for_channels(1)
    views = [Views(policy, (0.5,), (0.3,), seed) for seed in (0, 1)]
    if config.phases[-1] == "joint":
        return PairedLoader(images(24, 0), target, views[0], views[1], 6, 0, SHARE, total, 0)
    side = target if config.phases[-1] == "target" else images(24, 0)
    return IndexedLoader(side, views[0], 6, 0, SHARE, total, 0, with_labels=side.labels is not None)


def prime(task: Task, target: ArrayDataset) -> None:
    with torch.no_grad():
        task.eval()
        task.prime(lambda forward: torch.cat([forward(x) for x in read_in_order(target, PREPROCESSING, SHARE.device)]))


def test_the_two_sides_are_not_cropped_alike() -> None:
    task, config, target = tiny_method("dann")
    made = list[PairedLoader]()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ssl_pipeline.domain.plan.run_loop", lambda *words: made.append(words[2]))
        regime = load("finetune", FinetuneConfig, ["regime=scratch", "regime.length=2 steps"]).regime
        train_across(config, regime, task.classifier, target, context())
    assert made[0].views.seed != made[0].target.views.seed


def test_the_memory_holds_the_features_of_the_last_step() -> None:
    task, config, target = tiny_method("exemplar_memory")
    prime(task, target)
    (batch, *_) = tiny_batches(config, target).from_step(0)
    before = {name: value.clone() for name, value in task.named_buffers()}
    task(batch)
    task.after_step(batch)
    after = dict(task.named_buffers())
    rows_moved = {
        name: (after[name] != value).flatten(1).any(1).nonzero()[:, 0].tolist()
        for name, value in before.items() if value.ndim == 2 and len(value) == len(target)
    }  # fmt: skip
    (moved,) = rows_moved.values()
    assert moved == sorted(batch.index.chunk(2)[1].tolist())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_resumes_bit_for_bit(name: str) -> None:
    states: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
    for resume in (None, 2):
        task, config, target = tiny_method(name)
        prime(task, target)
        batches, optim = tiny_batches(config, target), OptimConfig(name="adamw", lr=0.01)
        optimizer, kept = build_optimizer(optim, task, 6), dict[str, Any]()

        def keep(
            clock: TrainProgress,
            task: Task = task,
            optimizer: Any = optimizer,
            batches: IndexedLoader = batches,
            kept: dict[str, Any] = kept,
        ) -> dict[str, float]:
            if clock.step == 1:
                kept |= {"done": 2, "skipped": (0, 0), "task": copy.deepcopy(task.state_dict()), "scaler": None}
                kept |= {"optimizer": copy.deepcopy(optimizer.state_dict()), "batches": batches.state_dict()}
            return {}

        saved = states[0][1] if resume else None
        state = TrainState(task, optimizer, optim, Accelerator(cpu=True), resume=saved)
        fit(state, batches, [Recorder(keep, 2)])
        states.append((copy.deepcopy(task.state_dict()), kept))
    whole, resumed = states[0][0], states[1][0]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    middle = states[0][1]["task"]
    assert not all(torch.equal(whole[key], middle[key]) for key in whole)


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_that_learns_gets_a_gradient(name: str) -> None:
    task, config, target = tiny_method(name)
    prime(task, target)
    task.train()
    batch = next(tiny_batches(config, target).from_step(1))  # at step 0 DANN reverses nothing
    task(batch).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.parameters() if p.requires_grad)
    learned = [id(p) for group in task.param_groups() for _, p in group["params"]]
    assert len(set(learned)) == len(learned)


def test_source_free_adaptation_leaves_the_head_as_it_is() -> None:
    task, config, target = tiny_method("shot_im")
    before = copy.deepcopy(dict(task.named_parameters()))
    optim = OptimConfig(name="adamw", lr=0.01, weight_decay=0.1)
    state = TrainState(task, build_optimizer(optim, task, 6), optim, Accelerator(cpu=True))
    fit(state, tiny_batches(config, target))
    stayed = {name for name, value in task.named_parameters() if torch.equal(value, before[name])}
    assert stayed == {name for name in before if ".head." in name}
    assert len(stayed) == 2


def trained_across(name: str, *words: str) -> tuple[Classification, set[str]]:
    """A classifier that a method has trained from its first step to its end, and the names of what was moved."""
    adaptation = ["domain.adaptation.length=2 steps"] if name == "shot_im" else []
    task, method, target = tiny_method(name, *adaptation)
    classifier = task.classifier
    told = [*words, "regime.length=2 steps", "regime.min_steps=0", "regime.batch_size=6", "regime.optim.lr=0.01"]
    config = load("finetune", FinetuneConfig, told)
    before = copy.deepcopy(classifier.state_dict())
    train_across(method, config.regime, classifier, target, context())
    return classifier, {key for key, value in classifier.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"adabn"}))
def test_kept_statistics_are_stage_ones_to_the_end(name: str) -> None:
    classifier, changed = trained_across(name, "regime=end_to_end", "regime.freeze_bn_stats=true")
    of_encoder = {f"encoder.{key}" for key, _ in classifier.encoder.named_buffers()}
    assert not changed & of_encoder
    assert any(key.startswith("encoder.") for key in changed)
    assert {"bottleneck.1.running_mean", "bottleneck.1.running_var"} <= changed


@pytest.mark.parametrize("name", ["source_only", "weight_averaging"])
def test_a_batchs_statistics_are_learned_by_default(name: str) -> None:
    classifier, changed = trained_across(name, "regime=end_to_end")
    means = {f"encoder.{key}" for key, _ in classifier.encoder.named_buffers() if key.endswith("running_mean")}
    assert means <= changed


def test_a_method_that_estimates_statistics_anew_keeps_none() -> None:
    _, method, _ = tiny_method("adabn")
    config = load("finetune", FinetuneConfig)
    assert not method.check(config.downstream, config.regime)
    (told,) = method.check(config.downstream, config.regime.model_copy(update={"freeze_bn_stats": True}))
    assert told.startswith(
        "`domain=adabn` estimates BatchNorm's statistics anew, and `regime.freeze_bn_stats=true` keeps stage one's"
    )


JOINT = [name for name in METHODS if isinstance(tiny_method(name)[1], JointConfig)]


@pytest.mark.parametrize("name", JOINT)
def test_in_two_forwards_source_rows_do_not_feel_the_target(name: str) -> None:
    for joint, feels in (("true", True), ("false", False)):
        task, config, target = tiny_method(name, f"domain.joint_forward={joint}")
        prime(task, target)
        task.train()
        batch = next(tiny_batches(config, target).from_step(0))
        changed = batch.views[0].clone()
        changed[6:] += 3
        other = Batch(batch.clock, batch.index, [changed], batch.label)
        torch.manual_seed(0)
        before = task.embed(batch)["features"][:6]
        torch.manual_seed(0)
        after = task.embed(other)["features"][:6]
        assert torch.equal(before, after) != feels


def test_a_paired_batch_has_the_sources_labels_and_the_targets_numbers() -> None:
    _, config, target = tiny_method("dann")
    for batch in tiny_batches(config, target, total=6).from_step(0):
        assert batch.label is not None
        assert batch.label[:6].tolist() == [i % 3 for i in batch.index[:6].tolist()]
        assert batch.label[6:].tolist() == [-1] * 6
        assert int(batch.index[6:].max()) < len(target)


def test_statistics_become_those_of_all_images_and_nothing_else_changes() -> None:
    task, _, target = tiny_method("adabn")
    classifier, before = task.classifier, {k: v.clone() for k, v in task.classifier.state_dict().items()}
    classifier.train()
    update_bn(classifier, classifier.predict, target, PREPROCESSING, SHARE)
    assert classifier.training
    first = batch_norms(classifier)[0]
    with torch.no_grad():
        whole = torch.cat(list(read_in_order(target, PREPROCESSING, SHARE.device)))
        trunk = classifier.encoder.backbone.trunk
        maps = trunk.get_submodule("conv1")(whole)
    assert first.running_mean is not None
    assert first.running_var is not None
    assert torch.allclose(first.running_mean, maps.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(first.running_var, maps.var((0, 2, 3)), rtol=1e-4)
    assert all(
        torch.equal(v, before[k]) for k, v in classifier.state_dict().items() if "running" not in k and "num_b" not in k
    )


def test_statistics_of_class_sorted_images_are_those_of_all_images() -> None:
    brightness = torch.arange(1024) // 256 * 60  # as a folder gives them: four classes, one after the other
    noise = torch.randint(0, 60, (1024, 1, 12, 12), generator=torch.Generator().manual_seed(0))
    source = ArrayDataset("sorted", (brightness[:, None, None, None] + noise).to(torch.uint8))
    norm = nn.BatchNorm2d(1)
    update_bn(norm, norm, source, PREPROCESSING, SHARE)
    whole = torch.cat(list(read_in_order(source, PREPROCESSING, SHARE.device)))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert float(norm.running_mean) == pytest.approx(float(whole.mean()), abs=1e-3)
    assert float(norm.running_var) == pytest.approx(float(whole.var()), rel=0.02)  # of one class: a twentieth of it


def test_adabn_without_batch_norm_is_told() -> None:
    task, config, target = tiny_method("adabn")
    classifier = task.classifier
    classifier.encoder = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    classifier.bottleneck = torch.nn.Identity()
    with pytest.raises(ConfigError, match="this network has none"):
        config.build(classifier, target)
