from __future__ import annotations

import struct

import numpy as np
import pytest
from pictures import encoded, flat_jpeg, jpeg, pixels, tiff_orientation, with_segment

from manyview.pipeline import codec


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("type", [1, 3, 4, 6, 8, 9])  # BYTE, SHORT, LONG and their signed brothers
def test_orientation_is_read_in_every_whole_number_type_and_order(order, type):
    for value in range(1, 9):
        assert codec.orientation(tiff_orientation(value, order, type)) == value
        assert codec.orientation(tiff_orientation(value, order, type, before=((0x11A, 2, 4, b"abc\0"),))) == value
    assert (
        codec.orientation(tiff_orientation(0, order, type)) == codec.orientation(tiff_orientation(9, order, type)) == 1
    )


@pytest.mark.parametrize(
    "tiff", [b"", b"garbage", b"II*\0", b"II*\0\xff\xff\xff\xff", tiff_orientation(6)[:15]], ids=repr
)
def test_a_broken_block_is_upright(tiff):
    assert codec.orientation(tiff) == 1
    assert (
        codec.orientation(tiff_orientation(6, type=2)) == codec.orientation(tiff_orientation(6, type=5)) == 1
    )  # no number


SIX = b"Exif\0\0" + tiff_orientation(6, ">", 4)
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>caf\xa8</x:xmpmeta>"


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_header_finds_orientation_wherever_exif_stands(options):
    data = jpeg(1, **options)
    at = data.index(b"\xff\xda")
    places = {
        "first": with_segment(data, SIX),
        "behind XMP": with_segment(with_segment(data, SIX), XMP),
        "said twice": with_segment(data, b"Exif\0\0" + SIX),
        "in two parts": with_segment(with_segment(data, b"Exif\0\0" + SIX[20:]), SIX[:20]),
        "behind the frame": data[:at] + with_segment(b"\xff\xd8" + data[at:], SIX)[2:],
        "behind fill bytes": b"\xff\xd8\xff\xff" + with_segment(data, SIX)[2:],
        "behind a megabyte": with_segment(data, SIX)[:2] + b"".join(
            b"\xff\xe2\xff\xff" + bytes(65_533) for _ in range(20)
        ) + with_segment(data, SIX)[2:],
    }  # fmt: skip
    for place, turned in places.items():
        header = codec.jpeg_header(array(turned))
        assert header and header.orientation == 6 and not header.plain, place
        assert (header.height, header.width) == (90, 120)
    header = codec.jpeg_header(array(with_segment(data, XMP)))
    assert header.orientation == 1 and header.plain == (not options)


def test_a_marker_without_length_hides_no_other_frame():
    """Behind TEM (FF 01) a reader that takes the next two bytes for a length lands in what looks like a frame of its own."""
    data = jpeg(2)
    false_frame = b"\xff\xc0\x00\x11" + struct.pack(">BHHB", 8, 9000, 9000, 3) + bytes(9)
    # The next segment's marker, FF E5, as a length: it ends in that segment itself.
    hidden = with_segment(data, bytes(0xFFE5 - 4) + false_frame, marker=0xE5)
    header = codec.jpeg_header(array(b"\xff\xd8\xff\x01" + hidden[2:]))
    assert (header.height, header.width) == (90, 120)
    assert codec.decode(array(b"\xff\xd8\xff\x01" + hidden[2:])).shape == (90, 120, 3)


@pytest.mark.parametrize("cut", [2, 3, 20, 100, 165])
def test_headers_that_end_before_a_frame_are_none(cut):
    assert codec.jpeg_header(array(jpeg(3)[:cut])) is None


SAMPLINGS = {
    "4:4:4": (0x11, 0x11, 0x11), "4:2:0": (0x22, 0x11, 0x11), "4:1:1": (0x41, 0x11, 0x11), "4:4:4 of 2x1": (0x21, 0x21, 0x21),
    "4:1:0": (0x42, 0x11, 0x11), "chroma finer": (0x11, 0x21, 0x21), "mixed": (0x22, 0x21, 0x11), "grey of 2x2": (0x22,),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLINGS)
def test_unknown_samplings_are_told_from_damage(name):
    data = array(flat_jpeg(SAMPLINGS[name]))
    header = codec.jpeg_header(data)
    try:
        assert codec.decode(data).shape == (header.height, header.width, 3)
        known = True
    except codec.UnknownSampling:
        known = False
    assert known == (name not in ("4:1:0", "chroma finer", "mixed"))
    assert known or not header.usual


def test_a_few_stray_bytes_before_the_end_are_harmless_more_are_damage():
    for data in (jpeg(10), jpeg(10, progressive=True)):
        few = data[:-2] + b"a" * 16 + data[-2:]
        assert np.array_equal(codec.decode(array(few)), codec.decode(array(data)))
        for look in (codec.decode, codec.thumbnail):
            with pytest.raises(ValueError, match="extraneous bytes"):  # a few more are read ahead and not counted
                look(array(data[:-2] + b"a" * 64 + data[-2:]))


def test_decode_refuses_what_is_no_payload():
    for shape, kind in (((4, 4, 3), np.int16), (9, np.float32), ((4, 3), np.uint8), ((4, 4, 3, 1), np.uint8)):
        with pytest.raises(ValueError):
            codec.decode(np.zeros(shape, kind))
    with pytest.raises(ValueError):
        codec.decode(array(encoded(pixels(1), "PNG")))
