#!/usr/bin/env bash
# The whole road on real images in minutes: shards -> train.py -> evaluate.py -> report.html. Usage: demo.sh [SOURCE]
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
source=${1:-}
data=shards/fashion-mnist
write=("$python" tools/shards.py write --dataset fashion-mnist --out "$data")
if [[ -n $source ]]; then
  "${write[@]}" --source "$source"
elif "${write[@]}" || { code=$?; ((code != 2)) && exit $code; false; }; then
  : # written, or there already
else # exit code 2: it cannot be had; anything else is a fault of ours and stops the demo
  printf '\n*** Fashion-MNIST cannot be had here: the demo goes on with the 1797 digits of scikit-learn. ***\n\n'
  data=shards/digits
  "$python" tools/shards.py write --dataset digits --out "$data"
fi
"$python" train.py --preset presets/demo.yaml --data "$data" --out runs/demo --overwrite
"$python" tools/evaluate.py runs/demo --limit 4000
echo
echo "Open runs/demo/report.html. Weights: runs/demo/backbone.safetensors"
