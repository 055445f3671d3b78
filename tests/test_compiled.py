from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

KERNEL = """
import compiled
@compiled.njit
def double(x):
    return 2 * x
print(double(21), compiled.cached())
"""


@pytest.mark.parametrize("temporary", ["private", "open to all", "a link"])
def test_where_nothing_can_be_written_kernels_still_run(temporary, tmp_path):
    """Neither beside the code nor at home; below the temporary folder only where nobody else can put code to be run."""
    code, scratch = tmp_path / "code", tmp_path / "scratch"
    code.mkdir(), scratch.mkdir()
    shutil.copy(ROOT / "pipeline" / "compiled.py", code)
    (code / "kernel.py").write_text(KERNEL)
    (code / "__pycache__").write_text("a file where numba wants a folder")
    folder = scratch / f"manyview-{os.getuid()}"
    if temporary == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    elif temporary == "a link":
        folder.symlink_to(tmp_path)
    env = {"HOME": "/proc/none", "TMPDIR": str(scratch), "PATH": os.environ["PATH"]}
    for _ in range(2):
        done = subprocess.run([sys.executable, code / "kernel.py"], env=env, capture_output=True, text=True)
        assert done.stdout == f"42 {temporary == 'private'}\n", done.stderr
    kept = [path.name for path in folder.rglob("*.nbc")]
    assert len(kept) == (1 if temporary == "private" else 0)


def test_a_conversion_loads_neither_the_compiler_nor_torch():
    """Each of its processes would load them, and take as long for it as for a hundred photos."""
    code = "import sys, manyview.tools.shards; print([x for x in ('numba', 'torch', 'scipy') if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
