"""Evaluate an encoder: python tools/evaluate.py runs/NAME [--data shards/a shards/b] [--protocols all]

python tools/evaluate.py runs/NAME                                    kNN, linear, ridge few-shot, label-free; report.html
python tools/evaluate.py runs/NAME/checkpoints/*.pt                   checkpoints of a run, each into its own folder
python tools/evaluate.py timm:resnet18.a1_in1k --data photos/         any weights of timm or torchvision; a folder of images
python tools/evaluate.py timm:resnet50 --weights dino.pth:teacher --data shards/x --layers last:4
python tools/evaluate.py compare runs/*                               how well one evaluation predicts another
python tools/evaluate.py compare runs/* --reference x --write all.md  encoders of any pre-training side by side, as Markdown
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py, and like there before torch is loaded
if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from manyview.evaluation.command import main
from manyview.pipeline.errors import run

if __name__ == "__main__":
    run(main)
