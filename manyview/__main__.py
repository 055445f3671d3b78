"""The one console command: `manyview NAME ...` is `python tools/NAME.py ...`, and `manyview train` is `python train.py`."""

import importlib
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded, see train.py

from manyview.pipeline.errors import UserError, nearest, run

COMMANDS = {
    "train": "pretrain an encoder on shards",
    "shards": "write, verify, list, index and import shards",
    "views": "draw a contact sheet of views",
    "evaluate": "kNN, linear and other protocols for an encoder",
    "embed": "features of any images into one file",
    "export": "a run's backbone for timm, the hub, torchvision or ONNX",
    "profile": "measure: the bottleneck, speed beside peers, memory",
    "runs": "all runs side by side: a table, and one page",
    "ladder": "accuracy for every core-second, ours and others'",
    "gpu": "a quarter of an hour on a GPU, planned",
    "sweep": "a grid of training runs",
    "report": "the page about the paper's claims",
    "submit": "train on SLURM",
    "doctor": "what there is on this machine, and what is lost without the rest",
}


def command() -> int | None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: manyview NAME --help, with NAME one of\n")
        print("\n".join(f"  {name:<10} {about}" for name, about in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        raise UserError(nearest("command", name, COMMANDS))
    sys.argv[:2] = [f"manyview {name}"]
    return importlib.import_module("manyview.train" if name == "train" else f"manyview.tools.{name}").main()


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
