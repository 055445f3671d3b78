"""Run the README, or the pages named: every fenced block marked `bash` is executed in order, as a newcomer would.

Blocks marked `sh` need ImageNet, a GPU or a cluster and are only printed. Used by .ci/run; not collected by pytest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    pages = sys.argv[1:] or ["README.md"]
    blocks = [
        block for page in pages for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    ]
    passed = 0
    for block in blocks:
        print("\n".join("$ " + line for line in block.splitlines()), flush=True)
        start = time.perf_counter()
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", f"PATH=$PWD/.venv/bin:$PATH\n{block}"], cwd=ROOT)
        if done.returncode:
            print(f"the page is wrong: exit code {done.returncode} after {time.perf_counter() - start:.0f} s")
            break
        passed += 1
    print(f"{' '.join(pages)}: {passed} blocks passed, {len(blocks) - passed} failed")
    return int(passed != len(blocks))


if __name__ == "__main__":
    sys.exit(main())
