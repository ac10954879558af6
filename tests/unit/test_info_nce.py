"""InfoNCE against loops that are written as the formula is, for every option and type."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_pipeline.losses.info_nce import _SIDE, Match, info_nce, normalize_rows, two_view_info_nce


@pytest.fixture(autouse=True, params=[3, 1024], ids=["many tiles", "one tile"])
def _tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is said here holds whatever the tiles."""
    monkeypatch.setitem(_SIDE, "cpu", request.param)


@dataclass
class Case:
    """Arguments of a loss."""

    queries: Tensor
    keys: Tensor
    positive: Match
    temperature: float | Tensor = 0.3
    own: Match | None = None
    left_out: list[Match] = field(default_factory=list)
    domain: Match | None = None
    other_domain: float | Tensor | None = None
    decoupled: bool = False

    def loss(self) -> Tensor:
        return info_nce(**vars(self))

    def loop(self) -> Tensor:
        """One loop a query, one a key; differentiable."""
        losses = []
        for i, query in enumerate(self.queries):
            positives, negatives = [], []
            for j, key in enumerate(self.keys):
                if self.own is not None and self.own[0][i] == self.own[1][j]:
                    continue
                norms = query.norm() * key.norm()
                same = self.domain is None or bool(self.domain[0][i] == self.domain[1][j])
                tau = torch.as_tensor(self.temperature if same else self.other_domain, dtype=query.dtype)
                logit = query @ key / norms / (tau[i] if tau.ndim else tau)
                if self.positive[0][i] == self.positive[1][j]:
                    positives.append(logit)
                elif not any(q[i] == k[j] for q, k in self.left_out):
                    negatives.append(logit)
            if not positives or (self.decoupled and not negatives):
                continue
            candidates = negatives if self.decoupled else positives + negatives
            whole = torch.stack(candidates).exp().sum().log()
            losses.append(torch.stack([whole - positive for positive in positives]).mean())
        return torch.stack(losses).mean()


def ids(generator: torch.Generator, count: int, kinds: int) -> Tensor:
    return torch.randint(kinds, (count,), generator=generator)


def cases(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Case]:
    """Each option alone, and all of them together."""
    g = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(5, 4, generator=g, dtype=dtype), torch.randn(9, 4, generator=g, dtype=dtype)
    rows = torch.randn(8, 4, generator=g, dtype=dtype)
    sample, place = torch.arange(4).repeat(2), torch.arange(8)
    label, domain = ids(g, 4, 2).repeat(2), ids(g, 4, 2).repeat(2)
    first = torch.arange(5), torch.arange(9)
    per_row = 0.1 + torch.rand(5, generator=g, dtype=dtype)
    in_batch, of_labels = (sample, sample), (label, label)
    own = place, place
    return {
        "keys apart": Case(queries, keys, first),
        "in the batch": Case(rows, rows, in_batch, own=own),
        "as two tensors": Case(rows, rows.clone(), in_batch, own=own),
        "several positives": Case(rows, rows, of_labels, own=own),
        "positives that not all have": Case(queries, keys, (ids(g, 5, 4), ids(g, 9, 3))),
        "known false negatives": Case(rows, rows, in_batch, own=own, left_out=[of_labels]),
        "two reasons to leave out": Case(
            queries, keys, first, left_out=[(ids(g, 5, 3), ids(g, 9, 3)), (ids(g, 5, 4), ids(g, 9, 4))]
        ),
        "decoupled": Case(rows, rows, in_batch, own=own, decoupled=True),
        "decoupled, several": Case(rows, rows, of_labels, own=own, decoupled=True),
        "a temperature a row": Case(queries, keys, first, per_row),
        "a temperature a row, in the batch": Case(rows, rows, in_batch, 0.1 + torch.rand(8, generator=g, dtype=dtype), own=own),
        "a temperature a domain": Case(rows, rows, in_batch, own=own, domain=(domain, domain), other_domain=0.7),
        "everything": Case(
            queries, keys, (ids(g, 5, 3), ids(g, 9, 3)), per_row, own=(first[0], first[1] + 2),
            left_out=[(ids(g, 5, 4), ids(g, 9, 4))], domain=(ids(g, 5, 2), ids(g, 9, 2)), other_domain=per_row + 0.2,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases(0))
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop_with_its_gradient(name: str, seed: int) -> None:
    one, other = cases(seed)[name], cases(seed)[name]
    shared = one.keys is one.queries
    for case in (one, other):
        case.queries.requires_grad_()
        if not shared:
            case.keys.requires_grad_()
    loss, loop = one.loss(), other.loop()
    assert loss.item() == pytest.approx(loop.item(), rel=1e-12, abs=1e-12)
    loss.backward()
    loop.backward()
    torch.testing.assert_close(one.queries.grad, other.queries.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.keys.grad, other.keys.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["in the batch", "several positives", "keys apart", "decoupled"])
def test_lower_precision_is_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    case = cases(0, torch.float32)[name]
    shared = case.keys is case.queries
    case.queries = case.queries.to(dtype).requires_grad_()
    case.keys = case.queries if shared else case.keys.to(dtype)
    loss = case.loss()
    loss.backward()
    assert loss.dtype == torch.float32
    assert case.queries.grad is not None
    assert case.queries.grad.dtype == dtype
    case.queries = case.queries.detach().double()
    case.keys = case.queries if shared else case.keys.double()
    assert loss.item() == pytest.approx(case.loop().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["in the batch", "a temperature a row", "a temperature a domain", "everything"])
def test_gradient_of_everything_that_learns(name: str) -> None:
    case = cases(1)[name]
    shared = case.keys is case.queries
    learned = [torch.as_tensor(t, dtype=torch.float64) for t in (case.temperature, case.other_domain) if t is not None]
    inputs = [case.queries, *([] if shared else [case.keys]), *learned]

    def loss(*values: Tensor) -> Tensor:
        left = list(values)
        case.queries = left.pop(0)
        case.keys = case.queries if shared else left.pop(0)
        case.temperature = left.pop(0)
        case.other_domain = left.pop(0) if left else None
        return case.loss()

    assert torch.autograd.gradcheck(loss, [value.clone().requires_grad_() for value in inputs])


def test_equals_other_libraries() -> None:
    from lightly.loss import DCLLoss, NTXentLoss
    from pytorch_metric_learning.losses import SupConLoss

    first, second = torch.randn(16, 8), torch.randn(16, 8)
    label = torch.randint(3, (16,))
    both, twice = torch.cat([first, second]), torch.cat([label, label])
    pairs = [
        (two_view_info_nce(first, second, 0.3), NTXentLoss(temperature=0.3)(first, second)),
        (two_view_info_nce(first, second, 0.3, sample=label), SupConLoss(temperature=0.3)(both, twice)),
        (two_view_info_nce(first, second, 0.3, decoupled=True), DCLLoss(temperature=0.3)(first, second)),
    ]
    for ours, theirs in pairs:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 100), st.integers(0, 100))
def test_scale_and_order_do_not_matter_and_the_loss_is_not_negative(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = two_view_info_nce(first, second, 0.2).item()
    order = torch.randperm(6, generator=generator)
    assert loss >= 0
    assert two_view_info_nce(scale * first, second, 0.2).item() == pytest.approx(loss)
    assert two_view_info_nce(first[order], second[order], 0.2).item() == pytest.approx(loss)
    assert two_view_info_nce(second, first, 0.2).item() == pytest.approx(loss)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_identical_embeddings_give_the_log_of_the_candidates(temperature: float) -> None:
    rows = torch.ones(6, 4)
    assert two_view_info_nce(rows, rows, temperature).item() == pytest.approx(math.log(11), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decoupled", [False, True])
def test_small_temperatures_and_zero_vectors_stay_finite(dtype: torch.dtype, decoupled: bool) -> None:
    rows = torch.zeros(4, 8, dtype=dtype, requires_grad=True)
    loss = two_view_info_nce(rows, torch.randn(4, 8).to(dtype), 0.01, decoupled=decoupled)
    loss.backward()
    assert torch.isfinite(loss)
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()


def test_opposite_pairs_at_a_small_temperature() -> None:
    """All logits of a row can be far below the greatest possible one: the sum must not vanish."""
    first = torch.eye(4, dtype=torch.float32).requires_grad_()
    loss = two_view_info_nce(first, -torch.eye(4), 0.01)
    loss.backward()
    # Positive at -100, six negatives at 0: log(6) + 100.
    assert loss.item() == pytest.approx(math.log(6) + 100, rel=1e-6)
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()


def aligned(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs that are nearly equal: p of the positive is nearly 1."""
    g = torch.Generator().manual_seed(0)
    rows, one, other = (torch.randn(count, 128, generator=g, dtype=torch.float64) for _ in range(3))
    return (rows + 0.01 * one).to(dtype).requires_grad_(), (rows + 0.01 * other).to(dtype).requires_grad_()


def gradient(pair: tuple[Tensor, Tensor], loss: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(loss, pair)).double()


def test_gradient_of_aligned_pairs_is_nearer_the_truth_than_a_dense_matrix_s() -> None:
    """Where p → 1, p - 1 loses its digits in fp32; here it is taken from the sum over the negatives."""
    truth = gradient(pair := aligned(96, torch.float64), two_view_info_nce(*pair, 0.05))
    ours = gradient(pair := aligned(96, torch.float32), two_view_info_nce(*pair, 0.05))
    rows = normalize_rows(torch.cat(pair))
    logits = (rows @ rows.T / 0.05).fill_diagonal_(-torch.inf)
    dense = gradient(pair, torch.nn.functional.cross_entropy(logits, (torch.arange(192) + 96) % 192))

    def error(found: Tensor) -> float:
        return float((found - truth).norm() / truth.norm())

    assert error(ours) < 1e-4
    assert error(ours) < error(dense) / 10


def test_queries_without_a_positive_do_not_count() -> None:
    rows = torch.randn(4, 3, requires_grad=True)
    nothing = torch.arange(4), torch.arange(10, 14)
    loss = info_nce(rows, torch.randn(4, 3), nothing, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(rows.grad, torch.zeros(4, 3)) if rows.grad is not None else False


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), torch.tensor([0.1, 0.0, 0.1, 0.1])])
def test_a_temperature_that_is_not_above_0_is_refused(temperature: float | Tensor) -> None:
    rows = torch.randn(4, 2)
    with pytest.raises(ValueError, match="temperature"):
        info_nce(rows, rows, (torch.arange(4), torch.arange(4)), temperature)


def test_half_of_a_temperature_per_domain_is_refused() -> None:
    rows, match = torch.randn(4, 2), (torch.arange(4), torch.arange(4))
    with pytest.raises(ValueError, match="both"):
        info_nce(rows, rows, match, 0.1, other_domain=0.2)
