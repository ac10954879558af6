"""Which random views an image has, what may be done to each, and how strongly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from ssl_pipeline.config.base import ConfigError, FrozenModel

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class BoxConfig(FrozenModel):
    """Bounds of a random box.

    Attributes:
        scale: the smallest and the largest share of the image's area.
        ratio: the smallest and the largest width ÷ height.
    """

    scale: tuple[Share, Share]
    ratio: tuple[float, float]

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"write the smaller bound first, both above 0; got {list(value)}.")
        return value


class CropConfig(BoxConfig):
    """The random resized crop (Szegedy et al. 2015)."""

    scale: tuple[Share, Share] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


class JitterConfig(FrozenModel):
    """Color jitter in a random order (SimCLR, Chen et al. 2020, appendix A).

    Attributes:
        probability: how often it is applied.
        brightness: factors are drawn from [1 - b, 1 + b].
        contrast: factors are drawn from [1 - c, 1 + c].
        saturation: factors are drawn from [1 - s, 1 + s]; ``auto`` is brightness on RGB, nothing on other images.
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
        horizontal_flip: probability of a horizontal mirror.
        color_jitter: color jitter.
        grayscale: probability of dropping the colors; ``auto`` is 0.2 on RGB, 0 otherwise.
        gaussian_blur: Gaussian blur.
        solarize: probability of inverting the bright half of the values.
        rotation: rotation by any angle.
        erasing: erasing of a box.
        amplitude_mix: the style of another image; stage one's alone.
    """

    size: int = Field(32, ge=8)
    crop: CropConfig = CropConfig()
    horizontal_flip: Probability = 0.5
    color_jitter: JitterConfig = JitterConfig()
    grayscale: Probability | Literal["auto"] = "auto"
    gaussian_blur: BlurConfig = BlurConfig()
    solarize: Probability = 0.0
    rotation: RotationConfig = RotationConfig()
    erasing: ErasingConfig = ErasingConfig()
    amplitude_mix: RestyleConfig = RestyleConfig()

    def settled(self, channels: int, key: str) -> tuple[ViewConfig, list[str]]:
        """This policy without ``auto``, and the names of the color operations that the images' channels forbid.

        Raises:
            ConfigError: a color operation was asked for by name on images that have no colors.
        """
        jitter, rgb = self.color_jitter, channels == 3
        colors: dict[str, tuple[float | str, float]] = {  # what is given, and what `auto` is on RGB
            "color_jitter.saturation": (jitter.saturation, jitter.brightness),
            "color_jitter.hue": (jitter.hue, jitter.brightness / 4),
            "grayscale": (self.grayscale, 0.2),
        }
        refused = [name for name, (given, _) in colors.items() if not rgb and given not in ("auto", 0)]
        if refused:
            raise ConfigError(
                [
                    f"`{key}.{name}` needs RGB images, and these have {channels} channel(s): set it to 0 or auto."
                    for name in refused
                ]
            )
        dropped = [
            name.removeprefix("color_jitter.") for name, (given, _) in colors.items() if not rgb and given == "auto"
        ]
        saturation, hue, grayscale = (
            (auto if rgb else 0.0) if given == "auto" else given for given, auto in colors.values()
        )
        settled = jitter.model_copy(update={"saturation": saturation, "hue": hue})
        return self.model_copy(update={"color_jitter": settled, "grayscale": grayscale}), dropped


class ViewChanges(FrozenModel):
    """What a view does otherwise than the base policy; what is left out, also inside a group, is the base's.

    Attributes:
        crop: the random resized crop.
        horizontal_flip: probability of a horizontal mirror.
        color_jitter: color jitter.
        grayscale: probability of dropping the colors.
        gaussian_blur: Gaussian blur.
        solarize: probability of inverting the bright half of the values.
        rotation: rotation by any angle.
        erasing: erasing of a box.
        amplitude_mix: the style of another image.
    """

    crop: CropConfig | None = None
    horizontal_flip: Probability | None = None
    color_jitter: JitterConfig | None = None
    grayscale: Probability | Literal["auto"] | None = None
    gaussian_blur: BlurConfig | None = None
    solarize: Probability | None = None
    rotation: RotationConfig | None = None
    erasing: ErasingConfig | None = None
    amplitude_mix: RestyleConfig | None = None

    @model_serializer
    def _only_what_was_given(self) -> dict[str, Any]:
        """A dumped group must not grow the keys that were left out: read again, they would be changes."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value.model_dump(mode="json", exclude_unset=True) if isinstance(value, FrozenModel) else value
            for name, value in values.items()
        }

    def on(self, base: ViewConfig) -> ViewConfig:
        """The base policy with these changes."""
        update: dict[str, Any] = {}
        for name in ViewConfig.model_fields:
            change = getattr(self, name, None)
            if isinstance(change, FrozenModel):
                given = {key: getattr(change, key) for key in change.model_fields_set}
                update[name] = getattr(base, name).model_copy(update=given)
            elif change is not None:
                update[name] = change
        return base.model_copy(update=update)


class LocalConfig(ViewChanges):
    """Multi-crop's small views of small boxes, beside the global ones (Caron et al. 2020).

    Attributes:
        count: local views of an image.
        size: their height and width in pixels.
    """

    count: int = Field(0, ge=0)
    size: int = Field(96, ge=8)
    crop: CropConfig | None = CropConfig(scale=(0.05, 0.14))


class ViewsConfig(ViewConfig):
    """The views of an image: the keys of :class:`ViewConfig` are the first view's, and all others' unless changed.

    Attributes:
        num_views: global views.
        second_view: what the second and later global views do otherwise (BYOL, Grill et al. 2020); null changes nothing.
        local_views: multi-crop's local views, which follow the global ones.
    """

    num_views: int = Field(2, ge=1)
    second_view: ViewChanges | None = None
    local_views: LocalConfig = LocalConfig()

    @model_validator(mode="after")
    def _second_is_there(self) -> ViewsConfig:
        if self.second_view and self.num_views == 1:
            raise ValueError("`second_view` changes the second view, and `num_views` is 1: set second_view=null.")
        return self

    @property
    def total(self) -> int:
        """The number of all views."""
        return self.num_views + self.local_views.count

    def shapes(self, channels: int) -> list[tuple[int, int, int]]:
        """Channels, height and width of each view of an image."""
        sizes = [self.size] * self.num_views + [self.local_views.size] * self.local_views.count
        return [(channels, size, size) for size in sizes]

    def each(self) -> list[ViewConfig]:
        """The policy of every view: ``count`` global ones, then the local ones."""
        base = ViewConfig.model_construct(**{name: getattr(self, name) for name in ViewConfig.model_fields})
        later = self.second_view.on(base) if self.second_view else base
        return [base, *[later] * (self.num_views - 1), *[self.local_views.on(base)] * self.local_views.count]

    def for_channels(self, channels: int, key: str = "transform") -> tuple[ViewsConfig, list[str]]:
        """The policy without ``auto``, and notes for the log; ``key`` is where it stands in the configuration.

        Images that are not RGB keep their channels and lose the color operations.

        Raises:
            ConfigError: a color operation was asked for by name on images that have no colors.
        """
        views = self.each()
        base, dropped = views[0].settled(channels, key)
        update: dict[str, Any] = {name: getattr(base, name) for name in ViewConfig.model_fields}
        others: dict[str, tuple[ViewChanges | None, ViewConfig]] = {
            "second_view": (self.second_view if self.num_views > 1 else None, views[min(1, len(views) - 1)]),
            "local_views": (self.local_views if self.local_views.count else None, views[-1]),
        }
        for name, (changes, view) in others.items():
            if changes is not None:
                own, _ = view.settled(channels, f"{key}.{name}")
                colors = {"color_jitter": own.color_jitter, "grayscale": own.grayscale}
                update[name] = changes.model_copy(update=colors)
        notes = [f"{key}: {', '.join(dropped)} dropped, images with {channels} channel(s) have no colors"]
        return self.model_copy(update=update), notes if dropped else []
