"""What an objective costs: python tools/profile.py objective --views 2,4,8,16 --dim 256,2048,8192 --json FILE

Forward and backward on random embeddings (V, B, D): ours in every form (`ours-...`), and beside them
`pairwise`   Barlow Twins (its algorithm 1) summed over pairs of views, as one would write it
`leave-one-out`   Barlow Twins of each view with the mean of the others, in a loop: the paper's authors' code
`lightly-pairs`   lightly's BarlowTwinsLoss summed over pairs of views
All of one D are taken in turn, round after round, so that a noisy neighbor hits all of them. Then, what share of a
training step the projector and the objective take with a real backbone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from manyview.bench import output
from manyview.bench.harness import Neighbours, Spent, interleaved, spent
from manyview.model import backbone, objective
from manyview.model.projector import Projector
from manyview.pipeline import engines
from manyview.pipeline.machine import tune

BETA = 1e-3  # any: it costs the same
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
CLAIMED_DIM = 2048  # where the growth from 2 to 8 views is told
SLOW_SECONDS = 8.0  # something slower is run once
SHARED = ("ours-mean", "ours-cross", "ours-vicreg", "pairwise")  # whose share of a step is told
NOTES = {
    "apart": "backward after each term: the whole graph does not fit",
    "fewer": "batch {batch}, for this machine's sake",
    "once": "run once, under the profiler",
}

OURS: dict[str, Callable[..., objective.Loss]] = {
    **{f"ours-{form}": partial(objective.barlow, beta=BETA, form=form) for form in ("mean", "cross", "pairs")},
    "ours-vicreg": objective.vicreg,
    "ours-vicreg-pooled": partial(objective.vicreg, form="pooled"),
    "ours-spectral": objective.spectral,
    "ours-paper": partial(objective.paper, beta=BETA),
}


@dataclass
class Args:
    views: str = "2,4,8,16"
    """Numbers of views V, separated by commas."""
    dim: str = "256,2048,8192"
    """Embedding dimensions D, separated by commas."""
    batch_size: int = 256
    """Images B; on a CPU fewer where B * D would pass 2^19, and the row says so."""
    rounds: int = 7
    """Rounds; what takes longer than 8 s is run once."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1
    """Threads of the CPU. With one, no thread waits for another, and core time hardly feels the neighbors."""
    backbone: str = "resnet50"
    """Backbone of the step whose share is told; `none` leaves that out."""
    sizes: str = "224,32"
    """View sides (pixels) of that step."""
    seed: int = 0
    json: Path | None = None
    """Where to write the result; its tables go into the file of the same name in .md."""


def main(argv: list[str]) -> None:
    args = output.parse(Args, argv, __doc__, "objective", batch_size=2, rounds=1, threads=1, seed=0)
    result = measure(args, argv)
    text = page(result)
    print(text)
    output.write(args.json, result, text)


def measure(args: Args, argv: list[str]) -> dict[str, Any]:
    views, dims = output.whole_numbers("--views", args.views, 2), output.whole_numbers("--dim", args.dim, 1)
    device = engines.device_of(args.device)
    torch.set_num_threads(args.threads)
    tune(device)
    neighbors = Neighbours()
    torch.manual_seed(args.seed)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for dim in dims:
        batch = args.batch_size if device.type == "cuda" else max(2, min(args.batch_size, 2**19 // dim))
        tasks = list(tasks_of(views, dim, batch, device, left_out))
        run(tasks, args.rounds, device)
        rows += [task.row() for task in tasks]
    return {
        "environment": output.environment(device, "objective", argv), "seed": args.seed,
        "clock": "ms" if device.type == "cuda" else "core_ms", "neighbors": round(neighbors.share(), 3), "rows": rows,
        "share": shares(args, dims, device) if args.backbone != "none" else [], "left_out": left_out,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- what is timed

# A form takes the views, (V, B, D) or V times (B, D), and gives the loss in one or more terms that are to be added up.
Terms = Iterable[Tensor]


def barlow_twins(a: Tensor, b: Tensor) -> Tensor:
    """Two views' Barlow Twins as its paper's algorithm 1 states it."""
    a, b = ((x - x.mean(0)) / x.std(0) for x in (a, b))
    c = a.T @ b / len(a)
    difference = (c - torch.eye(len(c), device=c.device)).square()
    off = ~torch.eye(len(c), dtype=torch.bool, device=c.device)
    return torch.where(off, BETA * difference, difference).sum()


def pairwise(loss: Callable[[Tensor, Tensor], Tensor], views: list[Tensor]) -> Iterator[Tensor]:
    return (loss(a, b) for a, b in itertools.combinations(views, 2))


def leave_one_out(views: list[Tensor]) -> Iterator[Tensor]:
    for i, view in enumerate(views):
        others = torch.stack(views[:i] + views[i + 1 :]).mean(0)
        yield barlow_twins(view, others) / len(views)


def peers(left_out: list[str]) -> dict[str, Callable[[list[Tensor]], Terms]]:
    forms: dict[str, Callable[[list[Tensor]], Terms]] = {
        "pairwise": partial(pairwise, barlow_twins), "leave-one-out": leave_one_out
    }  # fmt: skip
    try:
        from lightly.loss import BarlowTwinsLoss
    except ImportError:
        left_out.append("lightly-pairs: pip install lightly")
        return forms
    return {**forms, "lightly-pairs": partial(pairwise, BarlowTwinsLoss(lambda_param=BETA))}


@dataclass(eq=False)
class Task:
    """One form at one (V, B, D), with what was measured of it."""

    form: str
    terms: Callable[[Any], Terms]
    leaves: list[Tensor]  # one (V, B, D) for ours, V times (B, D) for the peers, which is the cheapest for each
    views: int
    dim: int
    batch: int
    at_once: bool  # one backward at the end, or one after each term, where the whole graph would not fit
    seconds: list[Spent] = field(default_factory=list)
    product_ms: float = float("inf")
    peak_bytes: int = 0
    product_flops: int | None = None  # not counted where a step is slow
    notes: list[str] = field(default_factory=list)  # keys of NOTES

    def step(self) -> None:
        """Forward and backward."""
        terms = self.terms(self.leaves[0] if len(self.leaves) == 1 else self.leaves)
        for term in [torch.stack(list(terms)).sum()] if self.at_once else terms:
            term.backward()

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def timed(self, device: torch.device) -> float:
        self.clear()
        self.seconds.append(spent(self.step, device))
        return self.seconds[-1].wall

    def row(self) -> dict[str, Any]:
        wall, core = (round(1e3 * median(values), 3) for values in zip(*((s.wall, s.core) for s in self.seconds)))
        return {
            "form": self.form, "views": self.views, "dim": self.dim, "batch": self.batch, "ms": wall, "core_ms": core,
            "product_ms": round(self.product_ms, 3), "product_flops": self.product_flops,
            "peak_bytes": self.peak_bytes, "repeats": len(self.seconds),
            "note": "; ".join(NOTES[note].format(batch=self.batch) for note in self.notes),
        }  # fmt: skip


def tasks_of(views: list[int], dim: int, batch: int, device: torch.device, left_out: list[str]) -> Iterator[Task]:
    forms: dict[str, Callable[[Any], Terms]] = {n: partial(lambda f, z: [f(z).total], f) for n, f in OURS.items()}
    others = peers(left_out)
    for v, name in itertools.product(views, [*forms, *others]):
        n_products = {"leave-one-out": v}.get(name, v * (v - 1) // 2) if name in others or name == "ours-pairs" else 1
        fits = 4 * n_products * 4 * dim**2 < free_bytes(device) / 2  # four D x D tensors each, kept for the backward
        if not fits and name not in others:
            left_out.append(f"{name} at V={v}, D={dim}: about {16 * n_products * dim**2 / 2**30:.0f} GB")
            continue
        shared = torch.randn(batch, dim, device=device)
        leaves = [shared + torch.randn(batch, dim, device=device) for _ in range(v)]
        z = [torch.stack(leaves)] if name in forms else leaves
        notes = ["apart"] * (not fits) + ["fewer"] * (batch * dim == 2**19 and dim > 2048)
        yield Task(name, {**forms, **others}[name], [x.requires_grad_() for x in z], v, dim, batch, fits, notes=notes)


def free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()  # what earlier rows have left
    return torch.cuda.mem_get_info(device)[0]


# ------------------------------------------------------------------------------------------------------------ measuring


def run(tasks: list[Task], rounds: int, device: torch.device) -> None:
    """Peak memory and time in products of every task, then rounds over all of them; slow ones take part once."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler tells of its every start otherwise
    fast = {id(task): partial(task.timed, device) for task in tasks if inspect(task, device) <= SLOW_SECONDS}
    interleaved(fast, rounds, lambda timed: timed())


def inspect(task: Task, device: torch.device) -> float:
    """Look at one step (fast ones: the best of three) under the profiler; returns its wall seconds."""
    wall = look(task, device)
    if wall > SLOW_SECONDS:
        task.notes.append("once")
        return wall
    for _ in range(2):
        look(task, device)
    with FlopCounterMode(display=False) as counter:
        task.timed(device)
    task.seconds.clear()
    task.product_flops = counter.get_total_flops()
    return wall


def look(task: Task, device: torch.device) -> float:
    cuda = device.type == "cuda"
    task.clear()  # not inside: memory that is given back would count as less than nothing
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with profile(activities=activities, profile_memory=not cuda) as profiler:
        wall = task.timed(device)
    task.peak_bytes = torch.cuda.max_memory_allocated(device) - before if cuda else peak_of(profiler)
    averages = [event for event in profiler.key_averages() if event.key in PRODUCTS]
    of_products = sum(event.device_time_total if cuda else event.self_cpu_time_total for event in averages)
    task.product_ms = min(task.product_ms, of_products / 1e3)
    return wall


def peak_of(profiler: profile) -> int:
    """Most bytes allocated at once during the run, on top of what was there before it."""
    inner: Any = profiler.profiler
    memory = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in memory), initial=0))


# ------------------------------------------------------------------------------------------------- share of a whole step


def shares(args: Args, dims: list[int], device: torch.device) -> list[dict[str, Any]]:
    """Projector's and objective's share of a training step at V = 4: forward and backward, without data or optimizer."""
    v, b, rows = 4, args.batch_size, []
    for size in output.whole_numbers("--sizes", args.sizes, 1):
        network: Any = backbone.create(args.backbone, image_size=size)
        network.to(device, memory_format=torch.channels_last)
        piece = min(v * b, 256 if device.type == "cuda" else 16)  # as many images as fit stand for all
        pixels = torch.randn(piece, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        trunk_ms = of_network(network, pixels) * v * b / piece
        for dim in sorted({dims[0], dims[-1]}):
            head = Projector(network.num_features, dim).to(device)
            head_ms = of_network(head, torch.randn(v * b, network.num_features, device=device))
            for task in (task for task in tasks_of([v], dim, b, device, []) if task.form in SHARED):
                ms = milliseconds(partial(task.timed, device), device)
                whole = trunk_ms + head_ms + ms
                rows.append({
                    "backbone": args.backbone, "size": size, "form": task.form, "views": v, "dim": dim, "batch": b,
                    "backbone_ms": round(trunk_ms, 1), "projector_ms": round(head_ms, 1), "objective_ms": round(ms, 1),
                    "projector_share": round(head_ms / whole, 5), "objective_share": round(ms / whole, 5),
                })  # fmt: skip
    return rows


def of_network(network: nn.Module, x: Tensor) -> float:
    """Milliseconds of forward and backward, on a GPU as train.py runs it: in bf16."""

    def through() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            z = network(x)
        z.float().square().mean().backward()

    return milliseconds(through, x.device)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Core time of a CPU, wall time of another device; the median of three calls after the first, if that was quick."""
    cost = lambda: getattr(spent(call, device), "wall" if device.type == "cuda" else "core")  # noqa: E731
    first = cost()
    return 1e3 * (first if first > SLOW_SECONDS else median(cost() for _ in range(3)))


# -------------------------------------------------------------------------------------------------------------- the page


def page(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    rows, clock, where = result["rows"], result["clock"], result["environment"]
    return output.document(
        "# What an objective costs",
        f"`python {where['command']}`, commit {where['commit']}, torch {where['versions']['torch']}, {where['device']}, "
        f"{where['threads']} threads, seed {result['seed']}; others used {result['neighbors']:.0%} of the cores.\n"
        "Forward and backward in fp32 on random embeddings (V views, B images, D dimensions); medians of rounds taken in "
        f"turn, of the {'wall time' if clock == 'ms' else 'time of the cores'}. In brackets: times the same form at the "
        "smallest V. `peak` is what is "
        "allocated at once on top of the embeddings, gradients included.",
        "In one process the norm of a D x D correlation of n rows is taken from its n x n twin where n < D, since "
        "|z^T z| = |z z^T|: `mean`, `paper` and `vicreg` do at every V here where B < D; `vicreg-pooled` and `spectral` "
        "(n = V B) up to V B = D, from where on they cost what the D x D product costs. `cross` needs D x D.",
        *(costs(group, clock) for group in output.by(rows, "dim").values()),
        verdicts(rows, clock),
        share_table(result["share"]),
        "Left out: " + "; ".join(result["left_out"]) + "." if result["left_out"] else "",
    )


def costs(rows: list[dict[str, Any]], clock: str) -> str:
    """The table of one D."""
    views = sorted({row["views"] for row in rows})
    body = []
    for form, group in output.by(rows, "form").items():
        cells = {v: ["-", "-"] for v in views}
        for row in group:
            mark = " *" if "run once" in row["note"] or "each term" in row["note"] else ""
            times = row[clock] / group[0][clock]
            cells[row["views"]] = [f"{row[clock]:.1f} ({times:.1f}x){mark}", f"{row['peak_bytes'] / 1e6:.0f}"]
        body.append([f"`{form}`", *itertools.chain(*cells.values())])
    head = ["form", *(cell for v in views for cell in (f"V = {v}: ms", "peak MB"))]
    notes = dict.fromkeys(note for row in rows for note in row["note"].split("; ") if note)
    title = f"## D = {rows[0]['dim']}, B = {rows[0]['batch']}"
    return "\n\n".join([title, output.table(head, body), *(["\\* " + "; ".join(notes) + "."] if notes else [])])


def verdicts(rows: list[dict[str, Any]], clock: str) -> str:
    """The claims, each with its number, at one D from V = 2 to V = 8 where those were measured."""
    at = {(row["form"], row["views"]): row for row in rows if row["dim"] == CLAIMED_DIM}
    if ("ours-mean", 2) not in at or ("ours-mean", 8) not in at:
        return ""
    grow = lambda form, key: at[form, 8][key] / at[form, 2][key]  # noqa: E731
    pair = at["pairwise", 8][clock] / at["ours-mean", 8][clock]
    claims = [
        ("`mean`: matrix product at V = 8 over V = 2", f"{grow('ours-mean', 'product_ms'):.2f}x", "at most 1.3x"),
        ("the same, multiplications counted", f"{grow('ours-mean', 'product_flops'):.2f}x", "1x"),
        ("`mean` against `pairwise` at V = 8, all of it", f"1/{pair:.0f}", "at most 1/6"),
        ("`cross` at V = 8 over V = 2", f"{grow('ours-cross', clock):.1f}x", "at most 4x (linear)"),
        ("`vicreg` at V = 8 over V = 2", f"{grow('ours-vicreg', clock):.1f}x", "at most 4x (linear)"),
        ("`pairwise` at V = 8 over V = 2", f"{grow('pairwise', clock):.1f}x", "28 pairs for 1"),
    ]
    views = sorted({v for _, v in at})
    for form in ("cross", "vicreg"):
        what = f"`{form}`, ms a view at V = {', '.join(map(str, views))}"
        measured = ", ".join(f"{at[f'ours-{form}', v][clock] / v:.1f}" for v in views)
        claims.append((what, measured, "constant, but that few views stay in cache"))
    return f"## D = {CLAIMED_DIM}, from 2 to 8 views\n\n" + output.table(("", "measured", "meant"), claims)


def share_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    parts, first = ("backbone", "projector", "objective"), rows[0]
    body = [
        [f"{r['size']} px", r["dim"], f"`{r['form']}`", *(f"{r[f'{part}_ms']:.0f}" for part in parts),
         *(f"{r[f'{part}_share']:.2%}" for part in parts[1:])]
        for r in rows
    ]  # fmt: skip
    head = ("view side", "D", "objective", "backbone ms", "projector ms", "objective ms", "projector", "objective")
    return "\n\n".join([
        f"## Share of a {first['backbone']} step, V = {first['views']}, B = {first['batch']}",
        "Forward and backward of backbone, projector (hidden width D) and objective; no data path, no optimizer.",
        output.table(head, body, left=3),
    ])  # fmt: skip
