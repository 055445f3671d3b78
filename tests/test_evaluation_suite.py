"""tools/evaluate.py from one end to the other: what it writes, what it reuses, and what bad input gets."""

import json
import math
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyview.evaluation import command as cli
from manyview.evaluation import compare, encoder, finetune, folder, protocols, suite
from manyview.evaluation.data import open_data
from manyview.model import backbone
from manyview.pipeline import engines
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options
from tests import patterns
from tests.conftest import command, program

pytestmark = pytest.mark.slow  # the whole command, again and again
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return patterns.shared(tmp_path_factory)


def evaluate(target, **settings) -> dict:
    """One evaluation in this process, as the command does it."""
    settings = {
        "data": (),
        "protocols": ("knn", "ridge", "label-free"),
        "epochs": 10,
        "device": "cpu",
        "plots": False,
    } | settings
    return cli.evaluate(str(target), cli.Config(targets=(str(target),), **settings), cli.start("cpu"))


def copy(run: Path, to: Path) -> Path:
    return Path(
        shutil.copytree(run, to / run.name, ignore=shutil.ignore_patterns("features", "plots", "eval*", "report*"))
    )


@pytest.fixture(scope="module")
def quick(made, tmp_path_factory):
    """The default evaluation of the ResNet run, by the command itself."""
    run = copy(made[0][0], tmp_path_factory.mktemp("quick"))
    done = program("tools/evaluate.py", run, "--write", run / "table.md")
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def test_default_measures_what_the_help_says(quick):
    run, printed = quick
    content = json.loads((run / "eval.json").read_text())
    names = {row["protocol"].split()[0] for row in content["results"]}
    assert names == {"knn-cosine-exp", "knn-euclid-invdist", "linear-sweep", "linear-paper", "ridge", "rankme", "alpha-req",
                     "majority", "overlap"}  # fmt: skip
    keys = {"run", "checkpoint", "step", "backbone", "method", "dataset", "protocol", "norm", "seed", "metric", "value", "low",
            "high", "text", "weights", "mode"}  # fmt: skip
    assert all(keys <= row.keys() for row in content["results"])
    for line in content["table"]:
        assert line["untrained"] is not None and line["majority"] == 0.2
        assert line["text"] and line["text"] in printed
        if line["draws"] == 1:
            assert line["low"] <= line["top1"] <= line["high"]
        else:
            assert (line["draws"], line["std"] is not None) == (3, True)
    assert content["sha256"] == encoder.load(str(run)).sha256
    assert {p.name for p in (run / "plots").glob("*.png")} >= {
        f"eval-patterns-{kind}.png" for kind in ("spectrum", "confusion", "neighbours", "map")
    }
    table = (run / "table.md").read_text()
    assert f"Made by `python tools/evaluate.py {run} --write {run}/table.md`" in table
    assert "| linear-sweep | bn |" in table


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the report in")
def test_report_in_a_browser(quick, tmp_path):
    """Every picture is shown, and nothing is asked of any other place: all network access goes to a closed port."""
    run, _ = quick
    page = (run / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", page)
    probe = """<script>addEventListener("load", () => {
      const all = [...document.images], shown = all.filter(i => i.complete && i.naturalWidth > 50 && i.clientWidth > 50);
      const asked = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:"));
      const rows = document.querySelectorAll("tr").length;
      document.title = `pictures ${all.length} shown ${shown.length} asked ${asked.length} rows ${rows}`;
    })</script></body>"""
    copied = tmp_path / "report.html"
    copied.write_text(page.replace("</body>", probe))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=5000",
             f"--user-data-dir={tmp_path}/profile", "--proxy-server=127.0.0.1:9", "--dump-dom", f"file://{copied}"]  # fmt: skip
    dom = subprocess.run([str(CHROMIUM), *words], capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>pictures (\d+) shown (\d+) asked (\d+) rows (\d+)</title>", dom)
    assert found, dom[:500]
    pictures, shown, asked, rows = map(int, found.groups())
    assert pictures == shown == 4
    assert asked == 0
    assert rows > 15
    assert "timm.create_model" in dom


@pytest.mark.slow
def test_second_call_reads_instead_of_computing(quick):
    run, _ = quick
    before = {p.name: p.read_bytes() for p in (run / "eval.json", run / "report.html")}
    begun = time.process_time()
    for path in run.glob("features/*"):
        path.unlink()  # not even features are needed for finished cells and kept pictures
    evaluate(run, protocols=("quick",), epochs=100, plots=True)
    assert time.process_time() - begun < 3
    assert {p.name: p.read_bytes() for p in (run / "eval.json", run / "report.html")} == before
    assert not list(run.glob("features/*"))


def test_same_seed_same_bytes(made, tmp_path):
    runs = [copy(made[0][0], tmp_path / name) for name in "ab"]
    settings = {"protocols": ("knn", "linear", "ridge", "label-free", "fewshot"), "finetune_epochs": 1, "limit": 100}
    for run in runs:
        evaluate(run, **settings)
    a, b = ((run / "eval.json").read_text().replace(str(run), "RUN") for run in runs)
    assert a == b
    evaluate(runs[1], seed=1, protocols=("linear",))
    assert (runs[1] / "eval.json").read_text().replace(str(runs[1]), "RUN") != a


def test_two_processes_give_the_same_numbers(made, tmp_path):
    """torchrun: the features in shares, everything after in one process; the same bytes as without."""
    runs = [copy(made[0][0], tmp_path / name) for name in "ab"]
    rest = [
        "--data",
        made[1][1],
        "--protocols",
        "knn",
        "ridge",
        "label-free",
        "lidar",
        "in-domain",
        "--no-plots",
        "--epochs",
        "5",
        "--limit",
        "100",
    ]
    many = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for run, words in zip(runs, ((), many)):
        done = (command if words else program)(*words, "tools/evaluate.py", run, *rest, "--write", run / "table.md")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1
    assert "read from the cache" in done.stdout
    a, b = ((run / "eval.json").read_text().replace(str(run), "RUN") for run in runs)
    assert a == b
    names = [sorted(p.name for p in (run / "features").glob("*")) for run in runs]
    assert names[0] == names[1]
    assert done.stdout.count("embedded in") == len(names[0])  # nothing is left for the one process to embed alone


def test_interrupted_evaluation_goes_on(made, tmp_path, monkeypatch):
    """What is finished is neither computed again nor doubled; the result is that of an evaluation in one go."""
    whole, broken = (copy(made[0][0], tmp_path / name) for name in "ab")
    expected = evaluate(whole, protocols=("knn", "linear", "ridge"))
    calls: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(protocols, "few_shots", lambda p: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(broken, protocols=("knn", "linear", "ridge"))
    half = json.loads((broken / "eval.json").read_text())
    assert {row["cell"] for row in half["results"]} == {
        "patterns/majority/untrained",
        "patterns/knn/trained",
        "patterns/linear/trained",
    }
    original = protocols.nearest_neighbours
    monkeypatch.setattr(
        protocols, "nearest_neighbours", lambda p, prefix="": calls.append("knn") or original(p, prefix)
    )
    monkeypatch.setattr(suite, "BASELINES", {})  # as in another process
    found = evaluate(broken, protocols=("knn", "linear", "ridge"))
    assert calls == ["knn"] * 2  # of the untrained network and of the pixels alone
    assert found["results"] == expected["results"]
    assert len({(r["cell"], r["protocol"], r["norm"], r["seed"], r["metric"]) for r in found["results"]}) == len(
        found["results"]
    )


def test_other_weights_or_data_are_evaluated_again(made, tmp_path, capsys):
    run = copy(made[0][0], tmp_path)
    first = evaluate(run, protocols=("knn",))
    patterns.make_run(tmp_path / "other", made[1][0], "smoke-resnet", seed=5)
    shutil.copy(tmp_path / "other" / "backbone.safetensors", run)
    second = evaluate(run, protocols=("knn",))
    assert "it is of other weights" in capsys.readouterr().out
    assert second["checkpoint"] != first["checkpoint"]
    assert second["results"] != first["results"]
    third = evaluate(run, protocols=("knn",), limit=100)
    assert {row["n_train"] for row in third["results"]} == {100}
    assert any(
        "100 of 200 training images (seed 0, class-balanced)" in n for n in third["datasets"]["patterns"]["notes"]
    )


def test_test_labels_change_the_score_alone(made, tmp_path):
    """No peeking: with the test labels permuted, every choice and every prediction is what it was."""
    data = open_data(made[1][0], protocols.choose(["knn"]))
    run = encoder.load(str(made[0][0]))
    work = suite.Suite(run, tmp_path, suite.Options(epochs=10), lambda _: None)
    p = suite.Cell(work, data.protocols[0], data, "trained").problem()
    work.close()
    shuffled = protocols.Problem(p.x, p.labels, p.queries, p.truth.flip(0), p.classes)
    for make in (protocols.nearest_neighbours, protocols.few_shots, lambda p: protocols.linear_probes(p, 0, 10)):
        a, b = list(make(p)), list(make(shuffled))
        assert [r.text for r in a] == [r.text for r in b]  # the chosen rate is part of the text
        assert all((x.scores is None) or x.scores.equal(y.scores) for x, y in zip(a, b))
        assert [r.score.top1 for r in a] != [r.score.top1 for r in b]


@pytest.mark.parametrize("network", [0, 1], ids=["resnet", "vit"])
def test_frozen_means_frozen(made, tmp_path, network):
    """Every parameter and buffer is what it was, after the probes and after fine-tuning a copy."""
    run = encoder.load(str(made[0][network]))
    before = encoder.fingerprint(run.module)
    asked = protocols.choose(("knn", "linear", "ridge", "label-free", "full"))
    work = suite.Suite(run, tmp_path, suite.Options(epochs=2, finetune_epochs=1), lambda _: None)
    work.run(open_data(made[1][0], asked), None)
    work.close()
    assert {row["protocol"] for row in work.content()["results"]} >= {"linear-paper", "finetune full"}
    assert encoder.fingerprint(run.module) == before


def test_finetuning_scores_the_test_set_once_and_last(made, tmp_path, monkeypatch):
    """A test curve that spikes in the middle cannot be reported: it is never drawn."""
    events: list[str] = []
    batches, predict = finetune._batches, finetune.predict
    monkeypatch.setattr(finetune, "_batches", lambda *a: (events.append(f"epoch {b[0]}") or b for b in batches(*a)))
    monkeypatch.setattr(finetune, "predict", lambda *a, **k: events.append("test") or predict(*a, **k))
    content = evaluate(copy(made[0][0], tmp_path), protocols=("full",), finetune_epochs=3, limit=100)
    assert events == ["epoch 0", "epoch 1", "epoch 2", "test"] * 2  # trained, untrained
    (line,) = content["table"]
    assert "3 epochs" in line["text"] and line["text"].endswith("last epoch")
    assert "100 labels (100.000% of the training images)" in line["text"]


@pytest.mark.slow
def test_smoke_of_every_protocol(made, tmp_path):
    """A ResNet and a ViT by every protocol on other images than their own, in-domain probe included: under two CPU minutes."""
    begun = time.process_time()
    asked = ("--protocols", "all", "--finetune-epochs", "1", "--epochs", "20", "--limit", "100", "--no-plots")
    runs = [copy(run, tmp_path) for run in made[0]]
    done = program("tools/evaluate.py", *runs, "--data", made[1][1], *asked)
    assert done.returncode == 0, done.stderr
    assert time.process_time() - begun < 120
    for words in ("smoke-resnet", "smoke-vit", "finetune 1%", "finetune 10%", "finetune full", "averaged-16-views", "lidar",
                  "in-domain probe", "± "):  # fmt: skip
        assert words in done.stdout, words


def test_a_baseline_of_several_targets_is_measured_once(made, tmp_path, monkeypatch):
    """Plain pixels, and the untrained network of one architecture; each protocol's numbers are as if measured alone."""
    run, asked, contents = copy(made[0][0], tmp_path), {"protocols": ("knn", "ridge"), "limit": 60}, []
    for i in range(3):
        if i in (0, 2):
            monkeypatch.setattr(suite, "BASELINES", {})
        module = encoder.load(str(run)).module
        torch.manual_seed(i)
        torch.nn.init.normal_(module.conv1.weight)
        backbone.save(module, run / "backbone.safetensors", backbone.metadata(run))
        contents.append(evaluate(copy(run, tmp_path / str(i)), **asked))
        assert len(suite.BASELINES) == 4
    own, baselines = (
        [
            [(r["protocol"], r["metric"], r["value"]) for r in c["results"] if (r["weights"] == "trained") == mine]
            for c in contents
        ]
        for mine in (True, False)
    )
    assert baselines[0] == baselines[1] == baselines[2] and own[0] != own[1] != own[2]


def test_transfer_and_in_domain_probe_are_kept_apart(made, tmp_path):
    notes = ("shifted: more red than the others",)
    content = evaluate(
        copy(made[0][0], tmp_path), data=tuple(made[1]), protocols=("knn", "in-domain", "overlap"), notes=notes
    )
    assert content["datasets"]["shifted"]["notes"] == [
        "more red than the others",
        "no kNN with k = 200: only 125 training images",
    ]
    modes = {(line["dataset"], line["mode"]) for line in content["table"]}
    assert modes == {("patterns", "retrained"), ("shifted", "retrained"), ("shifted", "in-domain probe")}
    probe = [line for line in content["table"] if line["mode"] == "in-domain probe"]
    assert all("trained on patterns, not on shifted" in line["text"] for line in probe)
    fresh = {(r["dataset"], r["mode"], r["text"].rpartition(" of ")[2]) for r in content["results"]
             if r["weights"] == "untrained" and r["protocol"].startswith("knn")}  # fmt: skip
    assert fresh == {("patterns", "retrained", "patterns"), ("shifted", "retrained", "shifted"),
                     ("shifted", "in-domain probe", "patterns")}  # fmt: skip
    said = content["datasets"]["shifted"]["untrained"]
    assert said == "random weights (seed 0, all blocks on), batch-norm statistics of 125 training images of shifted"
    assert not any("in-domain" in c for _, c in compare.table(content["results"]))


def test_other_classes_have_no_in_domain_probe(made, digits, tmp_path):
    content = evaluate(copy(made[0][0], tmp_path), data=(digits,), protocols=("ridge", "in-domain"), limit=100)
    assert "no in-domain probe: its classes are not those of patterns" in content["datasets"]["digits"]["notes"]
    assert {line["mode"] for line in content["table"]} == {"retrained"}


def test_overlap_is_found(made, tmp_path):
    """Test images copied from the training images, one exactly, one with a few grey levels of noise."""
    folder = patterns.images(tmp_path / "images", per_class={"train": 10, "val": 5})
    shutil.copy(folder / "train/ring/0003.png", folder / "val/blob/0001.png")
    picture = np.array(Image.open(folder / "train/blob/0002.png")).astype(int)
    noisy = (picture + np.random.default_rng(0).integers(-3, 4, picture.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(folder / "val/ring/0004.png")
    write_shards(Options("folder", encoding="raw"), folder, tmp_path / "twins", jobs=1, quiet=True)
    run = patterns.make_run(tmp_path / "run", tmp_path / "twins", "smoke-resnet")
    found = {
        r["protocol"]: r["value"] for r in evaluate(run, protocols=("overlap",))["results"] if r["metric"] == "images"
    }
    assert found == {"overlap exact": 1, "overlap near": 2}


def test_a_trained_network_beats_a_random_one(tmp_path):
    """By three standard errors; labels stand in for a pretraining that would take longer."""
    data_path = patterns.make_shards(tmp_path / "images", tmp_path / "patterns", per_class={"train": 100, "val": 70})
    run = patterns.make_run(tmp_path / "run", data_path, "smoke-resnet")
    random = replace(encoder.load(str(run)), image_size=16)
    data = open_data(data_path)
    engine = engines.create("cpu", data.train, threads=1)[0]
    preset = finetune.Preset(0.3, 0.3, 12, batch=64)
    trained = finetune.train(random, data.train, data.train_ids, 5, engine, preset).backbone
    engine.close()
    header = {k: v for k, v in backbone.metadata(run).items() if k not in ("format", "num_features")}
    backbone.save(trained, run / "backbone.safetensors", header | {"image_size": "16"})
    lines = [line for line in evaluate(run, protocols=("knn", "linear"))["table"]
             if line["protocol"] in ("linear-sweep", "knn-cosine-exp k=20")]  # fmt: skip
    for line in lines:
        error = math.sqrt(sum(p * (1 - p) / line["n"] for p in (line["top1"], line["untrained"])))
        assert line["lift"] > 3 * error, line
    assert len(lines) == 3


# ------------------------------------------------------------------------------------------------------------ bad input


def shards_of(folder: Path, change) -> Path:
    """Shards of pictures whose folders `change` has touched."""
    images = patterns.images(folder / "images", per_class={"train": 6, "val": 4})
    change(images)
    write_shards(Options("folder", encoding="raw"), images, folder / "shards", jobs=1, quiet=True)
    return folder / "shards"


def only_class(name: str, split: str = "*"):
    def change(images: Path) -> None:
        for path in images.glob(f"{split}/*"):
            if path.name != name:
                shutil.rmtree(path)

    return change


def test_one_class(made, tmp_path):
    data = shards_of(tmp_path, only_class("ring"))
    with pytest.raises(UserError, match=r"one class \(ring\).*only `--protocols label-free"):
        evaluate(made[0][0], data=(data,), out=tmp_path / "out")
    content = evaluate(made[0][0], data=(data,), out=tmp_path / "out", protocols=("label-free",))
    assert {row["protocol"] for row in content["results"]} == {"rankme", "rankme centred", "alpha-req"}


def test_fewer_test_classes_small_k_and_few_queries(made, tmp_path):
    """Scores over all training classes; neighbours that the bank cannot give are left out, the others are right."""
    data = shards_of(tmp_path, only_class("ring", "val"))
    content = evaluate(made[0][0], data=(data,), out=tmp_path / "out", protocols=("knn", "linear"))
    assert "4 of 5 classes have no test image" in content["datasets"]["shards"]["notes"]
    assert "no kNN with k = 100, 200: only 30 training images" in content["datasets"]["shards"]["notes"]
    assert {line["protocol"] for line in content["table"]} == {
        "knn-cosine-exp k=10", "knn-cosine-exp k=20", "knn-euclid-invdist k=20", "linear-sweep", "linear-paper",
    }  # fmt: skip
    assert {line["n"] for line in content["table"]} == {4}
    for row in content["results"]:
        if "confusion" in row:
            assert np.array(row["confusion"]).shape == (5, 5)


def test_no_labels(made, tmp_path, monkeypatch):
    store = folder.Store
    monkeypatch.setattr(folder, "Store", lambda *a: _unlabelled(store(*a)))
    with pytest.raises(UserError, match=r"train split has no labels: only `--protocols label-free lidar`"):
        evaluate(made[0][0], out=tmp_path)
    content = evaluate(made[0][0], out=tmp_path, protocols=("label-free", "lidar"))
    assert {r["metric"] for r in content["results"]} == {"rankme", "alpha", "lidar"}


def _unlabelled(store):
    store.labels = np.full(len(store), -1)
    return store


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to evaluate: give a run directory"),
        (("RUN", "--protocols", "linaer"), "unknown protocol 'linaer'; nearest: linear"),
        (("RUN", "--data", "shards/none"), "no shards in shards/none"),
        (("RUN", "--device", "tpu"), "unknown device 'tpu'"),
        (("RUN", "--limit", "1"), "--limit 1 leaves no test image"),
        (("RUN", "--limit", "-1"), "--limit must be at least 0, not -1"),
        (
            ("RUN", "--epochs", "0", "--batch", "0"),
            "--epochs must be at least 1, not 0\n--batch must be at least 1, not 0",
        ),
        (("RUN", "RUN", "--out", "x"), "--out is the folder of one target, and these are 2"),
        (("RUN", "--limit", "4"), "kNN needs at least 10 training images, and these are 5"),
        (("timm:resnet10t.nobody", "--weights", "README.md", "--data", "DATA"), "timm:resnet10t.nobody: "),
        (("TEXT", "--data", "DATA"), "not readable as weights ("),
        (("BROKEN", "--data", "DATA"), "config.json is damaged: "),
        (("compare", "RUN/nowhere"), "nowhere: no such run"),
        (("RUN", "--data", "DATA", "DATA"), "two sets of shards are called patterns"),
        (("RUN", "--weights", "x.pth"), "--weights goes with a target timm:NAME"),
        (("timm:resnet10t", "--weights", "none.pth"), "none.pth: no such file"),
        (("RUN", "--notes", "pattern: x"), "unknown dataset 'pattern'; nearest: patterns"),
        (("RUN", "--preset", "swaw"), "unknown preset 'swaw'; nearest: swav"),
        (("compare",), "no run directories given"),
    ],
)
def test_messages(made, words, said, monkeypatch, capsys, tmp_path):
    broken = copy(made[0][0], tmp_path)
    (broken / "config.json").write_text("{")
    text = copy(made[0][0], tmp_path / "text") / "checkpoints" / "step-000000001.pt"
    text.parent.mkdir()
    text.write_text("no checkpoint")
    stands = {"RUN": str(made[0][0]), "DATA": str(made[1][0]), "TEXT": str(text), "BROKEN": str(broken)}
    words = [stands.get(w, w) for w in words]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    with pytest.raises(UserError, match=re.escape(said)):
        cli.main()


def test_unknown_flag_is_exit_2(monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "runs/x", "--protocol", "knn"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2


def test_checkpoints_of_a_run_are_compared_with_it(made, tmp_path):
    """Each has its own folder in the run's, its step in the rows, and counts as a model of the same run."""
    run = copy(made[0][0], tmp_path)
    (run / "checkpoints").mkdir()
    for step in (10, 20):
        torch.manual_seed(step)
        tensors = backbone.create("resnet10-narrow", image_size=32).state_dict()
        state = {"encoder": {f"backbone.{k}": v for k, v in tensors.items()}, "step": step}
        torch.save(state, run / "checkpoints" / f"step-{step:09d}.pt")
    for target in (run, *(run / "checkpoints").glob("*.pt")):
        evaluate(target, protocols=("knn",), limit=100)
    rows = compare.rows(compare.contents([run]))
    assert {row["step"] for row in rows if row["weights"] == "trained"} == {"0", "10", "20"}
    models = next(iter(compare.table(rows).values()))
    assert len(models) == 3 and {m[0] for m in models} == {run.name}


def test_fine_tuning_flags(made, tmp_path):
    content = evaluate(
        made[0][0], out=tmp_path, protocols=("fewshot",), finetune_epochs=1, preset="swav", finetune_bn=True
    )
    texts = {line["protocol"]: (line["norm"], line["text"]) for line in content["table"]}
    assert texts["finetune 1%"][0] == texts["finetune 10%"][0] == "bn"
    assert "swav-1%: SGD 0.02 / head 5 per 256, 1 epochs" in texts["finetune 1%"][1]
    assert "swav-10%: SGD 0.01 / head 0.2 per 256" in texts["finetune 10%"][1]
    assert "5 labels (2.500% of the training images)" in texts["finetune 1%"][1]  # one of each class, and it says so
    written = json.loads((tmp_path / "subsets" / "patterns-1pct-seed0.json").read_text())
    assert len(written["ids"]) == 5


def test_few_labels_are_among_the_images_in_use(made, tmp_path):
    """10 % of what --limit leaves, and nothing that it leaves out."""
    content = evaluate(made[0][0], out=tmp_path, protocols=("fewshot",), finetune_epochs=1, limit=100)
    texts = {line["protocol"]: line["text"] for line in content["table"]}
    assert "10 labels (10.000% of the training images)" in texts["finetune 10%"]


def test_results_on_other_images_do_not_stay(made, tmp_path, capsys):
    """A smaller --limit changes the heading's numbers: what was measured before may not stand under them."""
    run = copy(made[0][0], tmp_path)
    evaluate(run, protocols=("knn", "ridge"), data=tuple(made[1]))
    capsys.readouterr()
    content = evaluate(run, protocols=("knn",), data=(made[1][1],), limit=60)
    assert "results on other images of shifted (--limit, --seed) are dropped" in capsys.readouterr().out
    found = {
        (r["dataset"], r["protocol"].split()[0], r["n_train"]) for r in content["results"] if r["weights"] == "trained"
    }
    assert {n for d, _, n in found if d == "shifted"} == {60} and "ridge" not in {
        p for d, p, _ in found if d == "shifted"
    }
    assert {p for d, p, _ in found if d == "patterns"} == {"knn-cosine-exp", "knn-euclid-invdist", "ridge"}


def test_an_encoder_of_images_without_labels_is_measured_elsewhere(made, tmp_path, monkeypatch):
    """The pre-training data may have no labels: the target's are what counts."""
    run, store = copy(made[0][0], tmp_path), folder.Store
    monkeypatch.setattr(folder, "Store", lambda p, *a: (_unlabelled if p == made[1][0] else lambda s: s)(store(p, *a)))
    content = evaluate(run, data=(made[1][1],), protocols=("knn", "overlap", "in-domain"))
    assert {line["dataset"] for line in content["table"]} == {"shifted"}
    assert "overlap exact" in {r["protocol"] for r in content["results"]}


def test_compare_command(made, tmp_path, monkeypatch, capsys):
    for run in made[0]:
        evaluate(run, out=tmp_path / run.name, protocols=("knn",), data=tuple(made[1]))
    words = ["compare", *map(str, tmp_path.glob("smoke-*")), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    cli.main()
    assert "n = 2: too few models for a coefficient (at least 5)" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.csv").is_file() and (tmp_path / "out" / "report.html").is_file()
