"""The command line: flags, presets, and what cannot be right."""

from __future__ import annotations

import pytest
from conftest import ROOT

from manyview.training import config

FLAGS = [
    "data",
    "views",
    "policy",
    "augment",
    "size",
    "fraction",
    "batch_size",
    "epochs",
    "steps",
    "backbone",
    "stem",
    "projector_dim",
    "projector_hidden",
    "objective",
    "form",
    "beta",
    "standardize",
    "bn",
    "optimizer",
    "lr",
    "final_lr",
    "warmup",
    "weight_decay",
    "ema",
    "order",
    "seed",
    "engine",
    "device",
    "precision",
    "compile",
    "threads",
    "prefetch",
    "view_chunk",
    "out",
    "preset",
    "resume",
    "overwrite",
    "init_from",
    "dry_run",
    "log",
    "log_every",
    "save_every",
    "keep_every",
    "eval_every",
    "max_bad",
]


def test_flags_are_frozen():
    """A new flag is a decision: it costs every user a line of --help. At most 45."""
    assert list(vars(config.Config())) == FLAGS
    assert len(FLAGS) <= 45


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_parse_and_say_what_to_expect(preset, digits):
    header = [line for line in preset.read_text().splitlines() if line.startswith("#")]
    assert "Expected" in "".join(header) and "Hardware" in "".join(header)
    chosen = config.parse(["--preset", str(preset), "--data", str(digits), "--seed", "5"])
    assert chosen.seed == 5 and chosen.data == digits


def test_flags_win_over_the_preset(digits, tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("views: 8\nlr: 0.5\n")
    chosen = config.parse(["--preset", str(preset), "--data", str(digits), "--views", "3"])
    assert (chosen.views, chosen.lr) == (3, 0.5)
    preset.write_text("veiws: 8\n")
    with pytest.raises(config.UserError, match="nearest: views"):
        config.parse(["--preset", str(preset), "--data", str(digits)])


def test_small_views_have_defaults_of_their_own(digits, tmp_path):
    """Up to 32 px, of a ResNet, without a preset; a flag wins, also where it says what the default would be elsewhere."""

    def chosen(*words: str) -> tuple[str, str, str]:
        found = config.parse(["--data", str(digits), *words])
        return found.optimizer, found.policy, found.beta

    assert chosen() == chosen("--size", "32") == ("muon", "auto", "20/D")
    assert chosen("--size", "33") == chosen("--backbone", "vit_tiny_patch16_224") == ("adamw", "simclr", "auto")
    assert chosen("--optimizer", "adamw", "--beta", "auto") == ("adamw", "auto", "auto")
    assert chosen("--objective", "vicreg") == chosen("--form", "pairs") == ("muon", "auto", "auto")
    (tmp_path / "p.yaml").write_text("views: 8")
    assert chosen("--preset", str(tmp_path / "p.yaml")) == ("adamw", "simclr", "auto")


@pytest.mark.parametrize(
    "line",
    [
        "steps: abc",
        "steps: 4.7",
        "steps:",
        "steps: [1]",
        "compile: 'false'",
        "views: true",
        "lr: {a: 1}",
        "- views",
        "a: b: c",
    ],
)
def test_a_preset_that_says_nonsense_is_one_line(digits, tmp_path, line):
    preset = tmp_path / "p.yaml"
    preset.write_text(line + "\n")
    with pytest.raises(config.UserError) as found:
        config.parse(["--preset", str(preset), "--data", str(digits)])
    assert str(found.value).startswith(str(preset)) and len(str(found.value).splitlines()) == 1


def test_lists_in_presets_and_flags(digits, tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("augment: blur=0 hue=0.1\nlr: 1\ncompile: true\n")
    words = ["--preset", str(preset), "--data", str(digits), "--log", "tensorboard,wandb"]
    chosen = config.parse(words)
    assert chosen.augment == ("blur=0", "hue=0.1") and chosen.lr == 1.0 and chosen.compile is True
    assert chosen.log == ("tensorboard", "wandb")


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "-5"], ["--lr", "nan"], ["--lr", "-1"], ["--final-lr", "-1"], ["--warmup", "5"], ["--warmup", "nan"],
        ["--weight-decay", "nan"], ["--ema", "1"], ["--ema", "-1"], ["--max-bad", "nan"], ["--keep-every", "-1"],
        ["--view-chunk", "-2", "--bn", "view"], ["--projector-hidden", "-3"], ["--threads", "-3"], ["--epochs", "0"],
        ["--epochs", "inf"], ["--fraction", "0"], ["--seed", "100000000000000000000000"], ["--views", "1"],
        ["--backbone", "resnet18.a1_in1k"],
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_right_are_refused_by_their_flag(digits, words):
    with pytest.raises(config.UserError) as found:
        config.parse(["--data", str(digits), *words])
    assert str(found.value).startswith(words[0]) and len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(("text", "value"), [("0.01", 0.01), ("5/D", 5 / 64), ("auto", None)])
def test_beta_may_be_a_number_divided_by_the_dimensions(text, value):
    assert config.objective_options(config.Config(beta=text, projector_dim=64))["beta"] == value


@pytest.mark.parametrize("text", ["five/D", "5/E", "-1/D", "nan"])
def test_a_beta_that_is_no_strength_is_refused(digits, text):
    assert any("beta" in line for line in config.check(config.Config(data=digits, beta=text)))
