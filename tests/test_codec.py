from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, jpeg, pixels
from PIL import Image

from manyview.pipeline import codec
from manyview.pipeline.convert import encode
from manyview.pipeline.manifest import Options

JPEG = Options("folder")


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def convert(data: bytes, **options):
    return encode.convert(array(data), Options("folder", **options))[:2]


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b).mean()) <= tolerance


def test_baseline_jpegs_keep_their_bytes_and_decode_like_pillow():
    data = jpeg(1)
    payload, image = convert(data)
    assert payload.tobytes() == data
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(codec.decode(payload), image)
    assert np.abs(image.astype(int) - expected).max() <= 2  # Pillow's libjpeg may round otherwise


def test_grey_jpegs_pass_through_and_decode_to_three_equal_channels():
    data = encoded(Image.fromarray(pixels(2)).convert("L"))
    payload, image = convert(data)
    assert payload.tobytes() == data and image.shape == (90, 120, 3)
    assert np.array_equal(image[..., 0], image[..., 2])


def sixteen_bit() -> bytes:
    return encoded(Image.fromarray(pixels(3)[..., 0].astype(np.uint16) * 256))


CONVERTIBLE = {
    "progressive": (jpeg(3, progressive=True), 3),
    "png": (encoded(pixels(3), "PNG"), 3),
    "webp": (encoded(pixels(3), "WEBP", lossless=True), 3),
    "bmp": (encoded(pixels(3), "BMP"), 3),
    "tiff": (encoded(pixels(3), "TIFF"), 3),
    "cmyk": (encoded(Image.fromarray(pixels(3)).convert("CMYK"), quality=95), 6),
    "palette": (encoded(Image.fromarray(pixels(3)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), 12),
    "gif": (
        encoded(
            Image.fromarray(pixels(3)), "GIF", save_all=True, append_images=[Image.fromarray(pixels(4))], duration=50
        ),
        12,
    ),
}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_convertible_images_are_encoded_once_to_the_same_picture(name):
    data, tolerance = CONVERTIBLE[name]
    payload, image = convert(data)
    assert payload.ndim == 1 and payload.tobytes() != data
    header = codec.jpeg_header(payload)
    assert header == codec.Jpeg(90, 120, True)
    assert close(image, pixels(3), tolerance)
    assert close(codec.decode(payload), pixels(3), tolerance + 4)


def test_sixteen_bits_keep_their_upper_eight():
    values = pixels(5)[..., 0]
    _, image = convert(encoded(Image.fromarray(values.astype(np.uint16) * 256 + 17), "PNG"))
    assert np.array_equal(image, np.repeat(values[..., None], 3, 2))


def test_transparency_lies_on_white():
    rgba = np.dstack([pixels(6), np.zeros((90, 120), np.uint8)])
    rgba[:, 60:, 3] = 255
    _, image = convert(encoded(Image.fromarray(rgba), "PNG"))
    assert (image[:, :60] == 255).all() and np.array_equal(image[:, 60:], pixels(6)[:, 60:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_for_good(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(pixels(7), quality=92, exif=exif)
    payload, image = convert(data)
    upright = np.asarray(Image.open(io.BytesIO(data)) if orientation == 1 else _transposed(data))
    assert close(image, upright, 2)
    assert codec.jpeg_header(payload).plain
    assert (payload.tobytes() == data) == (orientation == 1)


def _transposed(data: bytes) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def damaged_header() -> bytes:
    data = bytearray(jpeg(8))
    at = data.index(b"\xff\xc4") + 5  # the code lengths of the first Huffman table
    data[at : at + 12] = bytes(255 - value for value in data[at : at + 12])
    return bytes(data)


REJECTED = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not an image"),
    "truncated jpeg": (jpeg(8)[:1500], "nd of JPEG file"),
    "jpeg without its end": (jpeg(8)[:-2], "nd of JPEG file"),
    "truncated png": (encoded(pixels(8), "PNG")[:3000], ""),
    "truncated webp": (encoded(pixels(8), "WEBP")[:700], ""),
    "headers only": (jpeg(8)[:40], ""),
    "damaged header": (damaged_header(), ""),
    "zeros": (bytes(1000), "not an image"),
    "text named jpeg magic": (b"\xff\xd8\xff" + b"hello " * 50, ""),
    "float tiff": (encoded(Image.fromarray(np.ones((70, 70), np.float32)), "TIFF"), "floating"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_cannot_be_used_is_a_value_error_that_says_why(name):
    data, reason = REJECTED[name]
    for look in ("pixels", "thumbnail"):
        with pytest.raises(ValueError, match=reason or None):
            encode.convert(array(data), JPEG, look)


def verdict(data: bytes, look: str) -> str:
    try:
        encode.convert(array(data), JPEG, look)
        return ""
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 5}, {"optimize": True}], ids=str)
def test_a_thumbnail_finds_exactly_the_damage_that_all_pixels_find(subsampling, options):
    original = jpeg(17, 250, 300, subsampling=subsampling, **options)
    rng = np.random.default_rng(subsampling)
    found = 0
    for number in range(60):
        data = bytearray(original)
        at, scan = int(rng.integers(len(data))), original.index(b"\xff\xda")
        if number % 4 == 0:  # in the headers: tables, sizes
            data[at % scan] = int(rng.integers(256))
        elif number % 4 == 1:  # a few bits of the scan
            for place in rng.integers(scan, len(data), 3):
                data[place] ^= 1 << int(rng.integers(8))
        elif number % 4 == 2:  # a stretch of zeros, as a lost sector leaves
            data[at : at + 300] = bytes(len(data[at : at + 300]))
        else:  # cut off and closed again, as some downloaders do
            data[at:] = b"\xff\xd9"
        expected = verdict(bytes(data), "pixels")
        assert verdict(bytes(data), "thumbnail") == expected
        found += bool(expected)
    assert 15 < found < 60


def test_a_thumbnail_is_the_image_at_an_eighth():
    found = encode.convert(array(jpeg(18, 250, 300)), JPEG, "thumbnail")
    assert found.pixels is None and found.thumbnail.shape == (32, 38, 3)
    blocks = codec.decode(found.payload)[:248, :296].reshape(31, 8, 37, 8, 3).mean((1, 3))
    assert np.abs(blocks - found.thumbnail[:31, :37]).mean() < 1.5


def test_unusual_chroma_samplings_are_looked_at():
    data = bytearray(jpeg(19, 96, 96, subsampling=0))
    at = data.index(b"\xff\xc0") + 11
    assert codec.jpeg_header(array(bytes(data))).usual
    data[at], data[at + 3], data[at + 6] = 0x22, 0x21, 0x12  # no encoder at hand writes these
    assert not codec.jpeg_header(array(bytes(data))).usual
    for look in ("thumbnail", "headers"):
        assert verdict(bytes(data), look) == verdict(bytes(data), "pixels")


def test_pixel_limit_holds_before_anything_is_decoded():
    for data in (jpeg(9), encoded(pixels(9), "PNG")):
        convert(data, max_pixels=90 * 120)
        with pytest.raises(ValueError, match="120x90 pixels is beyond the limit"):
            convert(data, max_pixels=90 * 120 - 1)
    huge = encoded(Image.new("1", (65_501, 1)), "PNG")
    with pytest.raises(ValueError, match="beyond the limit"):
        convert(huge)


def test_bytes_before_the_end_marker_are_harmless_and_kept():
    data = jpeg(10)
    loose = data[:-2] + b"abcdef" + data[-2:]
    payload, image = convert(loose)
    assert payload.tobytes() == loose and np.array_equal(image, codec.decode(array(data)))


def test_tiny_images_are_stored_raw_in_every_encoding():
    for encoding in codec.ENCODINGS:
        payload, image = convert(jpeg(11, 64, 64), encoding=encoding)
        assert payload.shape == (64, 64, 3) and np.array_equal(payload, image)
        assert convert(jpeg(11, 65, 64), encoding=encoding)[0].shape != (65, 64, 3) or encoding == "raw"
    payload, *_ = encode.convert(np.full((8, 8), 7, np.uint8), JPEG)
    assert payload.shape == (8, 8, 3) and (payload == 7).all()
    assert convert(encoded(Image.new("RGB", (1, 1), "red"), "PNG"))[0].tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize("height,width", [(90, 120), (91, 120), (90, 121), (91, 121), (1, 100)])
def test_yuv420_has_even_sides_and_nearly_the_same_pixels(height, width):
    image = pixels(12, height, width)
    payload, _, *shape, _, _ = encode.convert(image, Options("folder", encoding="yuv420"))
    even = (height + height % 2, width + width % 2)
    assert tuple(shape) == even and payload.shape == (even[0] * 3 // 2, even[1])
    back = codec.decode(codec.view(payload.reshape(-1), codec.YUV420, *even))
    assert close(back[:height, :width], image, 7)  # these colors change faster than any photo's


def test_size_shrinks_the_short_side_and_never_enlarges():
    payload, image = convert(jpeg(13, 90, 130), size=70)
    assert image.shape == (70, 101, 3) and codec.decode(payload).shape == (70, 101, 3)
    data = jpeg(13, 90, 130)
    assert convert(data, size=90)[0].tobytes() == data
    checks = np.indices((200, 200)).sum(0) % 2 * 255  # the finest pattern there is: antialiased it is plain grey
    _, image, *_ = encode.convert(np.repeat(checks[..., None], 3, 2).astype(np.uint8), Options("folder", size=100))
    assert np.abs(image.astype(int) - 127).max() <= 1


def test_without_a_look_only_whole_baseline_jpegs_pass():
    data = jpeg(16)
    found = encode.convert(array(data), JPEG, look="headers")
    assert found.pixels is None and found.payload.tobytes() == data and (found.height, found.width) == (90, 120)
    for other in (jpeg(16, progressive=True), encoded(pixels(16), "PNG"), jpeg(16, 60, 60)):
        assert encode.convert(array(other), JPEG, look="headers").pixels is not None
    for settings_ in (Options("folder", encoding="raw"), Options("folder", size=80)):
        assert encode.convert(array(data), settings_, look="headers").pixels is not None
    for cut in (1, 2, 500):
        with pytest.raises(ValueError, match="nd of JPEG file"):
            encode.convert(array(data[:-cut]), JPEG, look="headers")
    with pytest.raises(ValueError, match="beyond the limit"):
        encode.convert(array(data), Options("folder", max_pixels=100), look="headers")


def test_decode_refuses_what_is_no_payload():
    for payload in (np.zeros((4, 4, 4), np.uint8), np.zeros(9, np.float32), np.zeros((4, 3), np.uint8)):
        with pytest.raises(ValueError):
            codec.decode(payload)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_damage_is_a_value_error_or_a_picture(data):
    original = bytearray(data.draw(st.sampled_from([jpeg(15), encoded(pixels(15), "PNG"), encoded(pixels(15), "GIF")])))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(original))))
    try:
        found = encode.convert(array(bytes(original[:cut])), Options("folder", max_pixels=1_000_000))
    except ValueError:
        return
    assert codec.decode(found.payload).shape[:2] == (found.height, found.width)
