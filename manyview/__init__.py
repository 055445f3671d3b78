"""Pretraining of vision encoders with many views. The folders beside this one are its parts: `manyview.pipeline`, ...

For other people's training loops (see `manyview.api` and examples/): `manyview.Views` gives batches of views,
`manyview.encode` runs a network over them, `manyview.barlow`, `vicreg`, `spectral` and `paper` are losses of (V, B, D),
`manyview.Projector` is the small head before them, and `manyview.probe` scores an encoder. They, and torch with them, are
loaded when first asked for.
"""

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded, see train.py

if TYPE_CHECKING:
    from manyview.api import Batch, Views, encode
    from manyview.evaluation.probe import probe
    from manyview.model.objective import Loss, barlow, paper, spectral, vicreg
    from manyview.model.projector import Projector
    from manyview.pipeline.errors import UserError

__all__ = ["Batch", "Loss", "Projector", "UserError", "Views"]
__all__ += ["barlow", "encode", "paper", "probe", "spectral", "vicreg"]
_HOME = dict.fromkeys(("Batch", "Views", "encode"), "manyview.api")
_HOME |= dict.fromkeys(("Loss", "barlow", "paper", "spectral", "vicreg"), "manyview.model.objective")
_HOME |= {"Projector": "manyview.model.projector", "UserError": "manyview.pipeline.errors",
          "probe": "manyview.evaluation.probe"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'manyview' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
