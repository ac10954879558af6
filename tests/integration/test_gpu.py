"""What only a CUDA device can show: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.finetune import finetune
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.runs import tiny_finetune, tiny_pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_draws_are_the_same_bits_as_on_the_cpu() -> None:
    index = torch.arange(10_000)
    for draw in ("crop area 0", "hue"):
        there = NamedRNG(index.cuda(), 1, "views", 2, 1).bits(draw).cpu()
        assert torch.equal(there, NamedRNG(index, 1, "views", 2, 1).bits(draw))


def test_views_are_the_same_pictures_as_on_the_cpu() -> None:
    pixels, index = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8), torch.arange(16)
    views = Views(ViewsConfig().for_channels(3)[0], (0.5,) * 3, (0.2,) * 3, seed=0)
    here = views.finish(views.of_pixels(pixels, index, 0), index, 0)
    there = views.finish(views.of_pixels(pixels.cuda(), index, 0), index, 0)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(other.cpu(), one, atol=2e-3, rtol=0)


def test_both_stages_run_and_a_stopped_run_continues(tmp_path: Path) -> None:
    run = pretrain(tiny_pretrain(tmp_path / "run", "steps=6", "save_every=3 steps", "evaluate_every=3 steps"))
    assert 0 <= finetune(tiny_finetune(run, tmp_path / "model", "regime.min_steps=5")).interval().mean <= 1
    (run / "checkpoints" / "step-000000006.pt").unlink()
    pretrain(tiny_pretrain(tmp_path / "run", "steps=6", "save_every=3 steps", "evaluate_every=3 steps", "resume=auto"))
    assert (run / "checkpoints" / "step-000000006.pt").is_file()


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_a_run_in_half_precision_stays_close_to_fp32(
    half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {}
    for precision in ("no", half):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        AcceleratorState._reset_state(reset_partial_state=True)
        run = pretrain(tiny_pretrain(tmp_path / precision, "steps=20"))
        losses[precision] = [line["pretrain/loss"] for line in read_metrics(run) if "pretrain/loss" in line]
        weights = load_file(run / "encoder.safetensors")
        assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[half][0] == pytest.approx(losses["no"][0], rel=0.01)
    assert losses[half][-1] == pytest.approx(losses["no"][-1], rel=0.1)


def test_too_little_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(self: SimCLR, batch: object) -> object:
        return torch.empty(1 << 50, device="cuda")

    monkeypatch.setattr(SimCLR, "embed", too_much)
    with pytest.raises(ConfigError, match=r"lower `batch_size`"):
        pretrain(tiny_pretrain(tmp_path / "run"))
