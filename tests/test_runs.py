"""The page and the table of all runs, the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pictures import pixels
from PIL import Image

from manyview.pipeline.errors import UserError
from manyview.tools import runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make(folder: Path, *, steps: int = 40, top1: float | None = None, **config) -> Path:
    """A run directory with the files that train.py and evaluate.py leave."""
    (folder / "plots").mkdir(parents=True)
    settings = {
        "dataset": "digits",
        "views": 4,
        "objective": "barlow",
        "seed": 0,
        "steps": 40,
        "augment": [],
        "out": str(folder),
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    (folder / "env.json").write_text(json.dumps({"command": "train.py --data <x>", "commit": "abc", "device": "a CPU"}))
    rows = []
    for step in range(10, steps + 1, 10):
        so_far = {
            "step": step,
            "images": 64 * step,
            "views": 256 * step,
            "seconds": 36.0 * step,
            "core_seconds": 72.0 * step,
        }
        rows.append(
            so_far
            | {"loss": 100 / step, "rank": 9.5, "views_per_s": 100.0 * step, "data_wait": 0.01, "skipped": 0, "bad": 0}
        )
        rows.append(so_far | {"knn": step / 50, "linear": step / 60})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5')
    Image.fromarray(pixels(1, 60, 90)).save(folder / "plots/views.png")
    if top1 is not None:
        row = {
            "protocol": "knn-cosine-exp k=20",
            "norm": "l2",
            "text": "cosine",
            "low": top1 - 0.02,
            "high": top1 + 0.02,
        }
        other, own = row | {"dataset": "aaa", "top1": 0.1}, row | {"dataset": "digits", "top1": top1}
        (folder / "eval.json").write_text(json.dumps({"table": [other, own]}))
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make(root / "small", top1=0.71, views=2)
    make(root / "large", top1=0.9, views=16, beta=1e-5)
    make(root / "short & <b>", steps=20, views=8)
    return root


def test_the_terminals_table(three):
    lines = runs.table(runs.find([three])).splitlines()
    assert lines[0].split() == ["run", "views", "beta", "M", "views", "core-h", "views/s", "kNN", "linear", "verdict"]
    assert lines[1].split() == ["large", "16", "1e-05", "0.0102", "0.8", "3,000", "90.0", "-", "finished"]
    assert lines[2].split()[:3] == ["short", "&", "<b>"] and lines[2].endswith("-       -  at step 20 of 40")
    assert lines[3].split()[6:] == ["71.0", "-", "finished"]


def test_one_run_has_no_differences_and_names_are_told_apart(three, tmp_path):
    (only,) = runs.find([three / "large"])
    assert runs.differences([only]) == []
    make(tmp_path / "a" / "run")
    make(tmp_path / "b" / "run")
    assert [run.name for run in runs.find([tmp_path])] == ["a/run", "b/run"]
    for wrong, message in ((tmp_path / "none", "is no folder"), (tmp_path / "a/run/plots", "no runs in")):
        with pytest.raises(UserError, match=message):
            runs.find([wrong])
    (tmp_path / "a/run/eval.json").write_text("[]")
    with pytest.raises(UserError, match=r"eval\.json is damaged"):
        runs.find([tmp_path])


@pytest.mark.parametrize(("change", "verdict"), [
    ({"rank": 1.2}, ("bad", "collapsed: rank 1.2")), ({"rank": float("nan")}, ("bad", "diverged: embeddings are not finite")),
    ({"skipped": 7}, ("fair", "7 steps skipped as not finite")), ({"bad": 3}, ("fair", "3 unreadable images")),
    ({"data_wait": 0.9}, ("fair", "waited for data 23% of the time")),
])  # fmt: skip
def test_verdicts(tmp_path, change, verdict):
    file = make(tmp_path / "run") / "metrics.jsonl"
    lines = file.read_text().splitlines()
    last = json.loads(lines[-3]) | change
    file.write_text("\n".join([*lines[:-3], json.dumps(last), *lines[-2:]]))
    (run,) = runs.find([tmp_path])
    assert run.verdict == sorted([verdict, ("good", "finished")], key=lambda one: ("bad", "fair", "good").index(one[0]))


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path):
    run = runs.read(make(tmp_path / "run"))
    for count in (1, 299, 301, 1000, 6001):
        run.steps = [{"views": i, "seconds": 0.0, "core_seconds": 0.0, "loss": float(i)} for i in range(count)]
        points = runs.curves(run)["loss"]
        assert points[0][0] == 0 and points[-1][0] == count - 1 and len(points) <= runs.POINTS + 1


def browse(page: str, folder: Path, script: str) -> dict:
    """What a script, run in the opened page, leaves in the title, as JSON; all network access goes to a closed port."""
    copied = folder / "page.html"
    copied.write_text(page.replace("</body>", f"<script>addEventListener('load', () => {{{script}}})</script></body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=5000",
             f"--user-data-dir={folder}/profile", "--proxy-server=127.0.0.1:9", "--dump-dom", f"file://{copied}"]  # fmt: skip
    dom = subprocess.run([str(CHROMIUM), *words], capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", dom, re.S)
    assert title, dom[:500]
    return json.loads(title[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page in")
def test_the_page_in_a_browser(three, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["runs.py", str(three), "--out", str(tmp_path / "all.html")])
    assert runs.main() == 0 and "all.html: 3 runs" in capsys.readouterr().out
    page = (tmp_path / "all.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", page)
    said = browse(page, tmp_path, """
      const names = () => all("#runs tbody tr").filter(r => !r.hidden).map(r => r.cells[0].textContent.trim());
      const click = text => [...heads].find(h => h.textContent.split(",")[0] === text).click();
      const box = document.getElementById("filter");
      const type = text => { box.value = text; box.dispatchEvent(new Event("input")); return names() };
      const drawn = () => chart.querySelectorAll("path").length, result = {};
      result.first = names(); result.curves = drawn();
      click("kNN"); result.best = names(); click("kNN"); result.worst = names();
      click("views"); result.views = names(); click("run"); result.run = names();
      result.word = type("LARGE"); result.left = drawn(); result.rule = type("views>2 barlow"); result.none = type("views>99");
      result.cards = all(".card").filter(c => !c.hidden).length; type("");
      rows[0].click(); result.hidden = drawn(); rows[0].click();
      what.value = "loss"; what.dispatchEvent(new Event("change")); result.loss = chart.textContent.includes("10");
      result.bold = all(".best").map(c => c.closest("tr").cells[0].textContent.trim());
      result.pictures = [...document.images].filter(i => i.complete && i.naturalWidth > 50).length;
      result.asked = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
      document.title = JSON.stringify(result);
    """)  # fmt: skip
    small, large, short = "small", "large", "short & <b>"
    assert said["first"] == [large, short, small] and said["curves"] == 3
    assert said["best"] == [large, small, short] and said["worst"] == [
        small,
        large,
        short,
    ]  # what has no score comes last
    assert said["views"] == [large, short, small] and said["run"] == [large, short, small]
    assert said["word"] == [large] and said["left"] == 1 and said["rule"] == [large, short]
    assert said["none"] == [] and said["cards"] == 0 and said["hidden"] == 2
    assert said["bold"] == [large] and said["loss"] and said["pictures"] == 3 and said["asked"] == 0
