from __future__ import annotations

import colorsys
import hashlib
import time

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from manyview.pipeline import views
from manyview.pipeline.errors import UserError
from manyview.pipeline.philox import philox
from manyview.pipeline.views import clean, color_map, overrides, parameters, policy

N = 4000
SURE = 1e-4  # a right implementation fails one test in 10,000 seeds, and the seed is fixed


def draw(chosen, n=N, seed=0, epoch=0, height=375, width=500):
    ids = np.arange(n)
    p = parameters(chosen, seed, np.full(n, epoch), ids, np.full(n, height), np.full(n, width))
    return p.views.view(np.recarray)


def test_philox_known_answers():
    # Random123's kat_vectors for philox4x32-10
    zero = [int(x) for x in philox.py_func(np.uint64(0), 0, 0, 0, 0)]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    pi = [int(x) for x in philox.py_func(np.uint64(0x299F31D0A4093822), *counter)]
    assert pi == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_a_view_is_a_function_of_its_name_alone():
    chosen = policy("byol", 3, 64)
    whole = draw(chosen, 50)
    some = np.array([41, 7, 7, 13])
    part = parameters(chosen, 0, np.zeros(4, int), some, np.full(4, 375), np.full(4, 500))
    assert part.views.tobytes() == whole[:, some].tobytes()
    for other in (draw(chosen, 50, seed=1), draw(chosen, 50, epoch=1)):
        assert (other.box != whole.box).any(-1).mean() > 0.95
    assert (whole.box[0] != whole.box[1]).any(-1).mean() > 0.95  # views of one image differ


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (32, 32), (100, 1000)])
def test_crops_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    crop = RandomResizedCrop(8)
    names = ("top", "left", "height", "width")
    theirs = np.array([[box[name] for name in names] for box in (crop.make_params([image]) for _ in range(N))])
    ours = draw(policy("simclr", 1, 8), height=height, width=width).box[0]
    for k, name in enumerate(names):
        assert ks_2samp(ours[:, k], theirs[:, k]).pvalue > SURE, name
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > SURE
    assert ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > SURE
    assert (
        (ours[:, :2] >= 0).all()
        and (ours[:, 0] + ours[:, 2] <= height).all()
        and (ours[:, 1] + ours[:, 3] <= width).all()
    )


def test_chances_and_ranges():
    chosen = policy("simclr", 2, 96, {"solarize": 0.3, "blur": [0.5, 0.1]})
    p = draw(chosen)
    identity = np.eye(3, 4, dtype=np.float32)
    changed = (p.color != identity).any((-1, -2)).mean()
    luma = np.array([0.299, 0.587, 0.114])
    grey = (np.abs(p.color[..., :3] / p.color[..., :3].sum(-1, keepdims=True) - luma).max((-1, -2)) < 1e-4).mean()
    for share, expected in (
        (p.flip.mean(), 0.5), (changed, 1 - 0.2 * 0.8), (grey, 0.2), (p.solarize.mean(), 0.3),
        ((p.sigma[0] > 0).mean(), 0.5), ((p.sigma[1] > 0).mean(), 0.1),
    ):  # fmt: skip
        assert abs(share - expected) < 0.03
    assert kstest(p.sigma[p.sigma > 0], "uniform", (0.1, 1.9)).pvalue > SURE


def test_jitter_factors_are_uniform():
    # With only brightness the map is a scale; with only contrast the offset tells the factor; and so on.
    for name, read in (
        ("brightness", lambda c: c[:, 0, 0]),
        ("contrast", lambda c: c[:, 0, 0]),
        ("saturation", lambda c: (c[:, 0, 0] - 0.299) / 0.701),
    ):
        only = {"grey": 0, "jitter": 1, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "blur": 0, name: 0.8}
        factor = read(draw(policy("simclr", 1, 8, only)).color[0])
        assert kstest(factor, "uniform", (0.2, 1.6)).pvalue > SURE, name


def test_mirror_images_and_quarter_turns():
    """What is drawn is what is asked for, and the three flags are the turns and mirror images of torch's words."""
    p = draw(policy("none", 1, 8, {"flip": 0.5, "vflip": 0.25, "turn": 0.75}))[0]
    ways = p.flip + 2 * p.vflip + 4 * p.transposed
    assert (np.abs(np.bincount(ways, minlength=8) / N - 1 / 8) < 0.03).all()
    for share in (0.0, 0.3):
        p = draw(policy("none", 1, 8, {"turn": share}))[0]
        assert abs((p.flip | p.vflip).mean() - share) < 0.03 and abs(p.transposed.mean() - share * 2 / 3) < 0.03
    image = np.arange(9).reshape(3, 3)
    seen = set()
    for view in p:
        turned = image[:: -1 if view.vflip else 1, :: -1 if view.flip else 1]
        seen.add((turned.T if view.transposed else turned).tobytes())
    assert seen == {
        np.ascontiguousarray(np.rot90(image, k)).tobytes() for k in range(4)
    }  # a turn alone is no mirror image


def test_numbers_are_independent():
    p = draw(policy("simclr", 2, 96))
    columns = [
        p.box[0, :, 0], p.box[0, :, 2], p.color[0, :, 0, 0], p.color[0, :, 2, 1], p.flip[0], p.sigma[0],
        p.box[1, :, 2], p.color[1, :, 0, 0], p.flip[1], p.sigma[1],
    ]  # fmt: skip
    correlation = np.corrcoef(np.stack(columns).astype(float)) - np.eye(len(columns))
    correlation[0, 1] = correlation[1, 0] = 0  # a large crop cannot start far down
    correlation[2, 3] = correlation[3, 2] = 0  # two entries of one color map
    assert np.abs(correlation).max() < 0.07


@pytest.mark.parametrize(
    ("name", "exact", "color", "sigma"),
    [
        ("simclr", "44e664890a2cf68f", 1922.164, 157.604),
        ("byol", "7aed2ef1bce31e0b", 1190.057, 151.4718),
        ("stl", "28230d9727d26d76", 1190.057, 0.0),
        ("imagenet100", "75cc8a633af2cc19", 1190.057, 0.0),
        ("multicrop", "f90fa0b6953bf3f9", 1190.057, 157.8203),
    ],
)
def test_a_seed_makes_the_views_it_always_made(name, exact, color, sigma):
    """Runs go on, and are repeated, with later versions."""
    ids = np.arange(64) * 977
    chosen = policy(name, 4, 96, {"solarize": [0.2, 0.5]} if name == "multicrop" else {})
    p = parameters(chosen, 0, np.arange(64) % 5, ids, 100 + ids % 400, 90 + ids * 7 % 500).views
    digest = hashlib.sha256(b"".join(p[field].tobytes() for field in ("box", "flip", "solarize"))).hexdigest()
    assert digest[:16] == exact
    assert (p["color"].sum(dtype=float), p["sigma"].sum(dtype=float)) == pytest.approx((color, sigma), abs=1e-3)


def factors(b, c, s, h):
    out = np.zeros((3, 4), np.float32)
    color_map(b, c, s, h, out)
    return out


def test_color_map_is_torchvisions_operations():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    image = torch.randint(60, 190, (3, 16, 16), dtype=torch.uint8)
    flat = image.double().flatten(1)

    def ours(m):
        return (torch.from_numpy(m[:, :3]).double() @ flat + torch.from_numpy(m[:, 3:])).view(image.shape)

    assert np.allclose(factors(1, 1, 1, 0), np.eye(3, 4), atol=1e-6)
    assert (ours(factors(1.2, 1, 1, 0)) - F.adjust_brightness(image, 1.2).double()).abs().max() < 1.01
    assert (ours(factors(1, 1, 0.4, 0)) - F.adjust_saturation(image, 0.4).double()).abs().max() < 1.6
    assert (ours(factors(1, 1, 0, 0)) - F.rgb_to_grayscale(image, 3).double()).abs().max() < 1.01
    # contrast pivots at 128 instead of the mean luma: the same picture but for one constant
    difference = ours(factors(1, 0.5, 1, 0)) - F.adjust_contrast(image, 0.5).double()
    luma = F.rgb_to_grayscale(image, 1).double().mean()
    assert (difference - 0.5 * (128 - luma)).abs().max() < 1.6
    # hue keeps grey grey and turns the other colors the way of HSV
    m = factors(1, 1, 1, 0.1)
    assert np.allclose(m[:, :3] @ np.full(3, 100.0) + m[:, 3], grey[:, 0, 0].numpy(), atol=1e-3)
    turned = m[:, :3] @ np.array([200.0, 50.0, 50.0])
    assert 0.05 < colorsys.rgb_to_hsv(*turned)[0] < 0.16


def test_the_order_of_torchvisions_jitter_makes_no_other_map():
    """Where nothing clips and the image's mean luma is 128, all 24 orders are this one map (hue aside: HSV)."""
    b, c, s = 0.9, 0.8, 0.7

    def luma(x):
        return (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * x).sum(0, keepdim=True)

    image = torch.rand(3, 16, 16) * 60 + 100
    image += 128 - luma(image).mean()
    steps = {
        "b": lambda x: b * x,
        "c": lambda x: c * x + (1 - c) * luma(x).mean(),
        "s": lambda x: s * x + (1 - s) * luma(x),
    }
    m = torch.from_numpy(factors(b, c, s, 0))
    ours = torch.einsum("dc,chw->dhw", m[:, :3], image) + m[:, 3, None, None]
    for order in ("bcs", "bsc", "cbs", "csb", "sbc", "scb"):
        x = image
        for step in order:
            x = steps[step](x)
        assert (x - ours).abs().max() < 1e-3, order


def test_clean_is_the_centre_square():
    p = clean(64, np.array([375, 500]), np.array([500, 333]), 0.875).views.view(np.recarray)
    assert p.box[0].tolist() == [[23, 86, 328, 328], [104, 21, 291, 291]]
    assert not p.flip.any() and not p.sigma.any() and not p.solarize.any()
    assert np.array_equal(p.color[0, 0], np.eye(3, 4))


def test_policies_and_their_groups():
    for name in views.POLICIES:
        count = 1 if name == "clean" else 8
        chosen = policy(name, count, 224)
        assert chosen.views == count and chosen.groups[0].size == 224
    crops = policy("multicrop", 8, 224, {"local.size": 98}).groups
    assert [(g.count, g.size) for g in crops] == [(2, 224), (6, 98)]
    nothing = np.zeros(0, int)
    p = parameters(policy("multicrop", 4, 64), 0, *4 * [nothing])
    assert p.groups == ((slice(0, 2), 64), (slice(2, 4), 27))
    byol = draw(policy("byol", 4, 224))
    assert (byol.sigma[[0, 2]] > 0).all() and abs((byol.sigma[[1, 3]] > 0).mean() - 0.1) < 0.03
    assert not byol.solarize[[0, 2]].any() and abs(byol.solarize[[1, 3]].mean() - 0.2) < 0.03
    cifar = draw(policy("cifar", 2, 32))
    assert not cifar.sigma.any()


def test_any_number_can_be_changed(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("hue: 0\nscale: [0.3, 0.9]\n")
    changes = overrides([str(file), "local.grey=0.5", "blur=[1, 0]", "hue=0.05"])
    assert changes == {"hue": 0.05, "scale": [0.3, 0.9], "local.grey": 0.5, "blur": [1, 0]}
    g, local = policy("multicrop", 4, 96, changes).groups
    assert (g.hue, g.scale, g.blur, g.grey, local.grey) == (0.05, (0.3, 0.9), (1.0, 0.0), 0.2, 0.5)


@pytest.mark.parametrize(
    ("name", "count", "changes", "words"),
    [
        ("simcrl", 2, {}, "simclr"),
        ("simclr", 0, {}, "at least 1"),
        ("multicrop", 2, {}, "at least 3"),
        ("simclr", 2, {"hew": 0}, "hue"),
        ("simclr", 2, {"local.hue": 0}, "no local crops"),
        ("simclr", 2, {"hue": "much"}, "not a number"),
        ("simclr", 2, {"hue": 0.7}, r"\[0, 0.5\]"),
        ("simclr", 2, {"flip": 1.5, "scale": [0.5, 0.1]}, "ascending"),
        ("simclr", 2, {"scale": 0.5}, "two ascending"),
        ("simclr", 2, {"blur": []}, "probability"),
        ("simclr", 2, {"count": 1.5}, "not a number"),
        ("simclr", 2, {"jitter": float("nan")}, "probability"),
        ("simclr", 2, {"hue": None}, "not a number"),
        ("simclr", 2, {"size": float("inf")}, "not a number"),
    ],
)
def test_bad_settings_are_named(name, count, changes, words):
    with pytest.raises(UserError, match=words):
        policy(name, count, 224, changes)


def test_bad_setting_files_are_named(tmp_path):
    with pytest.raises(UserError, match="neither"):
        overrides(["nowhere.yaml"])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="neither"):
        overrides([str(tmp_path / "bytes.yaml")])
    (tmp_path / "number.yaml").write_text("1: 2\n")
    with pytest.raises(UserError, match="unknown view setting '1'"):
        policy("simclr", 2, 224, overrides([str(tmp_path / "number.yaml")]))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="key: value"):
        overrides([str(tmp_path / "list.yaml")])


def test_extreme_images_get_a_box_inside():
    for height, width in ((1, 1), (1, 5000), (5000, 1), (2, 3)):
        p = draw(policy("simclr", 2, 8), 200, height=height, width=width)
        assert (p.box[..., 2:] >= 1).all() and (p.box[..., :2] >= 0).all()
        assert (p.box[..., 0] + p.box[..., 2] <= height).all() and (p.box[..., 1] + p.box[..., 3] <= width).all()


def test_drawing_costs_little():
    chosen = policy("simclr", 8, 224)
    draw(chosen, 256)
    begun = time.process_time()
    draw(chosen, 2560)
    per_view = (time.process_time() - begun) / 2560 / 8
    assert per_view < 3e-6  # 1 % of the 0.3 ms that a view of 224 px takes; it is about 0.5 us
