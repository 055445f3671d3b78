from __future__ import annotations

import numpy as np
from pictures import jpeg, pixels

from manyview.pipeline import codec
from manyview.pipeline.convert import encode, moments


def exact(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    values = np.concatenate([image.reshape(-1, 3) for image in images]).astype(float)
    return values.mean(0), (values**2).mean(0)


def test_sums_are_exact():
    image = pixels(14)
    total, squares = moments.sums(image)
    assert np.array_equal(total, image.sum((0, 1))) and np.array_equal(squares, (image.astype(int) ** 2).sum((0, 1)))


def test_images_looked_at_completely_are_averaged_exactly():
    images = [pixels(i, 20 + i, 30) for i in range(5)]
    mean, square = moments.average(sum((moments.of_pixels(image) for image in images), moments.nothing()))
    assert np.allclose([mean, square], exact(images))


def test_thumbnails_have_the_mean_and_lose_no_variance():
    """Half of the images are noise, of which a thumbnail keeps hardly anything; every fourth is measured."""
    rng = np.random.default_rng(0)
    images, total = [], moments.nothing()
    for i in range(40):
        data = np.frombuffer(jpeg(i, 200, 300), np.uint8)
        if i % 2:
            data = encode.encode(rng.integers(60, 200, (200, 300, 3), np.uint8))
        images.append(codec.decode(data))
        total += moments.of_thumbnail(codec.thumbnail(data), 200 * 300, images[-1] if i % 8 < 2 else None)
    mean, square = moments.average(total)
    assert np.abs(mean - exact(images)[0]).max() < 0.5
    std, expected = (np.sqrt(second - first**2) for first, second in ((mean, square), exact(images)))
    assert np.abs(std / expected - 1).max() < 0.03
    alone = sum((moments.of_thumbnail(image[::8, ::8].copy() * 0 + 9, 60_000) for image in images), moments.nothing())
    assert np.allclose(moments.average(alone), [[9] * 3, [81] * 3])  # none measured: nothing is made up


def test_different_kinds_of_image_weigh_by_their_pixels():
    small, large = np.full((10, 10, 3), 10, np.uint8), np.full((20, 20, 3), 60, np.uint8)
    total = moments.of_pixels(small) + moments.of_thumbnail(np.full((3, 3, 3), 60, np.uint8), 400, large)
    assert np.allclose(moments.average(total), exact([small, large]))
    assert np.array_equal(moments.average(moments.nothing()), np.zeros((2, 3)))
