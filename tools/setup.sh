#!/usr/bin/env bash
# Make .venv and install what is missing. A stamp of pyproject.toml and this file makes the second run a no-op.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.installed
sum=$(cat pyproject.toml tools/setup.sh | sha256sum)
[[ -f $stamp && $(<"$stamp") == "$sum" ]] && exit 0

say() { printf 'setup: %s\n' "$*"; }
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { say "Python >= 3.10 is needed, $python is older"; exit 1; }

# System packages: headers that ffcv compiles against, a browser for the report's test, the demo's images.
wanted=(python3-venv python3-dev g++ pkg-config libopencv-dev libturbojpeg0-dev dataset-fashion-mnist chromium)
missing=()
if command -v dpkg >/dev/null; then
  for package in "${wanted[@]}"; do
    [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == *"ok installed"* ]] || missing+=("$package")
  done
fi
if ((${#missing[@]})); then
  root=()
  [[ $EUID == 0 ]] || root=(sudo -n)
  if [[ $EUID == 0 ]] || sudo -n true 2>/dev/null; then
    say "installing system packages: ${missing[*]}"
    "${root[@]}" apt-get update -qq || say "apt-get update failed; trying with the lists that are here"
    for package in "${missing[@]}"; do # one by one: Ubuntu has no dataset-fashion-mnist, and that must not stop the rest
      "${root[@]}" env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
        say "no package $package here"
    done
  else
    say "no root: run 'sudo apt-get install ${missing[*]}'; until then there is no ffcv (its own reader is not needed), no" \
      "browser test, and the demo falls back to scikit-learn's digits"
  fi
fi

[[ -x .venv/bin/python ]] || "$python" -m venv .venv || { say "run: apt-get install python3-venv"; exit 1; }
# errors and nothing else; Python compiles what it imports, a tenth of these 290 MB
pip=(.venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check)
say "installing Python packages (about 7 GB with torch's CUDA libraries; minutes)"
"${pip[@]}" --upgrade pip setuptools wheel
"${pip[@]}" -e '.[dali,dev]'
"${pip[@]}" -e '.[dev-bucket]' # afterwards: see pyproject.toml
lost=""
if pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then
  # ffcv brings opencv-python, whose cv2 overwrites the headless one: put that one back afterwards.
  "${pip[@]}" --no-build-isolation -e '.[ffcv]' >.venv/ffcv.log 2>&1 &&
    "${pip[@]}" --force-reinstall --no-deps opencv-python-headless || lost="ffcv did not build: .venv/ffcv.log"
else
  lost="pkg-config finds no opencv4 and libturbojpeg"
fi

.venv/bin/python - <<'P'
import torch, torchvision
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"setup: torch {torch.__version__}, torchvision {torchvision.__version__}, {device}")
print("setup: engines cpu and resident: from torch, opencv and numba; formats webdataset and ffcv: read and written by this project")
P
.venv/bin/python -c 'import nvidia.dali as d; print(f"setup: engine dali: nvidia-dali {d.__version__}")' ||
  say "engine dali: missing; run: pip install nvidia-dali-cuda130 (or -cuda120 for an older driver)"
[[ -z $lost ]] && say "ffcv: the stock reader, to check .beton files against" || say "no stock ffcv ($lost): .beton files still work, its interop tests do not"
printf '%s\n' "$sum" >"$stamp"
