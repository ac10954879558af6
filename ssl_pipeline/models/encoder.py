"""The encoder: backbone, then neck. It is what stage one hands to stage two."""

from __future__ import annotations

from torch import Tensor, nn

from ssl_pipeline.models.backbone import Backbone, BackboneConfig, build_backbone
from ssl_pipeline.models.neck import NeckConfig, build_neck
from ssl_pipeline.models.norms import batch_norms


class Encoder(nn.Module):
    """Images to features.

    Attributes:
        width: number of features.
        widths: channels of each level of the maps.
        strides: the image's pixels per pixel of each level.
        keeps_statistics: whether its BatchNorms keep their running statistics, and normalize by them in training mode too. It
            holds for whoever puts the encoder into training mode, as several modules may have it, and for its copies.
    """

    keeps_statistics: bool = False

    def __init__(self, backbone: Backbone, neck: NeckConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = build_neck(neck, backbone)
        self.width, self.widths, self.strides = self.neck.width, backbone.widths, backbone.strides
        # Some libraries normalize after pooling; what is not the pooled last level has another width, or had its norm.
        self._normalize = neck.name in ("gap", "gem")
        # What the library itself keeps fixed, such as a table of sines, stays so.
        self._never = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        self._never |= {f"backbone.{name}" for name in backbone.unused}
        self.learn()

    def learn(self, maps: bool = False) -> None:
        """Lets the parameters learn that have a part in the result, and no others: several processes would wait for their gradient.

        Args:
            maps: the result is ``feature_maps``, not ``features``.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self._never)
        self.backbone.final_norm.requires_grad_(self._normalize and not maps)
        self.neck.requires_grad_(not maps)

    def train(self, mode: bool = True) -> Encoder:
        """As torch's; BatchNorms whose statistics are kept stay in evaluation mode."""
        super().train(mode)
        if self.keeps_statistics:
            for norm in batch_norms(self):
                norm.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, width)."""
        features: Tensor = self.neck(self.backbone(images))
        if not self._normalize:
            return features
        return self.backbone.normalize(features)

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) to a map (B, widths[level], …) per level, for dense tasks."""
        maps: dict[str, Tensor] = self.backbone(images)
        return {level: maps[level] for level in self.widths}

    def forward(self, images: Tensor) -> Tensor:
        """The features."""
        return self.features(images)


def build_encoder(
    backbone: BackboneConfig, neck: NeckConfig, channels: int, image_size: int
) -> tuple[Encoder, list[str]]:
    """Builds an encoder; see :func:`ssl_pipeline.models.backbone.build_backbone`.

    Returns:
        The encoder, and notes for the log.
    """
    body, notes = build_backbone(backbone, channels, image_size)
    return Encoder(body, neck), notes
