"""The policy of one view: what may be done to it, and how strongly."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.transforms.geometry import BoxConfig, CropConfig, Share

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]


class JitterConfig(FrozenModel):
    """Color jitter in a random order (SimCLR, Chen et al. 2020, appendix A).

    Attributes:
        probability: how often it is applied.
        brightness: factors are drawn from [1 - b, 1 + b].
        contrast: likewise.
        saturation: likewise; ``auto`` is brightness on RGB, nothing on other images.
        hue: turns are drawn from [-h, h], at most 0.5; ``auto`` is a quarter of brightness on RGB, nothing otherwise.
    """

    probability: Probability = 0.8
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength | Literal["auto"] = "auto"
    hue: Annotated[float, Field(ge=0, le=0.5)] | Literal["auto"] = "auto"


class BlurConfig(FrozenModel):
    """Gaussian blur.

    Attributes:
        probability: how often it is applied.
        sigma: in pixels, drawn between the two bounds.
    """

    probability: Probability = 0.0
    sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.1, 2.0)


class RotationConfig(FrozenModel):
    """Rotation about the view's center, after the crop.

    Attributes:
        probability: how often it is applied.
        degrees: angles are drawn from [-d, d].
    """

    probability: Probability = 0.0
    degrees: float = Field(90.0, ge=0, le=180)


class RestyleConfig(FrozenModel):
    """The Fourier amplitude of another image of the data, with the image's own phase (Xu et al. 2021).

    Data of several domains then has views that lie between them. What is lent is the training data's own appearance, so that
    no rule of a domain is built in.

    Attributes:
        probability: how often it is applied, before all other operations on appearance.
        strength: how far the amplitude goes towards the other image's is drawn from [0, strength].
        styles: images that lend their amplitude; each takes 4 · channels · size² bytes.
    """

    probability: Probability = 0.0
    strength: Strength = 1.0
    styles: int = Field(1024, ge=1)


class ErasingConfig(BoxConfig):
    """Erasing of a random box (Zhong et al. 2020): it takes the encoder's mean color, which normalizes to 0.

    Attributes:
        probability: how often it is applied.
    """

    probability: Probability = 0.0
    scale: tuple[Share, Share] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)


class ViewConfig(FrozenModel):
    """The policy of one view.

    Attributes:
        size: height and width of the view in pixels.
        crop: the random resized crop.
        flip: probability of a horizontal mirror.
        jitter: color jitter.
        grayscale: probability of dropping the colors; ``auto`` is 0.2 on RGB, 0 otherwise.
        blur: Gaussian blur.
        solarize: probability of inverting the bright half of the values.
        rotation: rotation by any angle.
        erasing: erasing of a box.
        restyle: the style of another image; stage one's alone.
    """

    size: int = Field(32, ge=8)
    crop: CropConfig = CropConfig()
    flip: Probability = 0.5
    jitter: JitterConfig = JitterConfig()
    grayscale: Probability | Literal["auto"] = "auto"
    blur: BlurConfig = BlurConfig()
    solarize: Probability = 0.0
    rotation: RotationConfig = RotationConfig()
    erasing: ErasingConfig = ErasingConfig()
    restyle: RestyleConfig = RestyleConfig()

    def settled(self, channels: int, key: str) -> tuple[ViewConfig, list[str]]:
        """This policy without ``auto``, and the names of the color operations that the images' channels forbid.

        Raises:
            ConfigError: a color operation was asked for by name on images that have no colors.
        """
        jitter, rgb = self.jitter, channels == 3
        asked = {"jitter.saturation": jitter.saturation, "jitter.hue": jitter.hue, "grayscale": self.grayscale}
        refused = [name for name, value in asked.items() if not rgb and value not in ("auto", 0)]
        if refused:
            raise ConfigError(
                [
                    f"`{key}.{name}` needs RGB images, and these have {channels} channel(s): set it to 0 or auto."
                    for name in refused
                ]
            )
        defaults = {"jitter.saturation": jitter.brightness, "jitter.hue": jitter.brightness / 4, "grayscale": 0.2}
        value = {name: (defaults[name] if rgb else 0.0) if asked[name] == "auto" else asked[name] for name in asked}
        dropped = [name.removeprefix("jitter.") for name in asked if not rgb and asked[name] == "auto"]
        colors = {"saturation": value["jitter.saturation"], "hue": value["jitter.hue"]}
        settled = self.model_copy(update={"jitter": jitter.model_copy(update=colors), "grayscale": value["grayscale"]})
        return settled, dropped
