#!/usr/bin/env bash
# The comparisons and ceilings that any machine can measure, into results/ (studies and evaluations: results/README.md). On 2 cores about two hours; nothing else should run meanwhile.
# PHOTOS: a folder of class folders of photos (default: what is in shards/photos). SMALL: shards of small images.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[[ -n ${PHOTOS:-} ]] && $python tools/shards.py write --dataset folder --source "$PHOTOS" --out shards/photos
$python -m pip install -q -e ".[bench]"
small=${SMALL:-shards/cifar10}
for data in shards/photos "$small"; do
  [[ -f $data/manifest.json ]] || { echo "no shards at $data: make bench PHOTOS=/folder/of/photos SMALL=shards/cifar10"; exit 2; }
done
[[ -n ${PHOTOS:-} ]] && $python tools/profile.py shards --source "$PHOTOS"
$python tools/profile.py peers --data shards/photos --small "$small" --views 1,2,4,8,16 --json results/pipeline.json
$python tools/profile.py objective --views 2,4,8,16 --dim 256,2048,8192 --json results/objective.json
$python tools/profile.py trainer --data "$small"
$python tools/profile.py plan
