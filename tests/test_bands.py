"""Images of any number of channels, of 8 and 16 bits: every value from the file to the network."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import patterns
import pytest
import simplejpeg
import tifffile
import timm
import torch
from conftest import SMALL, command, once, train
from PIL import Image

import manyview
from manyview.bench import peers, workload
from manyview.evaluation import embed as embedding
from manyview.evaluation import encoder as encoders
from manyview.evaluation import features
from manyview.evaluation.command import Config, evaluate
from manyview.model import backbone, export
from manyview.pipeline import engines, index, sheet
from manyview.pipeline.codec import RGB, Layout
from manyview.pipeline.convert import bands
from manyview.pipeline.convert.verify import verify
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.engines import bands as kernels
from manyview.pipeline.engines import reference
from manyview.pipeline.engines.pixels import render
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import normalize
from manyview.pipeline.manifest import Options, read_manifest
from manyview.pipeline.store import Store, flat_channels
from manyview.pipeline.views import parameters, policy

EXACT = Options("folder", encoding="array")
CPU = torch.device("cpu")


def values(channels: int, kind: type = np.uint16, height: int = 20, width: int = 23, seed: int = 0) -> np.ndarray:
    """(H, W, C) of noise over a slope, each channel with a range of its own, as bands of a satellite have."""
    generator = np.random.default_rng([seed, channels])
    slope = np.linspace(0.1, 0.9, height)[:, None, None] * generator.uniform(0.3, 1, (1, 1, channels))
    noisy = slope + generator.normal(0, 0.05, (height, width, channels))
    return (noisy.clip(0, 1) * np.iinfo(kind).max).astype(kind)


def tiff(array: np.ndarray, **settings) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **settings)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(array: np.ndarray) -> bytes:
    """16 bits too; OpenCV wants blue first."""
    return cv2.imencode(".png", array[..., [2, 1, 0, 3][: array.shape[2]]] if array.shape[2] > 1 else array)[
        1
    ].tobytes()


def png_with_alpha(values: np.ndarray) -> bytes:
    """(H, W, 2) uint16 as a grey PNG with alpha, which neither Pillow nor OpenCV writes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    height, width, _ = values.shape
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 4, 0, 0, 0])
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def decoded(data: bytes) -> np.ndarray:
    return bands.decode(np.frombuffer(data, np.uint8), 10_000)


ONE, TWO, THREE, FOUR, THIRTEEN = (values(channels) for channels in (1, 2, 3, 4, 13))
BYTES = values(5, np.uint8)
PLANES = np.moveaxis(THIRTEEN, 2, 0)
NUMBERS = {"photometric": "minisblack"}
KEPT = {
    "grey png": (png(ONE), ONE),
    "rgb png": (png(THREE), THREE),
    "png with alpha": (png(FOUR), FOUR),
    "grey png with alpha": (png_with_alpha(TWO), TWO),
    "8-bit grey and alpha": (saved(Image.fromarray(BYTES[..., :2]), "PNG"), BYTES[..., :2]),
    "webp": (saved(Image.fromarray(BYTES[..., :3]), "WEBP", lossless=True), BYTES[..., :3]),
    "grey tiff": (tiff(ONE[..., 0]), ONE),
    "big-endian tiff": (tiff(ONE[..., 0], byteorder=">"), ONE),
    "bigtiff": (tiff(THIRTEEN, bigtiff=True, **NUMBERS, planarconfig="contig"), THIRTEEN),
    "13 bands": (tiff(THIRTEEN, **NUMBERS, planarconfig="contig"), THIRTEEN),
    "13 planes": (tiff(PLANES, **NUMBERS, planarconfig="separate"), THIRTEEN),
    "deflated tiles": (tiff(THIRTEEN, **NUMBERS, planarconfig="contig", compression="zlib", tile=(16, 16)), THIRTEEN),
    "8-bit bands": (tiff(BYTES, **NUMBERS, planarconfig="contig"), BYTES),
    "channels as ome's pages": (tiff(np.moveaxis(TWO, 2, 0), ome=True, metadata={"axes": "CYX"}), TWO),
    "channels as imagej's pages": (tiff(np.moveaxis(THREE, 2, 0), imagej=True, metadata={"axes": "CYX"}), THREE),
    "turned tiff": (tiff(ONE[..., 0], extratags=[(274, "H", 1, 6, True)]), np.rot90(ONE, -1)),
    "npy": (npy(THIRTEEN), THIRTEEN),
    "npy, channels first": (npy(PLANES), THIRTEEN),
    "npy without channels": (npy(ONE[..., 0]), ONE),
    "npy, other byte order": (npy(ONE.astype(">u2")), ONE),
    "npy of int32": (npy(THIRTEEN.astype(np.int32)), THIRTEEN),
}


@pytest.mark.parametrize("name", KEPT)
def test_every_value_is_kept(name):
    data, expected = KEPT[name]
    pixels = decoded(data)
    assert pixels.dtype == expected.dtype and np.array_equal(pixels, expected)


def test_jpegs_have_one_channel_or_three():
    grey, color = (saved(Image.fromarray(BYTES[..., :n].squeeze()), "JPEG") for n in (1, 3))
    assert np.array_equal(decoded(grey), simplejpeg.decode_jpeg(grey, "GRAY"))
    assert np.array_equal(decoded(color), simplejpeg.decode_jpeg(color, "RGB"))
    palette = Image.fromarray(BYTES[..., :3]).quantize(7)
    assert np.array_equal(decoded(saved(palette, "PNG")), np.asarray(palette.convert("RGB")))


REFUSED = {
    "floats": (npy(ONE.astype(np.float32)), "float32 are not kept"),
    "float tiff": (tiff(ONE[..., 0].astype(np.float32)), "float32 are not kept"),
    "below zero": (npy(np.full((4, 4), -1, np.int16)), "values from -1 to -1 do not fit 16 bits"),
    "beyond 16 bits": (npy(np.full((4, 4), 65_536)), "values from 65536 to 65536"),
    "depths": (tiff(PLANES, **NUMBERS), "has 13 pages, of which nothing says that they are channels"),
    "times": (tiff(PLANES, imagej=True, metadata={"axes": "TYX"}), "has 13 pages"),
    "palette": (saved(Image.fromarray(BYTES[..., :3]).quantize(7), "TIFF"), "colors by a palette"),
    "4 axes": (npy(np.zeros((2, 4, 4, 3), np.uint8)), "is no image"),
    "1 axis": (npy(np.zeros(9, np.uint8)), "is no image"),
    "pickle": (npy(np.array([[{}]])), "is no array"),
    "cut npy": (npy(THIRTEEN)[:-1], "is no array"),
    "cut tiff": (tiff(THIRTEEN, **NUMBERS)[:300], "read|data|pages"),
    "many channels": (npy(np.zeros((600, 4, 600), np.uint8)), "600 channels, there may be 1 to 512"),
    "large": (npy(np.zeros((101, 100), np.uint8)), "beyond the limit"),
    "as large by its channels": (npy(np.zeros((60, 40, 13), np.uint8)), "beyond the limit"),
    "cmyk": (saved(Image.new("CMYK", (9, 9)), "JPEG"), "four colors"),
    "jpeg 2000": (saved(Image.fromarray(ONE[..., 0]), "JPEG2000"), "not an image"),
    "pgm": (saved(Image.fromarray(ONE[..., 0]), "PPM"), "not an image"),
    "nothing": (b"", "empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_with_the_reason(name):
    data, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        decoded(data)


def test_damage_anywhere_is_a_reason_and_nothing_else():
    generator = np.random.default_rng(0)
    for name, (data, _) in KEPT.items():
        for _ in range(40):
            damaged = bytearray(data)
            for place in generator.integers(0, min(len(damaged), 1200), 3):
                damaged[place] = generator.choice([0, 1, 127, 255])
            try:
                pixels = decoded(bytes(damaged))
            except ValueError as error:
                assert str(error), name
            else:
                assert pixels.ndim == 3 and pixels.size and pixels.dtype in (np.uint8, np.uint16), name


def test_a_huge_tiff_is_refused_before_it_is_decoded():
    data = bytearray(tiff(ONE[..., 0]))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        offset = file.pages[0].tags["ImageWidth"].valueoffset
    data[offset : offset + 4] = (40_000).to_bytes(4, "little")
    with pytest.raises(ValueError, match="beyond the limit"):
        decoded(bytes(data))


# --------------------------------------------------------------------------------------------------------- as a set


def folder(root: Path, channels: int, kind: type, count: int = 24) -> Path:
    """Class folders of TIFFs, train and val."""
    for i in range(count):
        place = root / ("val" if i % 4 == 3 else "train") / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image = values(channels, kind, 18, 22, i)
        about = {"planarconfig": "contig"} if channels > 1 else {}
        (place / f"{i:02d}.tif").write_bytes(tiff(image if channels > 1 else image[..., 0], **NUMBERS, **about))
    return root


KINDS = [(1, np.uint8), (4, np.uint8), (13, np.uint16), (3, np.uint16)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[Layout, Path]:
    root = tmp_path_factory.mktemp("bands")
    made = {}
    for channels, kind in KINDS:
        name = f"{channels}x{kind.__name__}"
        write_shards(EXACT, folder(root / "in" / name, channels, kind), root / name, jobs=1, quiet=True)
        made[Layout(channels, 8 * kind().itemsize)] = root / name
    return made


THIRTEEN_BANDS = Layout(13, 16)


@pytest.mark.parametrize("layout", [Layout(c, 8 * k().itemsize) for c, k in KINDS], ids=str)
def test_a_set_keeps_every_value_and_knows_its_mean_and_deviation(layout, sets):
    store, source = Store(sets[layout]), sets[layout].parent / "in" / sets[layout].name
    originals = [
        tifffile.imread(source / "train" / f"{store.key(i)}.tif").reshape(18, 22, -1) for i in range(len(store))
    ]
    assert store.layout == layout and len(store) == 18 and store.grey == (layout != RGB)
    for i, original in enumerate(originals):
        assert store.read(i).dtype == original.dtype and np.array_equal(store.read(i), original)
    pixels = np.concatenate([original.reshape(-1, layout.channels) for original in originals]).astype(np.float64)
    assert np.allclose(store.mean, pixels.mean(0), rtol=1e-12) and np.allclose(store.std, pixels.std(0), rtol=1e-9)
    assert verify(sets[layout]) == []
    manifest = read_manifest(sets[layout])
    assert (manifest["channels"], manifest["bits"]) == layout
    with tarfile.open(sets[layout] / store.shards[0]["file"]) as archive:  # for anybody's reader
        member = archive.extractfile(f"{store.key(0)}.npy")
        assert np.array_equal(np.load(io.BytesIO(member.read())), originals[0])


def test_a_set_of_rgb_is_an_ordinary_one(tmp_path):
    """Raw, and with no word about channels: every engine takes it."""
    source = tmp_path / "in" / "train" / "one"
    source.mkdir(parents=True)
    for i in range(3):
        (source / f"{i}.png").write_bytes(png(values(3, np.uint8, seed=i)))
    source = tmp_path / "in"
    array = write_shards(EXACT, source, tmp_path / "array", jobs=1, quiet=True)
    raw = write_shards(Options("folder", encoding="raw"), source, tmp_path / "raw", jobs=1, quiet=True)
    assert "channels" not in array and array["fingerprint"] == raw["fingerprint"]
    assert Store(tmp_path / "array").layout == RGB


def test_a_rerun_looks_at_what_is_younger(tmp_path):
    """Touched is no change; rewritten is one, also where it was set aside before."""
    source = folder(tmp_path / "in", 5, np.uint16, 8)
    odd = source / "train" / "class0" / "odd.npy"
    odd.write_bytes(npy(ONE))
    first = write_shards(EXACT, source, tmp_path / "out", jobs=1, max_rejected=0.2, quiet=True)
    (source / "train" / "class0" / "00.tif").touch()
    odd.touch()
    assert write_shards(EXACT, source, tmp_path / "out", jobs=1, max_rejected=0.2, quiet=True) == first
    path = source / "train" / "class0" / "00.tif"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(UserError, match=r"1 images of .* were rewritten"):
        write_shards(EXACT, source, tmp_path / "out", jobs=1, max_rejected=0.2, quiet=True)


def test_import_to_another_format_and_size(sets, tmp_path):
    source = sets[THIRTEEN_BANDS]
    with pytest.raises(UserError, match="13 channels of 16 bits: --encoding array keeps them"):
        write_shards(Options("shards"), source, tmp_path / "no", jobs=1, quiet=True)
    made = write_shards(Options("shards", "ffcv", "array", 9), source, tmp_path / "small", jobs=1, quiet=True)
    store, before = Store(tmp_path / "small"), Store(source)
    assert made["channels"] == 13 and verify(tmp_path / "small") == []
    number = {before.key(i): i for i in range(len(before))}
    for i in range(3):
        whole, small = before.read(number[store.key(i)]), store.read(i)
        for band in range(13):
            expected = cv2.resize(whole[..., band], (11, 9), interpolation=cv2.INTER_AREA)
            assert np.abs(small[..., band].astype(int) - expected).max() <= 1  # a half goes either way


def test_foreign_tars_of_arrays(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(3):
            for name, data in ((f"{i}.npy", npy(values(6, seed=i))), (f"{i}.cls", b"%d" % (i % 2))):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                archive.addfile(about, io.BytesIO(data))
    write_shards(Options("shards", encoding="array"), tmp_path / "a.tar", tmp_path / "out", jobs=1, quiet=True)
    store = Store(tmp_path / "out")
    for i in range(3):
        assert np.array_equal(store.read(i), values(6, seed=int(store.key(i))))


def test_what_is_unlike_the_set_is_set_aside(tmp_path):
    source = folder(tmp_path / "in", 4, np.uint16, 8)
    (source / "train" / "class0" / "a.png").write_bytes(png(THREE))
    (source / "train" / "class0" / "z.npy").write_bytes(npy(BYTES[..., :4]))
    (source / "train" / "class0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="3 of 11 images were rejected"):
        write_shards(EXACT, source, tmp_path / "out", jobs=1, quiet=True)
    (source / "train" / "class0" / "a.png").unlink()
    done = command("tools/shards.py", "write", "--dataset", "folder", "--source", source, "--out", tmp_path / "out",
                   "--encoding", "array", "--max-rejected", "50%")  # fmt: skip
    assert done.returncode == 0 and "8 images" not in done.stderr and "4 channels of 16 bits" in done.stdout
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert "has 4 channels of 8 bits, the set has 4 channels of 16 bits" in reasons and len(reasons) == 2
    with pytest.raises(UserError, match="white narrows values"):
        write_shards(Options("folder", encoding="array", white=4095), source, tmp_path / "white", quiet=True)
    floats = folder(tmp_path / "floats", 1, np.uint8, 0)
    (floats / "train" / "a").mkdir(parents=True)
    (floats / "train" / "a" / "x.npy").write_bytes(npy(ONE.astype(np.float32)))
    with pytest.raises(UserError, match=r"not one image can be kept as an array .values of float32"):
        write_shards(EXACT, floats, tmp_path / "no", quiet=True)


def test_damage_to_what_is_said_of_channels_is_refused(sets, tmp_path):
    source = sets[THIRTEEN_BANDS]
    manifest = json.loads((source / "manifest.json").read_text())
    for channels, bits in ((0, 16), (12, 16), (True, 16), ("13", 16), (513, 16), (13, 12), (13, None)):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "channels": channels, "bits": bits}))
        with pytest.raises(UserError):
            read_manifest(tmp_path)
    rows, part = Store(source)._rows, manifest["splits"]["train"]
    index.check(rows, part, 2, THIRTEEN_BANDS)
    for layout in (RGB, Layout(13, 8), Layout(12, 16)):
        with pytest.raises(ValueError, match=r"by its (length|kind)"):
            index.check(rows, part, 2, layout)
    changed = {
        **rows.columns,
        "kind": np.zeros_like(rows["kind"]),
    }  # a JPEG, which has other channels than kernels are told
    with pytest.raises(ValueError, match="by its kind"):
        index.check(index.Index(changed, rows.key_starts, rows.key_bytes), part, 2, THIRTEEN_BANDS)


def test_a_channel_that_hardly_varies_is_named_by_its_number(tmp_path):
    for i in range(4):
        place = tmp_path / "in" / "train" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image = values(4, seed=i)
        image[..., 1], image[..., 2] = 7, image[..., 2] // 1000  # empty; and faint, but a signal
        np.save(place / f"{i}.npy", image)
    write_shards(EXACT, tmp_path / "in", tmp_path / "out", jobs=1, quiet=True)
    store = Store(tmp_path / "out")
    assert store.std[1] == 1 and 1 < store.std[2] < 20
    said = flat_channels(store.manifest)
    assert said == ["channel 2 (deviation 0 of 65535) hardly varies: it is normalized as if by 1"]


# ------------------------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize("name,size", [("byol", 16), ("multicrop", 28)])
@pytest.mark.parametrize("layout", [Layout(c, 8 * k().itemsize) for c, k in KINDS], ids=str)
def test_the_engine_makes_the_views_of_the_reference(layout, name, size, sets):
    store, ids = Store(sets[layout]), np.arange(6)
    changes = {"vflip": 0.5, "turn": 0.5, "blur": [1.0, 0.3], "sigma": [0.3, 3]}
    p = parameters(policy(name, 6, size, changes), 0, 0 * ids, ids, store.heights[ids], store.widths[ids])
    engine = engines.create("auto", store, "cpu", threads=2)[0]
    ours, expected = engine(ids, p), reference.engine(store, ids, p)
    engine.close()
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape == (len(a), 6, layout.channels, *a.shape[-2:])
        assert a.numpy().dtype == b.numpy().dtype == layout.dtype
        difference = np.abs(a.numpy().astype(int) - b.numpy().astype(int))
        most, mean = (1, 0.01) if layout.bits == 8 else (2, 0.3)
        assert difference.max() <= most and difference.mean() < mean


def test_a_grey_image_is_seen_as_three_equal_channels_are():
    """The kernels of RGB make the same of it, when contrast turns around 128 as theirs does."""
    grey, ids = values(1, np.uint8, 40, 50), np.zeros(1, np.int64)
    p = parameters(policy("simclr", 16, 32, {"blur": 0.3, "turn": 0.5}), 3, ids, ids, np.array([40]), np.array([50]))
    one, three = np.empty((16, 1, 32, 32, 1), np.uint8), np.empty((16, 1, 32, 32, 3), np.uint8)
    mean = np.array([128], np.float32)
    kernels.render(mean, np.float32(255), grey.reshape(-1), p.heights, p.widths, 0, p.views, one)
    render(np.repeat(grey, 3, 2).reshape(-1), p.heights, p.widths, 0, p.views, three)
    assert np.abs(one.astype(int) - three.astype(int)).max() <= 1


def test_views_are_normalized_by_each_channels_own_mean_and_deviation(sets):
    with manyview.Views(sets[THIRTEEN_BANDS], views=2, batch_size=6, size=16, normalize=False) as raw:
        integers = next(iter(raw)).views
    with manyview.Views(sets[THIRTEEN_BANDS], views=2, batch_size=6, size=16) as data:
        views, store = next(iter(data)).views, data.store
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (store.mean, store.std))
    assert integers.dtype == torch.uint16 and views.shape == (2, 6, 13, 16, 16)
    torch.testing.assert_close(views, (integers.float() - mean) / std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalize(integers, store.mean, store.std, torch.float32), views, rtol=1e-5, atol=1e-5)


def test_other_engines_refuse_by_name(sets):
    store = Store(sets[THIRTEEN_BANDS])
    for name in ("dali", "resident", "fused"):
        with pytest.raises(
            UserError, match=f"--engine {name}: it takes 3 channels of 8 bits, .* has 13 channels of 16 bits; use cpu"
        ):
            engines.create(name, store)


def test_the_profiler_and_peers_refuse_such_a_set(sets):
    """Whose kernels, called alone, would read three channels where there are none."""
    data = sets[Layout(1, 8)]
    for call in (lambda: workload.build(workload.Setup(data=data)), lambda: peers.cases(peers.Args(data=data))):
        with pytest.raises(UserError, match="takes images of 3 channels of 8 bits, 1xuint8 has 1 channel of 8 bits"):
            call()


def test_a_contact_sheet_shows_what_can_be_seen(sets, tmp_path):
    for layout, path in sets.items():
        store = Store(path)
        shown = sheet.in_colors(store.read(0), store.layout, store.mean, store.std)
        assert shown.shape == (18, 22, 3) and shown.dtype == np.uint8
        assert (shown[..., 0] == shown[..., 1]).all() == (layout.channels == 1) and 30 < shown.std() < 90
        assert np.argsort(shown[:, 0, 0])[0] < 9  # the slope, not turned round
        renders = {"reference": partial(reference.engine, store)}
        sheet.contact_sheet(store, policy("byol", 3, 16), [0], tmp_path / "s.png", renders=renders)


# ------------------------------------------------------------------------------------------- training and what follows


@pytest.fixture(scope="module")
def grey_digits(tmp_path_factory) -> Path:
    def make(out: Path) -> None:
        write_shards(Options("digits", encoding="array"), None, out, jobs=1, quiet=True)

    return once(tmp_path_factory, "grey-digits", make)


@pytest.fixture(scope="module")
def grey_run(grey_digits, tmp_path_factory) -> Path:
    def make(out: Path) -> None:
        assert (
            train(
                "--data", grey_digits, "--out", out, *SMALL.split(), "--steps", 3, "--save-every", 2, "--fraction", 0.1
            )
            == 0
        )

    return once(tmp_path_factory, "grey-run", make)


@pytest.fixture(scope="module")
def bands_run(sets, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "thirteen"
    words = ["--steps", 2, "--batch-size", 8, "--backbone", "test_vit", "--size", 16, "--eval-every", 1]
    assert train("--data", sets[THIRTEEN_BANDS], "--out", out, *SMALL.split(), *words) == 0
    return out


@pytest.mark.slow
def test_a_run_says_what_its_views_lack_and_goes_on_where_it_stopped(grey_digits, grey_run, tmp_path):
    assert "1 channel of 8 bits, so views have no step of color" in (grey_run / "log.txt").read_text()
    words = [*SMALL.split(), "--save-every", 2, "--fraction", 0.1, "--out", tmp_path / "again", "--steps", 3]
    train("--data", grey_digits, *words)
    for path in (tmp_path / "again" / "checkpoints").glob("step-*3.pt"):
        path.unlink()
    (tmp_path / "again" / "backbone.safetensors").unlink()
    assert train("--data", grey_digits, *words, "--resume") == 0
    a, b = (backbone.load(run)[0].state_dict() for run in (grey_run, tmp_path / "again"))
    assert a["conv1.weight"].shape[1] == 1 and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("run,channels,bits", [("grey_run", 1, 8), ("bands_run", 13, 16)])
def test_timm_and_onnx_get_the_same_features(run, channels, bits, request):
    path = request.getfixturevalue(run)
    header = backbone.metadata(path)
    assert backbone.layout(header) == (channels, bits)
    store = Store(json.loads((path / "config.json").read_text())["data"])
    for to in ("timm", "hub", "onnx")[: 2 + (bits == 16)]:
        _, lines, difference = export.export(path, to)
        assert difference <= export.TOLERANCE
        assert ("create_transform" in lines) == (to != "onnx" and bits == 8)
    wanted = backbone.images(header)
    assert wanted["input_size"] == [channels, int(header["image_size"]), int(header["image_size"])]
    assert np.allclose(np.array(wanted["mean"]) * store.layout.white, store.mean, atol=1e-3)
    if bits == 16:
        folder = path / "export" / "hub"
        assert f"{channels} channels of {bits} bits" in (folder / "README.md").read_text()
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        x = torch.randn(2, *wanted["input_size"])
        with torch.no_grad():
            torch.testing.assert_close(model(x), backbone.load(path)[0](x))
    with pytest.raises(UserError):
        export.export(path, "torchvision")


def test_timms_transform_of_a_grey_image_is_ours(grey_run):
    """By the printed lines alone, on a picture of PIL's."""
    header = backbone.metadata(grey_run)
    names: dict = {}
    exec(backbone.timm_snippet(header, str(grey_run / "backbone.safetensors")), names)
    store = Store(json.loads((grey_run / "config.json").read_text())["data"])
    image = store.read(0)
    theirs = names["transform"](Image.fromarray(image[..., 0]))
    ours = normalize(torch.from_numpy(image.copy()).permute(2, 0, 1), store.mean, store.std, torch.float32)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["grey_run", "bands_run"])
def test_evaluation_of_such_a_run(run, request, tmp_path):
    path = request.getfixturevalue(run)
    evaluate(str(path), Config(protocols=("knn",), out=tmp_path, threads=1, limit=100), CPU)
    rows = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert {row["weights"] for row in rows} >= {"trained", "untrained", "pixels"} and (
        tmp_path / "report.html"
    ).exists()


@pytest.mark.slow
def test_a_folder_of_such_files_is_evaluated_as_its_shards_are(bands_run, sets, tmp_path):
    shards = sets[THIRTEEN_BANDS]
    scores = []
    for data in (shards, shards.parent / "in" / shards.name):
        content = evaluate(
            str(bands_run), Config(data=(data,), protocols=("knn",), out=tmp_path / data.parent.name), CPU
        )
        rows = [row for row in content["results"] if row["weights"] in ("trained", "pixels")]
        scores.append({(row["protocol"], row["norm"], row["weights"]): row["value"] for row in rows})
    assert scores[0] == scores[1] and {weights for *_, weights in scores[0]} == {"trained", "pixels"}


def test_embeddings_of_shards_and_of_the_files_themselves_are_the_same(bands_run, sets, tmp_path):
    encoder = encoders.load(str(bands_run))
    store = Store(sets[THIRTEEN_BANDS])
    engine = engines.create("cpu", store, threads=1)[0]
    expected = features.embed(encoder, store, np.arange(len(store)), engine)[:, 0]
    engine.close()
    source = sets[THIRTEEN_BANDS].parent / "in" / sets[THIRTEEN_BANDS].name
    for data in (sets[THIRTEEN_BANDS], source):
        to = tmp_path / f"{data.parent.name}.npz"
        embedding.embed(encoder, data, to, split="train", device=CPU, engine="auto", threads=1)
        with np.load(to) as content:
            row = {re.sub(r"\.tif$", "", name): x for name, x in zip(content["names"], content["features"])}
        for i in range(len(store)):
            np.testing.assert_allclose(row[store.key(i)], expected[i], rtol=1e-4, atol=1e-5)


def test_an_encoder_of_other_channels_is_refused(bands_run, grey_digits, tmp_path):
    encoder = encoders.load(str(bands_run))
    with pytest.raises(UserError, match="takes images of 13 channels of 16 bits, grey-digits has 1 channel of 8 bits"):
        encoder.check(Store(grey_digits))
    with pytest.raises(UserError, match="three numbers for RGB"):
        encoders.load(str(bands_run), encoders.Asked(mean=(0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match="torchvision's networks take 3 channels, not 13"):
        backbone.create("torchvision:resnet18", image_size=32, channels=13)
    with pytest.raises(UserError, match="takes images of 13 channels of 16 bits, grey-digits has 1 channel of 8 bits"):
        evaluate(str(bands_run), Config(data=(grey_digits,), protocols=("knn",), out=tmp_path), CPU)
    files = patterns.images(tmp_path / "rgb", per_class={"train": 2, "val": 2})
    with pytest.raises(UserError, match=r"no file of train can be used, first blob/0000.png: .*3 channels? of 8 bits"):
        evaluate(str(bands_run), Config(data=(files,), protocols=("knn",), out=tmp_path), CPU)


@pytest.mark.parametrize("name", ["resnet10-narrow", "test_vit"])
@pytest.mark.parametrize("channels", [1, 5])
def test_a_network_of_rgb_starts_one_of_other_channels(name, channels, tmp_path):
    """As timm adapts its own: grey, or equal channels, give what the same image gives in color."""
    rgb = backbone.create(name, image_size=32).eval()
    backbone.save(rgb, tmp_path / "rgb.safetensors", {"backbone": name, "stem": "auto", "image_size": "32"})
    other = backbone.create(name, image_size=32, channels=channels).eval()
    said = backbone.fill(other, name, tmp_path / "rgb.safetensors")
    assert f"first convolution adapted from 3 channels to {channels}" in said
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        theirs, ours = rgb(grey.expand(-1, 3, -1, -1)), other(grey.expand(-1, channels, -1, -1))
    if channels == 1:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    weights = {n: v for n, v in rgb.state_dict().items() if v.ndim == 4 and v.shape[1] == 3}
    assert len(weights) == 1
    for n, weight in weights.items():
        expected = weight.sum(1, keepdim=True) if channels == 1 else weight[:, [0, 1, 2, 0, 1]] * 3 / 5
        torch.testing.assert_close(other.state_dict()[n], expected)
