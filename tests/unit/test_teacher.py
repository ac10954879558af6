"""The momentum teacher: nothing in it is drawn, and its norms go by the batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.levit import Attention
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from ssl_pipeline.models.batch_norm import batch_norms, norms_with_statistics
from ssl_pipeline.models.ema import EMAModel
from tests.tasks import tiny_task
from tests.unit.test_consistency import tiny as tiny_consistency


class FunctionalDropout(nn.Module):
    """What timm's DenseNets and others do: the mode alone decides."""

    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(images, 0.5, training=self.training)


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "swin": partial(
        SwinTransformer, [4, 4], 8, [1, 1], [2, 2], [4, 4], dropout=0.3, attention_dropout=0.3, stochastic_depth_prob=0.5,
        num_classes=6,
    ),
    "vit": partial(VisionTransformer, 32, 8, 2, 2, 16, 32, dropout=0.3, attention_dropout=0.3, num_classes=6),
    "timm's vit": partial(
        timm.create_model, "test_vit", img_size=32, drop_path_rate=0.5, proj_drop_rate=0.3, attn_drop_rate=0.3,
        patch_drop_rate=0.3, pos_drop_rate=0.3,
    ),
    "timm's efficientnet": partial(timm.create_model, "test_efficientnet", drop_path_rate=0.5, drop_rate=0.5),
    "functional": FunctionalDropout,
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
def test_a_teacher_says_the_same_of_the_same_images(name: str) -> None:
    torch.manual_seed(0)
    student = RANDOM[name]()
    with torch.no_grad():
        for parameter in student.parameters():  # torchvision's last layer starts at zero
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    teacher, images = EMAModel(student).train(), torch.randn(4, 3, 32, 32)
    assert not torch.equal(student.train()(images), student(images))
    assert torch.equal(teacher(images), teacher(images))


def test_a_teachers_norms_go_by_the_batch() -> None:
    torch.manual_seed(0)
    student = timm.create_model("test_efficientnet").train()
    teacher, images = EMAModel(student), torch.randn(8, 3, 32, 32) + 2
    torch.testing.assert_close(teacher(images), student(images))
    assert all(bool(norm.num_batches_tracked == 1) for norm in norms_with_statistics(teacher))
    teacher.eval()
    assert not torch.allclose(teacher(images), student(images), atol=0.1)


@pytest.mark.parametrize("name", ["byol", "dino", "moco_v2", "moco_v3", "consistency"])
def test_every_task_trains_with_a_teacher_whose_norms_alone_train(name: str) -> None:
    task = tiny_consistency() if name == "consistency" else tiny_task(name)[0]
    (teacher,) = (module for module in task.train().modules() if isinstance(module, EMAModel))
    training = {module for module in teacher.network.modules() if module.training}
    assert training == set(norms_with_statistics(teacher))
    assert training


def test_a_teacher_forgets_what_its_layers_made_of_older_parameters() -> None:
    """LeViT keeps its attention's biases while it is in evaluation mode."""
    torch.manual_seed(0)
    student = Attention(dim=16, key_dim=4, num_heads=2, resolution=2)
    for norm in batch_norms(student):  # the last one starts at zero
        nn.init.ones_(norm.weight)
    teacher, tokens = EMAModel(student), torch.randn(3, 4, 16)
    before = teacher(tokens)
    with torch.no_grad():
        student.attention_biases.add_(torch.randn_like(student.attention_biases))
    teacher.follow(student, 0.0)
    assert not torch.allclose(teacher(tokens), before)
    student.train(True)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(teacher(tokens), student(tokens))
