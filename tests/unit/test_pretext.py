"""Each pretext task against a loop or against lightly's parts, and what it refuses."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from lightly import loss as lightly_loss
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.schema import names
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.models.ema import EMAMomentumConfig
from ssl_pipeline.pretext.dino import DINO
from ssl_pipeline.pretext.instance_discrimination import InstanceDiscrimination
from ssl_pipeline.pretext.moco_v2 import MoCoV2
from ssl_pipeline.pretext.moco_v3 import MoCoV3
from ssl_pipeline.pretext.nnclr import NNCLR
from ssl_pipeline.pretext.swav import SwAV
from ssl_pipeline.rng import permutation
from ssl_pipeline.schedules import TrainProgress
from tests.tasks import tiny_batch, tiny_task

EVERY = names("pretext")
BRANCH = {"byol", "moco_v2", "moco_v3", "dino"}


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


def train(task: Task, batches: list[Batch], optimizer: torch.optim.Optimizer) -> None:
    for batch in batches:
        torch.manual_seed(batch.clock.step)
        optimizer.zero_grad()
        task(batch).loss.backward()
        for parameter in task.frozen(batch.clock):
            parameter.grad = None
        optimizer.step()
        task.after_step(batch)


@pytest.mark.parametrize("name", EVERY)
def test_state_survives_saving_bit_for_bit(name: str) -> None:
    """Two steps, save, load into a new task, two more: queue, bank, teacher, center and prototypes are all there."""
    optim = OptimConfig(name="sgd", lr=0.05, scaling="none")
    whole, first = tiny_task(name)
    batches = [tiny_batch(whole, len(first.views), 8, step) for step in range(4)]
    optimizer = build_optimizer(optim, whole, 8)
    train(whole, batches[:2], optimizer)
    saved = {key: value.clone() for key, value in whole.state_dict().items()}
    momenta = copy.deepcopy(optimizer.state_dict())
    other, _ = tiny_task(name, seed=1)
    other.load_state_dict(saved)
    resumed = build_optimizer(optim, other, 8)
    resumed.load_state_dict(momenta)
    train(whole, batches[2:], optimizer)
    train(other, batches[2:], resumed)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert any(not torch.equal(value, saved[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("name", [name for name in EVERY if name != "dino"])
def test_it_learns_what_it_asks(name: str) -> None:
    """Thirty steps on one batch lower the loss. (DINO's targets sharpen by themselves: its loss says nothing of that.)"""
    task, batch = tiny_task(
        name, ["pretext.temperature.value=0.3"] if "temperature" in vars(tiny_task(name)[0]) else []
    )
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=0.003, scaling="none"), task, 8)
    before = task(batch).loss.item()
    for _ in range(30):
        train(task, [batch], optimizer)
    assert task(batch).loss.item() < before


def test_dclw_is_lightlys_up_to_the_weights_gradient() -> None:
    from ssl_pipeline.losses.info_nce import two_view_info_nce
    from ssl_pipeline.pretext.dclw import weighted_positives

    first, second = torch.randn(8, 5), torch.randn(8, 5)
    ours = two_view_info_nce(first, second, 0.2, decoupled=True) + weighted_positives(first, second, 0.2, 0.5)
    with pytest.warns(UserWarning, match="copy construct"):
        theirs = lightly_loss.DCLWLoss(0.2, 0.5)(first, second)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_swav_is_lightlys() -> None:
    task, batch = tiny_task("swav", ["pretext.freeze_prototypes=0 steps"])
    assert isinstance(task, SwAV)
    batch = tiny_batch(task, 2, 8, 0, local=2)
    embeddings = task.embed(batch)
    prototypes = unit(task.prototypes.weight)
    scores = [unit(rows) @ prototypes.T for rows in embeddings.values()]
    expected = lightly_loss.SwaVLoss(0.1)(scores[:2], scores[2:])
    assert task.objective(embeddings, batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_swav_takes_its_queue_when_it_is_time() -> None:
    task, _ = tiny_task("swav", ["pretext.queue=16", "pretext.queue_start=2 steps"])
    assert isinstance(task, SwAV)
    batches = [tiny_batch(task, 2, 8, step) for step in range(3)]
    assert task._queue_scores(batches[0]) is None
    for batch in batches[:2]:
        task(batch)
        assert task._queue_scores(batch) is None
        task.after_step(batch)
    scores = task._queue_scores(batches[2])
    assert scores is not None
    assert [part.shape for part in scores] == [(16, 10), (16, 10)]
    embeddings = task.embed(batches[2])
    own = [unit(rows) @ unit(task.prototypes.weight).T for rows in embeddings.values()]
    expected = lightly_loss.SwaVLoss(0.1)(own, [], scores)
    assert task.objective(embeddings, batches[2]).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("optim", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize(("name", "key"), [("swav", "prototypes.weight"), ("dino", "student.prototypes.weight")])
def test_frozen_prototypes_stay_and_thaw_as_if_the_optimizer_were_new(
    name: str, key: str, optim: Literal["adamw", "sgd", "lars"]
) -> None:
    """Gradients of zero would decay them, and AdamW's moments of zero make its first steps several times too large."""
    config = OptimConfig(name=optim, lr=0.1, scaling="none", weight_decay=0.1, grad_clip_norm=0.5)
    task, _ = tiny_task(name, ["pretext.freeze_prototypes=3 steps"])

    def training(task: Task) -> TrainState:
        steps: Any = SimpleNamespace(seed=0)
        state = TrainState(task, build_optimizer(config, task, 8), config, start_accelerator())
        state.start(steps)
        return state

    frozen, before = training(task), task.get_parameter(key).detach().clone()
    for step in range(3):
        frozen.step(tiny_batch(task, 2, 8, step))
        assert torch.equal(task.get_parameter(key), before)
    other = copy.deepcopy(task)
    for one in (frozen, training(other)):
        one.step(tiny_batch(task, 2, 8, 3))
    assert not torch.equal(task.get_parameter(key), before)
    assert torch.equal(task.get_parameter(key), other.get_parameter(key))


def test_dino_is_lightlys_with_its_center_and_temperature() -> None:
    task, _ = tiny_task(
        "dino",
        ["pretext.teacher_temperature.start=0.02", "pretext.teacher_temperature.warmup=10 steps"],
    )
    assert isinstance(task, DINO)
    oracle = lightly_loss.DINOLoss(10)
    for step in range(3):
        batch = tiny_batch(task, 2, 8, step, local=1)
        embeddings = task.embed(batch)
        answers = [embeddings[f"student {i}"] for i in range(3)]
        targets = [embeddings[f"teacher {i}"] for i in range(2)]
        expected = oracle(targets, answers, teacher_temp=0.02 + 0.002 * step)
        before = task.loss.center.clone()
        assert task.objective(embeddings, batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.equal(task.loss.center, before)
        task.after_step(batch)
        torch.testing.assert_close(task.state_dict()["loss.center"], oracle.center)
    assert task.state_dict()["loss.center"].abs().sum() > 0


def test_barlow_and_vicreg_are_lightlys() -> None:
    for name, oracle in (("barlow_twins", lightly_loss.BarlowTwinsLoss()), ("vicreg", lightly_loss.VICRegLoss())):
        task, batch = tiny_task(name)
        embeddings = task.embed(batch)
        expected = oracle(embeddings["view 0"], embeddings["view 1"])
        assert task.objective(embeddings, batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_v2_is_the_loop(symmetric: bool) -> None:
    """-log exp(q·k⁺/τ) ÷ (exp(q·k⁺/τ) + Σ over the queue but for the own image)."""
    task, _ = tiny_task("moco_v2", [f"pretext.symmetric={str(symmetric).lower()}", "pretext.queue=12"])
    assert isinstance(task, MoCoV2)
    for step in range(2):
        batch = tiny_batch(task, 2, 8, step)
        embeddings = task.embed(batch)
        if step == 0:
            task.objective(embeddings, batch)
            task.after_step(batch)
    queue, samples = task.queue.keys()
    losses = []
    for way in range(2 if symmetric else 1):
        queries, keys = unit(embeddings[f"query {way}"]), unit(embeddings[f"key {way}"])
        for i in range(8):
            candidates = [queries[i] @ keys[i], *(queries[i] @ queue[j] for j in range(len(queue)) if samples[j] != i)]
            losses.append(-torch.log_softmax(torch.stack(candidates) / 0.2, 0)[0])
    assert task.objective(embeddings, batch).loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_moco_v3_is_the_paper_s_pseudocode() -> None:
    task, batch = tiny_task("moco_v3")
    assert isinstance(task, MoCoV3)
    e = task.embed(batch)

    def ctr(q: Tensor, k: Tensor) -> Tensor:
        return F.cross_entropy(unit(q) @ unit(k).T / 0.2, torch.arange(8)) * 2 * 0.2

    expected = ctr(e["query 0"], e["key 1"]) + ctr(e["query 1"], e["key 0"])
    assert task.objective(e, batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_moco_v2_makes_its_keys_in_drawn_groups_with_statistics_of_their_own() -> None:
    """Shuffling BN (He et al. 2020): what a query's group knows of its batch is not what its key's group knows."""
    task, batch = tiny_task("moco_v2", ["pretext.batch_norm_group=4"])
    other, (first, second) = copy.deepcopy(task), batch.views
    assert isinstance(task, MoCoV2)
    assert isinstance(other, MoCoV2)
    orders = [permutation(8, "shuffled keys", step) for step in (0, 1)]
    assert set(orders[0][:4].tolist()) not in ({0, 1, 2, 3}, {4, 5, 6, 7}, set(orders[1][:4].tolist()))
    embeddings = task.embed(batch)
    expected = torch.empty(8, 16)
    for group in orders[0].split(4):
        expected[group] = other.teacher(second[group])
    assert torch.equal(embeddings["key 0"], expected)
    assert torch.equal(embeddings["query 0"], torch.cat([other.project(part) for part in first.split(4)]))
    task.eval()
    other.eval()
    assert torch.equal(task.embed(batch)["key 0"], other.teacher(second))  # nothing to shuffle for


def test_moco_v2_without_groups_goes_by_the_whole_batch() -> None:
    task, batch = tiny_task("moco_v2", ["pretext.batch_norm_group=null"])
    other = copy.deepcopy(task)
    assert isinstance(other, MoCoV2)
    assert torch.equal(task.embed(batch)["key 0"], other.teacher(batch.views[1]))
    assert task.synchronizes_norms
    assert not tiny_task("moco_v2")[0].synchronizes_norms


def test_a_learned_temperature_pays_for_nothing_but_its_softmax() -> None:
    """MoCo v3's factor of 2τ would be lowered by lowering τ, whatever the rows are."""
    task, batch = tiny_task("moco_v3", ["pretext.temperature.learned.min=0.05"])
    e = {key: rows.detach() for key, rows in task.embed(batch).items()}
    task.objective(e, batch).loss.backward()
    log_scale = torch.tensor(-math.log(0.2), requires_grad=True)
    ways = [unit(e[f"query {i}"]) @ unit(e[f"key {1 - i}"]).T * log_scale.exp() for i in (0, 1)]
    (2 * 0.2 * torch.stack([F.cross_entropy(logits, torch.arange(8)) for logits in ways]).sum()).backward()
    assert isinstance(task, MoCoV3)
    assert task.temperature.log_scale is not None
    torch.testing.assert_close(task.temperature.log_scale.grad, log_scale.grad, rtol=1e-5, atol=1e-7)


def test_nnclr_is_the_loop_over_neighbors() -> None:
    task, batch = tiny_task("nnclr")
    assert isinstance(task, NNCLR)
    support = F.normalize(torch.randn(20, 16), dim=1)
    task.queue.push(support, torch.arange(20))
    e = task.embed(batch)
    losses = []
    for way in (0, 1):
        rows, predictions = unit(e[f"projection {way}"]), unit(e[f"prediction {1 - way}"])
        for i in range(8):
            neighbor = max(support, key=lambda row: float((row @ rows[i]).detach()))
            losses.append(-torch.log_softmax(predictions @ neighbor / 0.1, 0)[i])
    assert task.objective(e, batch).loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    task.after_step(batch)
    assert len(task.queue) == 28


def test_instance_discrimination_fills_its_memory_and_moves_it_after_the_step() -> None:
    task, batch = tiny_task("instance_discrimination")
    assert isinstance(task, InstanceDiscrimination)
    before = task.bank.rows.clone()
    assert torch.allclose(before.norm(dim=1), torch.ones(8))
    embeddings = task.embed(batch)
    rows = [unit(value) for value in embeddings.values()]
    logits = torch.stack(rows) @ before.T / 0.07
    expected = F.cross_entropy(logits.flatten(0, 1), torch.arange(8).repeat(2))
    output = task.objective(embeddings, batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(task.bank.rows, before)
    task.after_step(batch)
    seen = unit((embeddings["view 0"] + embeddings["view 1"]).detach() / 2)
    torch.testing.assert_close(task.bank.rows, unit(0.5 * before + 0.5 * seen))


def test_byol_predicts_the_other_view_s_target() -> None:
    task, batch = tiny_task("byol")
    e = task.embed(batch)
    ways = [-(unit(e[f"prediction {i}"]) * unit(e[f"target {1 - i}"])).sum(1).mean() for i in (0, 1)]
    assert task.objective(e, batch).loss.item() == pytest.approx(torch.stack(ways).mean().item(), rel=1e-5)


def test_rotation_counts_quarter_turns() -> None:
    task, batch = tiny_task("rotation")
    embeddings = task.embed(batch)
    right = torch.full((8, 8, 4), -50.0)
    right.scatter_(2, torch.arange(4).repeat_interleave(2).expand(8, 8)[:, :, None], 50.0)
    output = task.objective({"logits": right}, batch)
    assert output.loss.item() == pytest.approx(0, abs=1e-6)
    assert float(output.metrics["accuracy"]) == 1
    assert embeddings["logits"].shape == (8, 8, 4)
    turned = [torch.rot90(batch.views[1], turns, (2, 3)) for turns in range(4)]
    assert not torch.equal(turned[1], turned[3])


@pytest.mark.parametrize("name", sorted(BRANCH))
def test_a_teacher_follows_after_the_step_and_has_no_gradient(name: str) -> None:
    task, batch = tiny_task(name, ["pretext.momentum.start=0.9", "pretext.momentum.end=0.9"])
    teacher = {key: p for key, p in task.named_parameters() if key.startswith("teacher.")}
    before = {key: p.clone() for key, p in teacher.items()}
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.5, scaling="none"), task, 8)
    task(batch).loss.backward()
    assert all(p.grad is None for p in teacher.values())
    optimizer.step()
    assert all(torch.equal(p, before[key]) for key, p in teacher.items())
    task.after_step(batch)
    student = dict(task.named_parameters())
    moved = 0
    for key, p in teacher.items():
        rest = key.removeprefix("teacher.network.")
        own = student.get("student." + rest) if name == "dino" else None
        if own is None:
            number, _, rest = rest.partition(".")
            own = student.get(
                {"0": "encoder.", "1": "projection."}.get(number, "encoder.") + rest, student.get("encoder." + rest)
            )
        assert own is not None, key
        torch.testing.assert_close(p, 0.9 * before[key] + 0.1 * own)
        moved += int(not torch.equal(p, before[key]))
    assert moved > 0


def test_momentum_rises_to_its_end() -> None:
    config = EMAMomentumConfig(start=0.9, end=1.0)
    assert [config.at(TrainProgress(step, 100, 10)) for step in (0, 50, 100)] == pytest.approx([0.9, 0.95, 1.0])


def test_supcon_treats_an_unlabeled_image_as_its_own_class() -> None:
    from ssl_pipeline.losses.info_nce import two_view_info_nce

    task, batch = tiny_task("supcon")
    batch.label = torch.tensor([0, 0, 1, 1, -1, -1, 0, -1])
    e = task.embed(batch)
    ids = torch.tensor([0, 0, 1, 1, 10, 11, 0, 12])
    expected = two_view_info_nce(e["view 0"], e["view 1"], 0.1, ids)
    assert task.objective(e, batch).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_temperature_per_domain_reaches_the_right_rows() -> None:
    """A temperature per domain: rows of other domains weigh less at a higher one."""
    from ssl_pipeline.losses.info_nce import two_view_info_nce

    rows = F.normalize(torch.randn(2, 6, 4, dtype=torch.float64), dim=2)
    domain = torch.tensor([0, 0, 0, 1, 1, 1])
    both = two_view_info_nce(rows[0], rows[1], 0.2, domain=domain, other_domain=0.2)
    assert both.item() == pytest.approx(two_view_info_nce(rows[0], rows[1], 0.2).item(), rel=1e-12)
    apart = two_view_info_nce(rows[0], rows[1], 0.2, domain=domain, other_domain=1e6)
    ids = torch.arange(6)
    expected = []
    every, sample, place, domains = rows.flatten(0, 1), ids.repeat(2), torch.arange(12), domain.repeat(2)
    for i in range(12):
        logits = every @ every[i] / torch.tensor([1e6, 0.2], dtype=torch.float64)[(domains == domains[i]).long()]
        kept = logits[place != i]
        expected.append(kept.logsumexp(0) - logits[(sample == sample[i]) & (place != i)])
    assert apart.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        (
            "moco_v2",
            ["pretext.queue=9", "pretext.leave_out_same_sample=false"],
            r"`pretext\.queue` of 9 is longer than the 8",
        ),
        ("moco_v2", ["pretext.momentum.start=1.0"], "never moves the teacher"),
        ("byol", ["pretext.momentum.start=1.0"], "never moves the teacher"),
        ("simclr", ["pretext.temperature.value=0"], "greater than 0"),
        ("swav", ["pretext.temperature=-0.1"], "greater than 0"),
        (
            "dino",
            ["pretext.teacher_temperature.learned.min=0.1", "pretext.teacher_temperature.value=0.2"],
            "no gradient",
        ),
        ("nnclr", ["pretext.temperature.other_domain=0.2"], "no meaning"),
        ("instance_discrimination", ["pretext.memory_momentum=1.0"], "less than 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name: str, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_task(name, overrides)


def test_details_are_what_the_temperature_does() -> None:
    for name in ("simclr", "moco_v2", "moco_v3", "nnclr", "instance_discrimination", "supcon", "dcl"):
        task, batch = tiny_task(name)
        output = task(batch)
        assert output.details is not None
        figures = output.details()
        assert set(figures) == {"entropy_share", "effective_negatives", "p_positive", "hardest_1pct", "hardest_5pct"}
        assert all(math.isfinite(float(value)) for value in figures.values()), name
        assert 0 <= float(figures["p_positive"]) <= 1


@pytest.mark.parametrize("name", ["simclr", "dcl", "moco_v3", "nnclr"])
def test_an_image_that_comes_twice_is_no_negative_of_itself(name: str) -> None:
    """A damaged file gives way to its neighbor, which may be in the batch already."""
    task, batch = tiny_task(name)
    embeddings = task.embed(batch)
    apart = task.objective(embeddings, batch).loss.item()
    batch.index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    assert task.objective(embeddings, batch).loss.item() != apart
