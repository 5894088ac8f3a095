"""Encoded images to pixels: one preprocessing for support, query and every job.

In: JPEG or PNG bytes. Out: uint8 [n, 3, size, size], and float32 normalised as the encoder was
trained. Decoding and normalising are apart, so that pixels can be kept as bytes, augmented, and
moved to a device at a quarter of the size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How one encoder sees an image.

    size: pixels, of the square that comes out. mean, std: per RGB channel, of values in 0..1.
    shorter: pixels the shorter side is resized to before the centre crop; default `size`. squash:
    resize to the square without a crop, whatever the aspect.
    """

    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    shorter: int | None = None
    squash: bool = False
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def decode(self, images: Sequence[bytes]) -> Tensor:
        """uint8 [n, 3, size, size] of n encoded images, any mode and aspect, greyscale included.

        Raises ValueError naming the image's place for bytes that are no readable image.
        """
        pixels = np.empty((len(images), self.size, self.size, 3), dtype=np.uint8)
        for place, encoded in enumerate(images):
            try:
                with Image.open(io.BytesIO(encoded)) as image:
                    pixels[place] = self._square(image.convert("RGB"))
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                raise ValueError(f"image {place} of {len(images)} is not readable: {error}") from (
                    error
                )
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 of the same shape [..., 3, H, W]: (value - mean) / std.

        pixels: uint8, or floats in 0..1 (augmented views).
        """
        if not pixels.is_floating_point():
            pixels = pixels.float() / 255
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (pixels - mean) / std

    def resized(self, size: int) -> Preprocess:
        """The same for squares of another size, the crop's share of the image kept."""
        shorter = None if self.shorter is None else round(self.shorter * size / self.size)
        return Preprocess(size, self.mean, self.std, shorter, self.squash, self.interpolation)

    def _square(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        box = (0.0, 0.0, float(width), float(height))
        if not self.squash:
            # the crop's box in the source: cropped and resized in one pass
            side = min(width, height) * self.size / max(self.shorter or 0, self.size)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
        resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        return image.resize((self.size, self.size), resample[self.interpolation], box=box)
