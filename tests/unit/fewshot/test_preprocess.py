"""Preprocessing against timm's own transform, on shapes of real images."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from fmray.data.images import decode_image
from fmray.fewshot.encoders import IMAGENET_MEAN, IMAGENET_STD, Preprocess


def smooth_image(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("width, height", [(120, 80), (50, 90), (64, 64), (300, 40)])
@pytest.mark.parametrize("squash", [False, True])
def test_preprocessing_matches_the_transform_of_timm(width, height, squash):
    image = smooth_image(width, height)
    preprocess = Preprocess(32, shorter=36, squash=squash)
    theirs = create_transform(
        (3, 32, 32),
        is_training=False,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop_pct=1.0 if squash else 32 / 36,
        crop_mode="squash" if squash else "center",
    )
    ours = preprocess.normalise(preprocess.pixels([image]))[0]
    # one pass instead of resize, round and crop: the difference is a fraction of a source pixel
    assert (ours - theirs(image)).abs().mean() < 0.04
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32


def test_normalise_accepts_bytes_and_floats():
    preprocess = Preprocess(8, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    pixels = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)
    expected = torch.tensor([(0.2 - 0.5) / 0.1, (0.2 - 0.4) / 0.2, (0.2 - 0.3) / 0.3])
    torch.testing.assert_close(preprocess.normalise(pixels)[1, :, 3, 3], expected)
    torch.testing.assert_close(preprocess.normalise(pixels / 255), preprocess.normalise(pixels))


def test_resized_keeps_the_share_of_the_crop():
    assert Preprocess(224, shorter=256).resized(112) == Preprocess(112, shorter=128)


def test_real_images_are_resized(real_data):
    table = pq.read_table(real_data / "images" / "omniglot.parquet", columns=["image"])
    images = table["image"].to_pylist()[:20]
    pixels = Preprocess(32).pixels(decode_image(image).image for image in images)
    assert pixels.float().mean() > 128  # black ink on white
    assert len(pixels.flatten(1).unique(dim=0)) > 15
