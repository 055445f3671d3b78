"""Pretrain a vision encoder on shards: python train.py --data shards/NAME --views 8 --fraction 0.5

One process, or the same program under torchrun. Read from top to bottom: set up, data, model, loop, export.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

# Before torch is loaded: its idle OpenMP threads spin by default, which on a CPU starves the engine's threads (and every
# neighbour's): with both at work a step took four times the CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist

from manyview.evaluation import online
from manyview.model import backbone, objective, projector
from manyview.pipeline import engines, sheet, views
from manyview.pipeline.codec import RGB
from manyview.pipeline.errors import UserError
from manyview.pipeline.errors import run as run_program
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.machine import tune
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store, flat_channels, training_split
from manyview.training import checkpoint, config, estimate, monitor, optim, plots, resume, run, setup
from manyview.training.config import Config
from manyview.training.preemption import PREEMPTED, Stop

MAX_STREAK = 10  # skipped steps in a row
ADVICE = "try a lower --lr, --precision fp32 or a longer --warmup"  # where losses or gradients are not finite


def main() -> int:
    cfg = config.parse()
    world, rank, device = start_processes(cfg)
    try:
        with Stop(device) as stop:
            return train(cfg, world, rank, device, stop)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not estimate.is_out_of_memory(error):
            raise
        raise UserError(estimate.out_of_memory(cfg, world, device)) from error
    finally:
        gc.unfreeze()
        if dist.is_initialized():
            dist.destroy_process_group()


def train(cfg: Config, world: int, rank: int, device: torch.device, stop: Stop) -> int:
    torch.manual_seed(cfg.seed)
    folder = cfg.out or Path("runs") / f"{cfg.data.name}-{cfg.objective}-v{cfg.views}-s{cfg.seed}"

    # data: order and views are pure functions of (seed, epoch, image), so nothing here has a state to save
    store = Store(cfg.data, training_split(cfg.data))
    apart = store.split != "train" and "train" in store.manifest["splits"]
    labelled = Store(cfg.data) if apart else store  # for probes
    size = cfg.size or store.default_size()
    policy = setup.policy(cfg, size, store.grey)
    order = plan(store.labels, seed=cfg.seed, batch=cfg.batch_size, fraction=cfg.fraction, order=cfg.order, world=world,
                 rank=rank)  # fmt: skip
    if order.n < cfg.batch_size:
        raise UserError(f"--batch-size {cfg.batch_size} is more than the {order.n} images there are to train on")
    engine, engine_reason = engines.create(cfg.engine, store, device, threads=cfg.threads)
    loader = Loader(store, order, policy, engine, seed=cfg.seed, prefetch=cfg.prefetch, max_bad=cfg.max_bad)
    steps = cfg.steps or order.steps(cfg.epochs)

    # model, objective, optimizer
    checkpointed = resume.newest(folder) if cfg.resume else None  # which has the weights that --init-from had once
    training = setup.create(replace(cfg, init_from=None) if checkpointed else cfg, size, device, store.layout.channels)
    model, update, optimizer = training.model, training.update, training.optimizer
    lr_at = optim.schedule(training.lr, steps, round(cfg.warmup * steps), cfg.final_lr)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(cfg.ema), use_buffers=True
    ) if cfg.ema else None  # fmt: skip

    # the plan, and all that can fail, before anything is written
    costs = estimate.trials(training, policy, device, policy.views * cfg.batch_size // world)
    network_time = monitor.duration(estimate.step_seconds(costs, cfg, policy, world) * steps)
    memory = estimate.step_memory(costs, cfg, policy, world) / 2**30
    estimate.check_memory(int(memory * 2**30), device)
    loss_text, loss_options = objective.describe(training.objective, cfg.projector_dim)
    seen = steps * cfg.batch_size
    no_color = f"; {store.layout}, so views have no step of color" if store.layout != RGB else ""
    said = [
        f"data       {store.name}{' unlabelled' * (store.split != 'train')}: {order.n:,} of {len(store):,} images, {size} px, "
        f"policy {policy.describe()}, {order.describe()}{no_color}",
        f"engine     {engine.name}: {engine_reason}",
        f"model      {cfg.backbone}, {training.weights}, on {device}, {training.precision}; batch-norm statistics "
        + ("per view" if cfg.bn == "view" else "pooled over views"),
        f"projector  {projector.describe(model.backbone, model.projector, size).removeprefix('projector ')}",
        f"objective  {cfg.objective}, {loss_text}",
        f"optimizer  {training.lr_rule}; {cfg.warmup:.0%} warm-up, cosine to {cfg.final_lr:g} of it",
        f"steps      {steps:,} of {cfg.batch_size} images x {policy.views} views = {seen / order.n:.4g} epochs, "
        f"{seen * policy.views / 1e6:.3g} M views, {world} process(es)",
        f"estimate   {network_time} and {memory:.2f} GiB a process for the network alone (from a trial on {costs[0].rows} rows)",
    ]
    if not cfg.preset and (small := config.small_defaults(cfg, size)):
        flags = " ".join(f"--{name} {value}" for name, value in small.items())
        said.append(f"defaults   {flags}, as the views are small (docs/recipes.md); elsewhere adamw, simclr, 3/D")
    said += [f"warning: {line}" for line in flat_channels(store.manifest)]
    if cfg.dry_run:
        monitor.Console(None, quiet=rank != 0).say("\n".join(said))
    run.refuse(cfg, folder)
    augment = views.overrides(cfg.augment)
    identity = {**cfg.learned(), "augment": augment, "data": store.fingerprint, "size": size, "steps": steps}
    state = resume.load(checkpointed, identity) if checkpointed else None
    start = state["step"] if state else 0
    skipped = torch.tensor(state["skipped"] if state else 0, device=device)
    if state:
        resume.restore(state, training, average)
    if cfg.dry_run:
        engine.close()
        return 0

    # run directory
    if dist.is_initialized():
        dist.barrier()  # all have looked at the directory as it was
    if rank == 0:
        settings = {
            "size": size, "out": str(folder), "steps": steps, "lr": training.lr, "dataset": store.name, "engine": engine.name,
            "device": str(device), "precision": str(training.dtype).removeprefix("torch."),
            "stem": backbone.resolve(cfg.backbone, cfg.stem, size),
            "augment": [f"{k}={json.dumps(v)}" for k, v in augment.items()], **loss_options,
        }  # fmt: skip
        run.make(cfg, folder, settings)
    log = run.Run(cfg, folder, rank, device, steps, policy.views, state)
    resumed = f", resumed at step {start}" if start else ", no checkpoint there: from the start" if cfg.resume else ""
    for line in [*said, f"run        {folder}{resumed}"]:
        log.say(line)
    if rank == 0:
        with log.aside("plots/views.png"):
            path, ids = folder / "plots" / "views.png", order.batch(0)[0][:4]
            sheet.contact_sheet(store, policy, ids, path, renders={engine.name: engine}, seed=cfg.seed)
    final: Any = average.module.backbone if average else model.backbone  # what is probed and exported
    header = {"backbone": cfg.backbone, "stem": cfg.stem, "image_size": str(size), "source": folder.name}
    header |= store.described()
    eval_every = cfg.eval_every or max(1, steps // 10)
    probe = None
    if rank == 0 and cfg.eval_every >= 0:
        with log.aside("probes"):
            probe = online.Probe(labelled, size, seed=cfg.seed)

    def save(step: int) -> bool:
        about = {"step": step, "skipped": int(skipped), "identity": identity, "header": header}
        about |= {"seconds": log.clock.seconds, "core_seconds": log.clock.core_seconds}
        states = about | resume.snapshot(training, average)
        try:
            checkpoint.save(folder / "checkpoints", states, keep_last=2, keep_every=cfg.keep_every)
        except OSError as error:
            log.say(f"warning: checkpoint of step {step} not written ({error.strerror}); the one before stays valid")
            return False
        return True

    # the loop
    model.train()
    streak = torch.zeros((), dtype=torch.int64, device=device)
    step, saved = start, False
    gc.collect()
    gc.freeze()  # nothing made so far is garbage: the collector need not look at it again
    stop.listen_to_ctrl_c()
    log.clock.start()
    for batch in loader.batches(start, steps):
        step = batch.step + 1
        for group in optimizer.param_groups:
            group["lr"] = lr_at(batch.step)
        loss, z = training.gradients([normalize(v, store.mean, store.std, torch.float32) for v in batch.views])
        bad = update(loss.total)
        if average:
            average.update_parameters(model)
        skipped += bad
        streak = (streak + bad) * bad

        last = step == steps
        if step % cfg.log_every == 0 or last:  # the one place of the loop that waits for the device
            for unreadable in gathered(loader.bad):
                loader.learn(unreadable)
            if rank == 0:
                effective_rank, spread = online.collapse(z[0])
                log.log(
                    step, loss, lr=lr_at(batch.step), rank=effective_rank, spread=spread, timings=loader.timings,
                    skipped=int(skipped), bad=len(loader.bad),
                )  # fmt: skip
                log.watch_collapse(step, effective_rank, spread, z.shape[1])
            if int(streak) >= MAX_STREAK:
                raise UserError(
                    f"{int(streak)} non-finite losses or gradients in a row at step {step}: {ADVICE}; "
                    f"the last good checkpoint is in {folder / 'checkpoints'}"
                )
        if probe and (step % eval_every == 0 or last):
            with log.aside("probes"):
                scores = probe(final, training.autocast)
                log.probed(step, scores, probe.text, probe.eigenvalues)
        stopping = stop()
        due = step % cfg.save_every == 0 and not int(streak)  # in a streak the weights may be what is wrong
        if rank == 0 and (due or last or stopping):
            saved = save(step)
        if stopping:
            break
    log.clock.stop()

    # export
    if step == steps and rank == 0:
        if int(streak):
            log.say(f"warning: the last {int(streak)} steps were skipped as not finite: {ADVICE}")
        with log.aside("plots"):
            plots.draw(folder)
        weights = folder / "backbone.safetensors"
        backbone.save(final, weights, header)
        log.say(f"trained in {monitor.duration(log.clock.seconds)}: {weights}; load it in timm:")
        log.say(backbone.timm_snippet(header, str(weights)))
    if loader.bad:
        log.say(f"{len(loader.bad)} unreadable image(s) were replaced: {', '.join(list(loader.bad.values())[:20])}")
    preempted = step < steps
    if preempted:
        place = "saved at" if saved or rank else "not saved at"
        log.say(f"stopped by a signal; {place} step {step} of {steps}. Go on with --resume")
        if dist.is_initialized():
            dist.barrier()  # launchers kill the others once one has left: not before rank 0 has saved
    engine.close()
    log.close()
    return PREEMPTED if preempted else 0


def start_processes(cfg: Config) -> tuple[int, int, torch.device]:
    """(world size, rank, device): one process, or what torchrun says in the environment."""
    wanted = engines.device_of(cfg.device).type
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device(wanted, int(os.environ.get("LOCAL_RANK", "0")) if wanted == "cuda" else None)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tune(device)
    images = cfg.batch_size
    if images % world or images < 2 * world:
        raise UserError(f"--batch-size {images} is not two images or more for each of {world} processes, all alike")
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        raise UserError(
            "torchrun --max-restarts: its store outlives a restart, after which processes wait for each other at the old"
            " addresses; put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and on several nodes use --rdzv-backend=c10d"
        )
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if wanted == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return world, rank, device


def gathered(mine: Any) -> list[Any]:
    """What each process has, by rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


if __name__ == "__main__":
    run_program(main)
