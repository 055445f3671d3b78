from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from pictures import class_folders, pixels
from PIL import Image

from manyview.pipeline import engines
from manyview.pipeline.convert.encode import encode
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.engines import pixels as cpu_pixels
from manyview.pipeline.engines import reference, resident
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import VIEW, ViewParameters, clean, parameters, policy

HAS_DALI = engines.has_dali()


def dali(test):
    """DALI is an extra; and building a graph takes seconds."""
    return pytest.mark.slow(pytest.mark.skipif(not HAS_DALI, reason="pip install nvidia-dali-cuda130")(test))


DALI = pytest.param("dali", marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_DALI, reason="needs DALI")])
STEPS = {"solarize": 0.3, "blur": [0.5, 1.0], "vflip": 0.5, "turn": 0.5}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_shards(Options("folder"), class_folders(root / "in", 8, 2), root / "out", quiet=True)
    return root / "out"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Images of 32 px, which shards hold as raw pixels."""
    root = tmp_path_factory.mktemp("tiny")
    for i in range(12):
        folder = root / "in" / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, 32, 32)).save(folder / f"{i}.png")
    write_shards(Options("folder"), root / "in", root / "out", quiet=True)
    return root / "out"


def drawn(store: Store, ids: np.ndarray, name="simclr", count=4, size=64, changes=STEPS) -> ViewParameters:
    return parameters(policy(name, count, size, changes), 0, 0 * ids, ids, store.heights[ids], store.widths[ids])


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(255**2 / ((a.double() - b.double()) ** 2).mean((-1, -2, -3)).clamp_min(1e-6))


def make(name: str, store: Store, threads: int = 2):
    if name == "dali gpu graph":  # the operators of the GPU's graph, run on the CPU
        from manyview.pipeline.engines.dali import DALIEngine

        engine = DALIEngine(store, threads=threads)
        engine.fused = False
        return engine
    return engines.create(name, store, threads=threads)[0]


POLICIES = [("simclr", 64), ("multicrop", 28), ("byol", 17)]
MATRIX = [("cpu", where, *one) for where in ("photos", "tiny") for one in POLICIES]
MATRIX += [("resident", "tiny", *one) for one in POLICIES]
MATRIX += [
    pytest.param(name, where, *one, marks=DALI.marks)
    for name, where, one in [
        ("dali", "photos", POLICIES[1]),
        ("dali", "tiny", POLICIES[0]),
        ("dali gpu graph", "photos", POLICIES[0]),
        ("dali gpu graph", "tiny", POLICIES[2]),
        ("fused", "photos", POLICIES[1]),
        ("fused", "tiny", POLICIES[2]),
    ]
]


@pytest.mark.parametrize(("name", "where", "policy_name", "size"), MATRIX)
def test_every_engine_against_the_reference(name, where, policy_name, size, request):
    store = Store(request.getfixturevalue(where))
    ids = np.array([3, 0, 9, 5, 5])
    p = drawn(store, ids, policy_name, 4, size)
    engine = make(name, store)
    before = engine.decoded
    found, truth = engine(ids, p), reference.engine(store, ids, p)
    assert engine.decoded == (before if name == "resident" else len(ids))  # decode once, whatever V is
    engine.close()
    assert [f.shape for f in found] == [t.shape for t in truth]
    for mine, theirs in zip(found, truth):
        assert mine.dtype == torch.uint8 and mine[0].is_contiguous(memory_format=torch.channels_last)
        assert psnr(mine, theirs).min() > 40


def test_each_step_alone_is_right(photos):
    """One step at a time, so that no error hides behind another; a level or so is rounding."""
    store = Store(photos)
    ids = np.arange(4)
    engine = CPUEngine(store, threads=1)
    nothing = {"flip": 0, "jitter": 0, "grey": 0, "blur": 0, "solarize": 0}
    for change in ({}, {"flip": 1}, {"jitter": 1}, {"grey": 1}, {"blur": 1}, {"solarize": 1}):
        p = drawn(store, ids, changes=nothing | change)
        worst = (engine(ids, p)[0].int() - reference.engine(store, ids, p)[0].int()).abs()
        if change != {"solarize": 1}:  # there a level of rounding at the threshold becomes a jump
            assert worst.max() <= (8 if "jitter" in change else 3), change  # jitter multiplies a level of rounding
        assert worst.float().mean() < 0.6, change
    engine.close()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("cpu", "photos"),
        ("resident", "tiny"),
        *(pytest.param(n, "photos", marks=DALI.marks) for n in ("dali", "dali gpu graph")),
    ],
)
def test_decoding_and_turning_are_exact(name, where, request):
    store = Store(request.getfixturevalue(where))
    ids = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    p = clean(32, store.heights[ids], store.widths[ids])
    p.views["box"] = 0, 0, 32, 32  # at 32 px: nothing but decoding is left
    for bit, field in enumerate(("flip", "vflip", "transposed")):
        p.views[field] = np.arange(8) >> bit & 1
    engine = make(name, store)
    assert torch.equal(engine(ids, p)[0], reference.engine(store, ids, p)[0])
    engine.close()


def test_blur_far_wider_than_the_image_is_finite(tiny):
    store = Store(tiny)
    ids = np.arange(2)
    p = drawn(store, ids, count=1, size=5, changes={"blur": 1, "sigma": [6, 6]})
    made = [make(name, store)(ids, p)[0] for name in ("cpu", "resident")]
    assert all(x.float().std((-1, -2)).max() < 12 for x in made)  # all but flat


@pytest.mark.parametrize(
    ("size", "sigma"), [(1, 1), (2, 0.1), (5, 6), (16, 0.7), (33, 2), (40, 21.3), (40, 21.4), (9, 90)]
)
def test_the_cpus_blur_is_the_convolution(size, sigma):
    """Also where it reaches beyond several images, and on both sides of where 16 bits end."""
    image = np.concatenate([pixels(7, size, size), np.full((size, size, 3), 255, np.uint8)]).reshape(2, size, 3 * size)
    reach = int(np.ceil(3 * sigma))
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for one in image:
        exact = np.pad(one.reshape(size, size, 3).astype(float), [(reach, reach)] * 2 + [(0, 0)], mode="reflect")
        for axis in (0, 1):
            exact = np.apply_along_axis(np.convolve, axis, exact, weight / weight.sum(), "valid")
        found = np.empty_like(one)
        cpu_pixels.blur(one, np.float32(sigma), found)
        assert abs(found.reshape(exact.shape) - exact).max() < 0.6


def test_a_color_map_that_changes_nothing_is_left_out():
    image, views = pixels(3, 40, 50).reshape(40, 150), np.zeros(2, VIEW)
    views["box"], views["color"] = (3, 4, 33, 44), np.eye(3, 4)
    views["color"][1, :, 3] = 1e-30
    left_out, applied = np.empty((2, 24, 72), np.uint8)
    cpu_pixels.resize(image, views[0], left_out)
    cpu_pixels.resize(image, views[1], applied)
    assert np.array_equal(left_out, applied) and left_out.std() > 5


@pytest.mark.parametrize("name", ["cpu", DALI, "resident"])
def test_the_same_pixels_for_any_threads_batch_and_order(name, tiny):
    store = Store(tiny)
    ids = np.arange(12)
    p = drawn(store, ids, "byol", 2, 32, None)
    one, many = make(name, store, 1), make(name, store, 4)
    whole = one(ids, p)[0]
    part = np.array([11, 2, 7])
    found = many(part, drawn(store, part, "byol", 2, 32, None))[0]
    assert torch.equal(found, whole[:, part])
    assert torch.equal(many(ids, p)[0], whole)
    one.close(), many.close()


def test_resident_leaves_torch_its_threads_and_no_thread_behind(tiny):
    torch.set_num_threads(3)
    before = threading.active_count()
    try:
        engine = make("resident", Store(tiny), threads=2)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
        assert engine._pool.submit(torch.get_num_threads).result() == 1
        engine.close()
    finally:
        torch.set_num_threads(1)
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["cpu", DALI, "resident"])
def test_batches_under_way_come_back_as_their_own(name, tiny):
    store = Store(tiny)
    engine = make(name, store)
    parts = [np.array([i, i + 1]) for i in range(6)]
    alone = [engine(ids, drawn(store, ids))[0].clone() for ids in parts]
    pending = [engine.submit(ids, drawn(store, ids)) for ids in parts]
    pending[1].cancel()
    for i in (4, 0, 5, 2, 3):  # also out of order
        assert torch.equal(pending[i].result()[0], alone[i]), i
    engine.close()


def test_memory_is_reused_only_when_no_tensor_is_left(photos):
    store = Store(photos)
    engine = CPUEngine(store, threads=1)
    ids = np.arange(4)
    first = engine(ids, drawn(store, ids))[0]
    kept, copy, place = first[1, 2], first[1, 2].clone(), first.data_ptr()
    del first  # but a slice of it lives
    second = engine(ids, drawn(store, ids, changes={"flip": 1}))[0]
    assert second.data_ptr() != place and torch.equal(kept, copy)
    del kept
    assert engine(ids, drawn(store, ids))[0].data_ptr() == place
    engine.close()


@pytest.mark.parametrize("name", ["cpu", DALI, "resident"])
def test_an_altered_record_is_named_and_the_engine_goes_on(name, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "x")
    good = Store(tiny)
    shard = folder / good.shards[0]["file"]
    start = int(good._rows["offset"][5])
    with open(shard, "r+b") as file:
        file.seek(start + 100)
        file.write(b"\xff\x00\xff")
    store = Store(folder)
    engine = make(name, store)
    ids = np.arange(8)
    with pytest.raises(Corrupt) as error:
        engine(ids, drawn(store, ids))
    assert error.value.id == 5 and error.value.key == store.key(5)
    ids = np.array([0, 1, 7])
    assert torch.equal(engine(ids, drawn(store, ids))[0], make(name, good)(ids, drawn(good, ids))[0])
    engine.close()


@pytest.mark.parametrize("size", [(40, 120), (90, 120), (200, 120)])
@pytest.mark.parametrize("name", ["cpu", "fused", DALI, pytest.param("dali gpu graph", marks=DALI.marks)])
def test_an_image_of_another_size_than_its_index_says_is_named(name, size, photos):
    """Kernels read where boxes say, and boxes are drawn for the index's sizes: smaller, as wide as it is high, larger."""
    store = Store(photos)
    engine, ids = make(name, store), np.arange(3)
    store.read = lambda i, read=store.read: encode(pixels(0, *size)) if i == 1 else read(i)
    with pytest.raises(Corrupt, match=rf"sample 1 .*decodes to {size[1]} x {size[0]} pixels, its index says"):
        engine(ids, drawn(store, ids))
    del store.read
    assert engine(ids, drawn(store, ids))[0].shape[1] == 3  # and the engine goes on
    engine.close()


def test_resident_names_an_image_of_another_size(tiny, monkeypatch):
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, i: pixels(0, 16, 64) if i == 1 else read(self, i))
    engine = make("resident", store := Store(tiny))
    with pytest.raises(Corrupt, match=r"sample 1 .*decodes to 64 x 16 pixels, its index says 32 x 32"):
        engine(np.arange(3), drawn(store, np.arange(3)))
    engine.close()


@dali
def test_an_image_that_only_dali_refuses_is_decoded_on_the_host(photos):
    store = Store(photos)

    class Refused(Store):
        def read(self, i):
            payload = super().read(i)
            if i != 2 or refuse == 0:
                return payload
            return payload[: len(payload) // 3] if next(calls) == 0 else payload

    store.__class__ = Refused
    refuse, calls = 1, iter([0, *[1] * 100])
    engine = make("dali", store)
    ids = np.arange(4)
    found = engine(ids, drawn(store, ids))[0]
    refuse = 0
    assert psnr(found, reference.engine(store, ids, drawn(store, ids))[0]).min() > 40
    assert torch.equal(engine(ids, drawn(store, ids))[0], found)
    engine.close()


@dali
def test_what_fails_twice_is_no_images_fault(photos, monkeypatch):
    store = Store(photos)
    engine = make("dali", store)
    tried = []

    def broken(self):
        batch = self.waiting.popleft()
        batch.outputs = RuntimeError("out of memory")
        tried.append(batch)

    monkeypatch.setattr("manyview.pipeline.engines.dali.Graph.collect_oldest", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine(np.arange(4), drawn(store, np.arange(4)))
    assert len(tried) == 2
    engine.close()


def test_auto_chooses_and_says_why(photos, tiny, monkeypatch):
    name, reason = engines.choose(Store(photos), torch.device("cpu"))
    assert name == "cpu" and reason.startswith("auto: ")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    assert engines.choose(Store(tiny), cuda)[0] == "resident"
    name, reason = engines.choose(Store(photos), cuda)
    assert name == "dali" and "larger than 96" in reason
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    assert engines.choose(Store(tiny), cuda)[0] == "dali"
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    name, reason = engines.choose(Store(photos), cuda)
    assert name == "cpu" and "pip install" in reason


def test_bad_choices_are_named(photos, monkeypatch):
    store = Store(photos)
    with pytest.raises(UserError, match="resident"):
        engines.create("residnet", store)
    with pytest.raises(UserError, match="several sizes"):
        engines.create("resident", store)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        engines.create("dali", store)


def test_resident_blur_is_a_convolution():
    sigma = torch.tensor([0.0, 0.7, 2.0])
    matrices = resident.gaussian(sigma, 16)
    assert torch.allclose(matrices.sum(-1), torch.ones(3, 16))
    assert torch.equal(matrices[0], torch.eye(16))
    assert torch.allclose(matrices[2, 8, 2:15], matrices[2, 8, 2:15].flip(0), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["dali", "resident", "cpu"])
def test_on_the_gpu(name, tiny, photos):
    store = Store(tiny if name == "resident" else photos)
    ids = np.arange(8)
    p = drawn(store, ids, "byol", 4, 32)
    engine, _ = engines.create(name, store, "cuda")
    found = engine(ids, p)[0]
    assert found.device.type == "cuda" and found[0].is_contiguous(memory_format=torch.channels_last)
    assert psnr(found.cpu(), reference.engine(store, ids, p)[0]).min() > 35  # nvJPEG's pixels differ by rounding
    engine.close()


@pytest.mark.skipif("MANYVIEW_PHOTOS" not in os.environ, reason="extra: MANYVIEW_PHOTOS names shards of real photos")
@pytest.mark.parametrize("name", ["cpu", DALI])
def test_on_real_photos(name):
    store = Store(os.environ["MANYVIEW_PHOTOS"])
    ids = np.arange(64)
    p = drawn(store, ids, size=224)
    assert psnr(make(name, store)(ids, p)[0], reference.engine(store, ids, p)[0]).min() > 40


def test_pixels_are_those_that_they_always_were():
    """No sum may be taken in another order: runs go on, and are repeated, with later versions and on other machines. Views
    of 1 to 64 pixels, mirrored and not, of boxes of a pixel, of thin ones, and of some at every edge."""
    image = np.random.default_rng(0).integers(0, 256, (90, 300, 3), np.uint8)
    image.flags.writeable = False
    boxes = [
        (0, 0, 90, 300), (3, 7, 1, 1), (89, 299, 1, 1), (10, 20, 64, 65), (5, 100, 33, 180), (0, 295, 90, 5), (20, 0, 17, 2)
    ]  # fmt: skip
    digest = hashlib.sha256()
    for size in (1, 3, 4, 17, 64):
        p = clean(size, np.full(len(boxes), 90), np.full(len(boxes), 300))
        p.views["box"][0], p.views["flip"][0, ::2] = boxes, True
        p.views["color"][0, 3] = [[0.5, 0.25, 0, 8], [0, 1.5, -0.25, 0], [0.125, 0, 1, -4]]
        out = np.empty((1, len(boxes), size, size, 3), np.uint8)
        for b in range(len(boxes)):
            cpu_pixels.render(image.reshape(-1), np.array([90]), np.array([300]), b, p.views, out)
        digest.update(out.tobytes())
    assert digest.hexdigest()[:16] == "7d9ea9687266fbff"


COMPILED = """
import hashlib, numpy as np
from manyview.pipeline import views
from manyview.pipeline.engines import pixels
generator, n = np.random.default_rng(0), 3000
images = generator.integers(0, 256, (n, 8, 8, 3), np.uint8)
images.flags.writeable = False  # as the engine gives them
drawn = views.parameters(views.policy("simclr", 2, 8, {}), 0, np.zeros(n, int), np.arange(n), *2 * [np.full(n, 8)])
out = np.empty((2, n, 8, 8, 3), np.uint8)
sizes = np.full((2, n), 8)
pixels.render(images.reshape(-1), *sizes, 0, drawn.views, out)
print(hashlib.sha256(out).hexdigest())
"""


@pytest.mark.slow
def test_kernels_make_the_same_pixels_compiled_now_or_earlier(tmp_path):
    """Inlining differs between the two: with reassociation allowed, 1 value in 300,000 then did too."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = partial(subprocess.run, [sys.executable, "-c", COMPILED], cwd=ROOT, env=env, capture_output=True, text=True)
    first, second = run(), run()
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
