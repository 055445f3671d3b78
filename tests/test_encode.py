from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, flat_jpeg, jpeg, pixels, tiff_orientation, with_segment
from PIL import Image, ImageOps

from manyview.pipeline import codec
from manyview.pipeline.convert import encode
from manyview.pipeline.manifest import Options

JPEG, RAW = Options("folder"), Options("folder", encoding="raw")


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


def test_transparency_lies_on_white():
    rgba = np.dstack([pixels(6), np.zeros((90, 120), np.uint8)])
    rgba[:, 60:, 3] = 255
    _, image = convert(encoded(Image.fromarray(rgba), "PNG"))
    assert (image[:, :60] == 255).all() and np.array_equal(image[:, 60:], pixels(6)[:, 60:])


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
    damaged = 0
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
        damaged += bool(expected)
    assert 15 < damaged < 60


def test_a_thumbnail_is_the_image_at_an_eighth():
    converted = encode.convert(array(jpeg(18, 250, 300)), JPEG, "thumbnail")
    assert converted.pixels is None and converted.thumbnail.shape == (32, 38, 3)
    blocks = codec.decode(converted.payload)[:248, :296].reshape(31, 8, 37, 8, 3).mean((1, 3))
    assert np.abs(blocks - converted.thumbnail[:31, :37]).mean() < 1.5


def test_pixel_limit_holds_before_anything_is_decoded():
    for data in (jpeg(9), encoded(pixels(9), "PNG")):
        convert(data, max_pixels=90 * 120)
        with pytest.raises(ValueError, match="120x90 pixels is beyond the limit"):
            convert(data, max_pixels=90 * 120 - 1)
    huge = encoded(Image.new("1", (65_501, 1)), "PNG")
    with pytest.raises(ValueError, match="beyond the limit"):
        convert(huge)


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
    converted = encode.convert(array(data), JPEG, look="headers")
    assert (
        converted.pixels is None
        and converted.payload.tobytes() == data
        and (converted.height, converted.width) == (90, 120)
    )
    for other in (jpeg(16, progressive=True), encoded(pixels(16), "PNG"), jpeg(16, 60, 60)):
        assert encode.convert(array(other), JPEG, look="headers").pixels is not None
    for settings_ in (Options("folder", encoding="raw"), Options("folder", size=80)):
        assert encode.convert(array(data), settings_, look="headers").pixels is not None
    for cut in (1, 2, 500):
        with pytest.raises(ValueError, match="nd of JPEG file"):
            encode.convert(array(data[:-cut]), JPEG, look="headers")
    with pytest.raises(ValueError, match="beyond the limit"):
        encode.convert(array(data), Options("folder", max_pixels=100), look="headers")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_damage_is_a_value_error_or_a_picture(data):
    original = bytearray(data.draw(st.sampled_from([jpeg(15), encoded(pixels(15), "PNG"), encoded(pixels(15), "GIF")])))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(original))))
    try:
        converted = encode.convert(array(bytes(original[:cut])), Options("folder", max_pixels=1_000_000))
    except ValueError:
        return
    assert codec.decode(converted.payload).shape[:2] == (converted.height, converted.width)


# --- metadata -------------------------------------------------------------------------------------------------------

WRONG_TYPES = (  # beside a good orientation: what made Pillow's own transposition raise, or the picture be refused
    (0x10F, 2, 4, b"\xff\xfe\x80\0"), (0x11A, 2, 4, b"abc\0"), (0x11B, 5, 1, b"\xff\xff\xff\x7f"),
)  # fmt: skip
STORED = {  # pixels as they are stored, of an upright image, by EXIF's definition of the 0th row and column
    1: lambda image: image, 2: lambda image: image[:, ::-1], 3: lambda image: image[::-1, ::-1], 4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2), 6: lambda image: image[:, ::-1].transpose(1, 0, 2)[:, :],
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2), 8: lambda image: image[::-1].transpose(1, 0, 2)[:, :],
}  # fmt: skip


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with(data: bytes, *chunks: bytes) -> bytes:
    """Behind the header, IHDR."""
    return data[:33] + b"".join(chunks) + data[33:]


def raw_profile(exif: bytes) -> bytes:
    return b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n%8d\n" % (len(exif) + 6) + (b"Exif\0\0" + exif).hex().encode()
    )


def tiff_with(stored: np.ndarray, value: int, **options) -> bytes:
    data = bytearray(encoded(stored, "TIFF", tiffinfo={0x112: value, 0x10F: "maker"}, **options))
    data[data.index(struct.pack("<HH", 0x10F, 2)) + 2] = 5  # the maker is a fraction
    return bytes(data)


ORIENTED = {
    "jpeg": lambda stored, exif, _: with_segment(encoded(stored, quality=95), b"Exif\0\0" + exif),
    "progressive": lambda stored, exif, _: with_segment(
        encoded(stored, quality=95, progressive=True), b"Exif\0\0" + exif
    ),
    "png": lambda stored, exif, _: png_with(encoded(stored, "PNG"), chunk(b"eXIf", exif)),
    "png of imagemagick": lambda stored, exif, _: png_with(encoded(stored, "PNG"), chunk(b"zTXt", raw_profile(exif))),
    "webp": lambda stored, exif, _: encoded(stored, "WEBP", lossless=True, exif=exif),
    "tiff": lambda stored, _, value: tiff_with(stored, value),
    "packed tiff": lambda stored, _, value: tiff_with(stored, value, compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", ORIENTED)
def test_every_format_is_turned_upright_whatever_else_its_metadata_say(kind):
    truth = pixels(7)
    for value in range(1, 9):
        stored = np.ascontiguousarray(STORED[value](truth))
        data = ORIENTED[kind](stored, tiff_orientation(value, ">", 4, before=WRONG_TYPES), value)
        payload, image = convert(data)
        assert close(image, truth, 2 if "jpeg" in kind or kind == "progressive" else 0), value
        assert codec.jpeg_header(payload).plain
        assert (payload.tobytes() == data) == (kind == "jpeg" and value == 1)


def test_stored_rows_are_what_the_standard_says():
    """Against Pillow, whose own transposition reads clean EXIF well."""
    for value, stored in STORED.items():
        exif = Image.Exif()
        exif[0x112] = value
        data = encoded(np.ascontiguousarray(stored(pixels(7))), "PNG", exif=exif)
        assert np.array_equal(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), pixels(7)), value


BIG = zlib.compress(bytes(3 << 20))
METADATA = {
    "a large profile": chunk(b"iCCP", b"icc\0\0" + BIG),
    "a large text": chunk(b"zTXt", b"Comment\0\0" + BIG),
    "a large international text": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BIG),
    "a text with a wrong checksum": chunk(b"tEXt", b"Comment\0hello")[:-1] + b"\0",
    "a profile that is none": chunk(b"iCCP", b"icc\0\0garbage"),
    "times that are none": chunk(b"tIME", b"\xff") + chunk(b"pHYs", b"") + chunk(b"gAMA", b"\0\0\0\0"),
    "exif that is none": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("name", METADATA)
def test_no_metadata_reject_a_png(name):
    assert np.array_equal(convert(png_with(encoded(pixels(8), "PNG"), METADATA[name]))[1], pixels(8))


def test_postscript_in_a_jpeg_runs_nothing(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: 1 / 0)
    for data in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\nshowpage\n",
        b"\xc5\xd0\xd3\xc6" + bytes(60),
    ):
        with pytest.raises(ValueError, match="not an image"):
            convert(data)


# --- more than 8 bits -----------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 96)[None].repeat(80, 0)


def deep(data: bytes, **options) -> tuple[int, int, str]:
    """Levels left, the brightest, and the note."""
    result = encode.convert(array(data), Options("folder", encoding="raw", **options))
    return len(np.unique(result.payload)), int(result.payload.max()), result.note


def grey(values: np.ndarray, format: str = "PNG") -> bytes:
    return encoded(Image.fromarray(values), format)


def color_png(values: np.ndarray) -> bytes:
    return cv2.imencode(".png", values)[1].tobytes()


DEEP = {
    "png": grey,
    "tiff": lambda values: grey(values, "TIFF"),
    "color png": color_png,
    "color tiff": lambda values: cv2.imencode(".tiff", values)[1].tobytes(),
}


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
@pytest.mark.parametrize("kind", DEEP)
def test_bits_that_16_hold_are_scaled_by_a_flag_and_told_of_without(bits, kind):
    values = np.rint(RAMP * ((1 << bits) - 1)).astype(np.uint16)
    if "color" in kind:
        values = values[..., None].repeat(3, 2)
    data = DEEP[kind](values)
    assert deep(data, white=(1 << bits) - 1) == (96, 255, "")
    levels, brightest, note = deep(data)
    assert brightest == ((1 << bits) - 1) >> 8 and levels < 96
    assert "16 bits" in note and f"use {bits}" in note and f"--white {(1 << bits) - 1}" in note


def test_full_16_bits_keep_their_upper_eight_and_say_so():
    values = pixels(5)[..., 0].astype(np.uint16) * 256 + 17
    for data in (grey(values), color_png(values[..., None].repeat(3, 2))):
        result = encode.convert(array(data), RAW)
        assert np.array_equal(result.payload, np.repeat(pixels(5)[..., :1], 3, 2))
        assert result.note == "16 bits: the upper 8 were kept"
    clear = np.dstack([values] * 3 + [np.linspace(0, 65_535, 120).astype(np.uint16)[None].repeat(90, 0)])
    expected = np.rint(255 - (255 - (clear[..., :3] >> 8)) * (clear[..., 3:] / 65_535))
    assert close(encode.convert(array(color_png(clear)), RAW).payload, expected, 0.5)


def test_32_bits_are_what_their_values_say():
    values = pixels(6)[..., 0].astype(np.int32)
    levels = len(np.unique(values))
    assert deep(grey(values, "TIFF")) == (levels, values.max(), "values of 32 bits up to 255 were taken for 8 bits")
    assert deep(grey(values * 256, "TIFF"))[:2] == (levels, values.max())
    assert deep(grey(values * 1_000_000, "TIFF"), white=255_000_000)[:2] == (levels, values.max())
    assert deep(grey((values / 255).astype(np.float32), "TIFF"), white=1)[:2] == (levels, values.max())
    for wrong in (values * 1_000_000, values - 300, (values / 255).astype(np.float32)):
        with pytest.raises(ValueError, match="--white VALUE"):
            deep(grey(wrong, "TIFF"))
    assert deep(grey(values * 256, "TIFF"), white=1000)[2] == "values above white (1000) were cut to it"


def test_bands_beyond_rgb_are_told_of():
    five = np.dstack([pixels(9), pixels(10)[..., :2]])
    data = tifffile_like(five)
    result = encode.convert(array(data), RAW)
    assert np.array_equal(result.payload, pixels(9)) and "bands beyond" in result.note
    assert encode.convert(array(encoded(pixels(9), "TIFF")), RAW).note == ""


def tifffile_like(image: np.ndarray) -> bytes:
    """A plain TIFF of any number of bands, which Pillow does not write."""
    height, width, bands = image.shape
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 300),
        (277, 3, 1, bands), (278, 4, 1, height), (279, 4, 1, image.size), (338, 3, bands - 3, 0),
    ]  # fmt: skip
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    return head.ljust(200, b"\0") + struct.pack(f"<{bands}H", *[8] * bands).ljust(100, b"\0") + image.tobytes()


# --- JPEGs of all kinds -----------------------------------------------------------------------------------------------


def holed(data: bytes, size: int, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(data.index(b"\xff\xda") + 20, len(data) - size - 2))
    return data[:at] + bytes(size) + data[at + size :]


KINDS = {
    "baseline": lambda i: jpeg(i, 250, 300),
    "progressive": lambda i: jpeg(i, 250, 300, progressive=True),
    "turned": lambda i: with_segment(jpeg(i, 250, 300), b"Exif\0\0" + tiff_orientation(6)),
    "cmyk": lambda i: encoded(Image.fromarray(pixels(i, 250, 300)).convert("CMYK"), quality=88),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_is_found_in_every_kind_of_jpeg(kind):
    rng = np.random.default_rng(0)
    verdicts = [verdict(holed(KINDS[kind](i), 700, rng), "thumbnail") for i in range(25)]
    assert sum(map(bool, verdicts)) >= 24, verdicts
    assert verdict(KINDS[kind](0), "thumbnail") == ""


@pytest.mark.parametrize("sampling", [(0x42, 0x11, 0x11), (0x11, 0x21, 0x21), (0x22, 0x21, 0x11)], ids=str)
def test_samplings_that_the_fast_decoder_does_not_know_are_encoded_anew(sampling):
    data = flat_jpeg(sampling)
    for look in ("pixels", "thumbnail", "headers"):
        result = encode.convert(array(data), JPEG, look)
        assert result.payload.tobytes() != data and np.abs(codec.decode(result.payload).astype(int) - 128).max() <= 1


def test_headers_that_say_another_size_than_the_decoder_are_refused(monkeypatch):
    wrong = codec.Jpeg(90, 128, True)
    monkeypatch.setattr(codec, "jpeg_header", lambda data: wrong)
    for look in ("pixels", "thumbnail", "headers"):
        assert verdict(jpeg(20), look) == "its headers say 128x90 pixels, its decoder 120x90"


def test_arrays_have_the_limits_of_images():
    for shape, limit in (((70_000, 10, 3), 10**9), ((100, 100), 9999)):
        with pytest.raises(ValueError, match="beyond the limit"):
            encode.convert(np.zeros(shape, np.uint8), Options("folder", max_pixels=limit))


@pytest.mark.slow
def test_a_small_file_of_many_pixels_takes_no_more_than_is_said(tmp_path):
    """50 megapixels in a few kilobytes; the README promises 12 bytes a pixel."""
    (tmp_path / "large.png").write_bytes(encoded(Image.new("RGBA", (10_000, 5_000)), "PNG"))
    program = (
        "import sys, numpy as np, psutil\n"
        "from manyview.pipeline.convert import encode\nfrom manyview.pipeline.manifest import Options\nimport PIL.Image\n"
        "before = psutil.Process().memory_info().rss\n"
        "encode.convert(np.fromfile(sys.argv[1], np.uint8), Options('folder'))\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(peak.split()[1]) * 1024 - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "large.png"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 12 * 50_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_headers_that_are_not_what_they_seem_are_refused_or_read_as_the_decoder_reads_them(kind):
    """Bytes of the headers changed, doubled, left out: whoever trusts them gets the size that will be decoded."""
    original, rng, accepted = KINDS[kind](1), np.random.default_rng(3), 0
    scan = original.index(b"\xff\xda")
    for _ in range(300):
        data = bytearray(original)
        for _ in range(int(rng.integers(1, 4))):
            at, length = int(rng.integers(2, scan)), int(rng.integers(1, 40))
            change = int(rng.integers(4))
            if change == 0:
                data[at] = int(rng.choice([0, 1, 0xC0, 0xC2, 0xD8, 0xDA, 0xE1, 0xFF, rng.integers(256)]))
            elif change == 1:
                data[at:at] = data[at : at + length]
            elif change == 2:
                del data[at : at + length]
            else:
                data[at:at] = b"\xff" + bytes([int(rng.choice([0x01, 0xC0, 0xD0, 0xE1, 0xFE, 0xFF]))])
        try:
            result = encode.convert(array(bytes(data)), Options("folder", max_pixels=10**7), "headers")
            assert codec.decode(result.payload).shape == (result.height, result.width, 3)
            accepted += 1
        except ValueError:
            pass
    assert 5 < accepted < 290
