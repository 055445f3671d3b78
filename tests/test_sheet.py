from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from conftest import program
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from manyview.pipeline.engines import reference
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.sheet import CELL, _original, contact_sheet, describe, factors
from manyview.pipeline.store import Store
from manyview.pipeline.views import clean, color_map, parameters, policy

factor = st.floats(0.2, 1.8)


@settings(deadline=None)
@given(factor, factor, factor, st.floats(-0.45, 0.45))
def test_factors_are_read_back_from_a_map(brightness, contrast, saturation, hue):
    out = np.zeros((3, 4), np.float32)
    color_map(brightness, contrast, saturation, hue, out)
    assert factors(out) == pytest.approx((brightness, contrast, saturation, 360 * hue), rel=1e-3, abs=0.02)


def test_what_was_drawn_is_said():
    p = clean(8, np.array([10]), np.array([20]))
    assert describe(p.views[0, 0], 200) == ["50 %, 10 x 10", "color as it is", ""]
    view = p.views[0, 0]
    view["flip"], view["sigma"], view["solarize"] = True, 1.5, True
    color_map(1.25, 0.8, 0.0, 0.0, view["color"])
    assert describe(p.views[0, 0], 200) == ["50 %, 10 x 10  ↔", "b 1.25 c 0.80 grey", "blur 1.50 px  solarize"]


def test_a_sheet_shows_the_views(digits, tmp_path):
    store = Store(digits)
    engine = CPUEngine(store, threads=1)
    renders = {"cpu": engine, "reference": partial(reference.engine, store)}
    chosen = policy("simclr", 3, 8)
    contact_sheet(store, chosen, [5, 9], tmp_path / "new" / "sheet.png", renders=renders, seed=1)
    engine.close()
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png")).astype(int)
    assert sheet.shape[1] > 3 * CELL and sheet.shape[0] > 4 * CELL and sheet.std() > 10
    rows = [np.flatnonzero((sheet[:, -60] != sheet[0, 0]).any(-1))]  # the last column of views
    assert len(rows[0]) > 3 * CELL


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (3000, 1), (2, 700), (1, 1)])
def test_thin_pictures_have_frames(height, width):
    sheet = Image.new("RGB", (700, 400))
    boxes = parameters(policy("simclr", 3, 8), 0, *(np.array([x]) for x in (0, 0, height, width))).views["box"][:, 0]
    tall = _original(sheet, np.full((height, width, 3), 90, np.uint8), boxes, (20, 20), 350, 200)
    assert 1 <= tall <= 200 and np.asarray(sheet).any()


@pytest.mark.slow
def test_the_command_draws_every_engine(digits, tmp_path):
    line = ("tools/views.py", "--data", digits, "--views", 2, "--images", 2, "--engines", "reference,cpu,resident")
    done = program(*line, "--out", tmp_path / "a.png", "--augment", "hue=0", "blur=1")
    assert done.returncode == 0, done.stderr
    assert (
        "2 images, 2 views of 8 px, reference, cpu, resident" in done.stdout
        and (tmp_path / "a.png").stat().st_size > 2000
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engines", "cpuu"], "unknown engine 'cpuu'; nearest: cpu"),
        (["--policy", "byoll"], "unknown policy 'byoll'; nearest: byol"),
        (["--augment", "hew=0"], "unknown view setting 'hew'; nearest: hue"),
        (["--split", "test"], "no split 'test'"),
        (["--size", "200000"], "at most 16384"),
        (["--size", "16000", "--views", "100"], "GiB: a smaller --size"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(digits, tmp_path, flags, words):
    done = program("tools/views.py", "--data", digits, "--out", tmp_path / "a.png", *flags)
    assert done.returncode == 2 and words in done.stderr
