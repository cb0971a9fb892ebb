"""`lcmdistill distill`: build, loop, save. The loop knows no method.

A run's folder holds config.toml, metrics.jsonl, checkpoints/, samples/, README.md and pipeline/.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.batch import Batch, Models, Rng, x0_eps_network
from lcmdistill.best import advice, keep_best
from lcmdistill.checkpoint import (
    checkpoints,
    load_checkpoint,
    optimizer_tensors,
    prune,
    restore_optimizer,
    save_checkpoint,
)
from lcmdistill.config import flatten
from lcmdistill.data.cache import LatentDataset, cache_folder, left_out
from lcmdistill.data.order import SampleOrder
from lcmdistill.device import compute_dtype
from lcmdistill.errors import RunError, UsageError
from lcmdistill.evaluate.weights import perceptual_distance
from lcmdistill.export.product import write_product
from lcmdistill.interrupt import Stop, gently_stoppable
from lcmdistill.memory import Breakdown
from lcmdistill.modelcard import write_run_card
from lcmdistill.objectives import Objective
from lcmdistill.objectives.shared import place_of
from lcmdistill.optimizer import learning_rate_at, make_optimizer
from lcmdistill.plan import MemoryCheck, planned, tell
from lcmdistill.preflight import guard
from lcmdistill.preparing import prepare_all
from lcmdistill.processes import Accelerator, agreed, least_free, make_accelerator, over_processes
from lcmdistill.publish import publish_run
from lcmdistill.report import write_report
from lcmdistill.rundir import check_run, finished, mark_finished, open_run, settle
from lcmdistill.settings import RunConfig
from lcmdistill.student import Student, make_student, raw_network
from lcmdistill.teachers import load_teacher
from lcmdistill.teachers.base import Teacher
from lcmdistill.tracking import Metrics, check_tracker, progress, say
from lcmdistill.validate import Validation

NOISE_BINS = 10
"parts of the way from clean to noise that the loss is told for"


@dataclass
class Run:
    """Everything that the loop touches."""

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    teacher: Teacher
    dataset: LatentDataset
    student: Student
    online: Any
    "the student's trainable module, wrapped for the processes it runs in"
    models: Models
    optimizer: Any
    step: int = 0
    "optimiser steps done"
    unlogged: list[Tensor] = field(default_factory=list)
    "the losses since the last line of metrics"
    by_noise: Tensor = field(default_factory=lambda: torch.zeros(2, NOISE_BINS))
    "this process's samples since then, from clean to noise: sums of their losses, and how many there were"
    needed: Breakdown | None = None
    "the memory that a step was estimated to take"

    @property
    def global_batch(self) -> int:
        """Samples in one optimiser step, over all micro-batches and processes."""
        optim = self.config.optim
        return optim.batch_size * optim.accumulate * self.accelerator.num_processes


def distill(config: RunConfig) -> Path:
    """Run, or resume, a distillation to its end; returns the run's folder.

    Raises UsageError for what the user can mend, RunError for what went wrong on the way, Interrupted after Ctrl-C.
    """
    with gently_stoppable() as stop:
        accelerator = make_accelerator(config)
        try:
            folder = _distill(config, accelerator, stop)
        finally:
            accelerator.end_training()
    if config.run.push_to_hub and accelerator.is_main_process:
        publish_run(folder, config.run.push_to_hub)
    return folder


def _distill(asked: RunConfig, accelerator: Accelerator, stop: Stop) -> Path:
    config = asked
    loud = accelerator.is_main_process
    world = accelerator.num_processes
    if finished(config):
        check_run(config)
        if loud:
            say(
                f"{config.run.output} has all of the {config.optim.max_train_steps} steps asked for: nothing is left to do"
            )
        return Path(config.run.output or "")
    if loud:
        check_run(config)
        check_tracker(config.run.report_to)
    folder = Path(config.run.output or "")
    done = checkpoints(folder / "checkpoints")
    if loud:
        say(f"teacher {config.teacher.model}, objective {config.objective_name}, output {folder}")
    teacher = load_teacher(**asdict(config.teacher))
    config = settle(config, world, teacher)
    if loud:
        check_run(config)
    guard(config, teacher)
    plan = planned(config, teacher, accelerator.device, free=least_free(accelerator), world=world)
    if plan is not None:
        config = plan.config
        if loud:
            tell(plan)
    stop.check("stopped before anything was begun; the same command begins anew, or goes on where it was")
    accelerator.wait_for_everyone()
    if loud:
        # Not before: what is refused leaves no folder behind.
        data, seed = config.data, config.run.seed
        open_run(config, {spec: cache_folder(spec, data, teacher, seed).name for spec in data.sources}, asked)
    teacher.to(accelerator.device)
    folders = prepare_all(config, teacher, accelerator, stop)
    dataset = LatentDataset(folders, [config.data.count] * len(folders))
    if loud:
        for spec, report in zip(config.data.sources, dataset.reports, strict=True):
            say(f"data {spec}: {report}{left_out(spec, config.data, report, takes_prompts=not teacher.in_pixels)}")
    if not len(dataset):
        raise UsageError("the data hold nothing usable; run with --dry-run to see why")
    validation = Validation(config, teacher, folder) if loud else None
    if validation is not None and config.run.validate_every:
        at_teacher = "stopped while the teacher drew its own validation pictures; the same command goes on"
        dtype = compute_dtype(config.run.precision, accelerator.device)
        validation.see_teacher(dtype, lambda images: stop.check(at_teacher))
    run = _build(config, folder, accelerator, teacher, dataset)
    run.needed = plan and plan.needed
    if done:
        _restore(run, done[-1])
        if loud:
            say(f"resuming from {done[-1].name}")
    metrics = Metrics(folder, config.run.report_to, flatten(config), run.step) if loud else None
    try:
        _follow(run, validation, metrics, stop)
    finally:
        if metrics is not None:
            metrics.close()
    if loud and validation is not None:
        what = write_product(config, folder, teacher, run.student)
        write_run_card(config, folder, teacher)
        write_report(folder)
        mark_finished(folder, run.step)
        if better := advice(folder, config.run.best_metric):
            say(better)
        say(f"done: {what} draws in 1 to 8 steps; try: lcmdistill sample {folder} --steps 4")
    accelerator.wait_for_everyone()
    return folder


def train_steps(run: Run, objective: Objective) -> Iterator[tuple[Tensor, Tensor]]:
    """The loop: accumulate, backward, clip, step, update the target, yield (mean loss, gradient norm), on the device."""
    optim = run.config.optim
    accelerator, device = run.accelerator, run.accelerator.device
    order = SampleOrder(len(run.dataset), run.config.run.seed, run.global_batch, run.dataset.shapes)
    parameters = list(run.student.trainable.values())
    while run.step < optim.max_train_steps:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate_at(run.step, optim)
        total = torch.zeros((), device=device)
        for micro in range(optim.accumulate):
            first = (micro * accelerator.num_processes + accelerator.process_index) * optim.batch_size
            rng = Rng(run.config.run.seed, run.step, range(first, first + optim.batch_size), device)
            batch = _batch(run, order.indices(run.step, rng.places), rng)
            run.models.seed_dropout(rng)
            last = micro == optim.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(run.online):
                each = objective.loss(run.models, batch, rng)
                loss = each.mean() / optim.accumulate
                accelerator.backward(loss)
            total += loss.detach()
            t, _ = objective.pair(run.models.schedule, rng)
            run.by_noise += _binned(each.detach(), place_of(run.models.schedule, t))
        # An infinite limit clips nothing and still measures.
        norm = accelerator.clip_grad_norm_(parameters, optim.max_grad_norm or math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.student.follow(objective.mu(run.step))
        run.step += 1
        yield total, torch.as_tensor(norm)


def _batch(run: Run, indices: list[int], rng: Rng) -> Batch:
    mean, std, cond = run.dataset.read(indices)
    mean, std, cond = mean.to(rng.device), std.to(rng.device), cond.to(rng.device)
    latents = mean + std * rng.normal("posterior", mean.shape[1:])
    if run.config.data.caption_drop:
        dropped = rng.uniform("caption-drop") < run.config.data.caption_drop
        cond = cond.replace_where(dropped, run.models.null.expand(len(mean)))
    return Batch(latents, cond)


def _binned(losses: Tensor, noisiness: Tensor) -> Tensor:
    """Sums of losses, and how many, in each of NOISE_BINS, (2, NOISE_BINS). losses, noisiness: (B,)."""
    bins = torch.arange(NOISE_BINS, device=losses.device)
    member = (noisiness * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)[:, None] == bins
    return torch.stack([(member * losses[:, None]).sum(0), member.sum(0).to(losses.dtype)])


def _follow(run: Run, validation: Validation | None, metrics: Metrics | None, stop: Stop) -> None:
    """Go through the steps; log, check, validate and save at their times."""
    config, accelerator = run.config.run, run.accelerator
    total = run.config.optim.max_train_steps
    count, since = 0, time.monotonic()
    if validation is not None and _due(run.step, config.validate_every, total) and validation.is_missing(run.step):
        _validate(run, validation, metrics)
    with progress("distilling", total, enabled=validation is not None) as bar:
        bar.update(run.step)
        memory = MemoryCheck(run.needed if validation is not None else None, accelerator.device)
        for loss, norm in train_steps(run, run.config.objective):
            memory.after_step()
            run.unlogged.append(loss)
            count += 1
            bar.update(run.step)
            signalled = agreed(stop, accelerator)
            at_log = run.step % config.log_every == 0 or run.step == total
            if at_log:
                mean = float(over_processes(torch.stack(run.unlogged).mean(), accelerator).mean())
                _check_finite(mean, norm, run)
                sums, counts = over_processes(run.by_noise, accelerator).sum(0).tolist()
                speed = count * run.global_batch / (time.monotonic() - since)
                if metrics is not None:
                    rate = learning_rate_at(run.step - 1, run.config.optim)
                    values = {"loss": mean, "grad_norm": float(norm), "learning_rate": rate, "samples_per_s": speed}
                    by_noise = [a / n if n else None for a, n in zip(sums, counts, strict=True)]
                    metrics.log(run.step, values, loss_by_noise=by_noise)
                    left = timedelta(seconds=round((total - run.step) * run.global_batch / speed))
                    line = f"loss {mean:.5f}  {speed:.1f} samples/s"
                    bar.update(run.step, line)
                    if not bar.visible:
                        say(f"step {run.step}/{total}  {line}  left {left}")
                run.unlogged.clear()
                run.by_noise.zero_()
                count, since = 0, time.monotonic()
            began = time.monotonic()
            if run.step % config.checkpoint_every == 0 or run.step == total or signalled:
                _save(run)
            if signalled:
                stop.signal = signalled
                stop.check(f"stopped at step {run.step}, which is saved; the same command resumes")
            if validation is not None and _due(run.step, config.validate_every, total):
                _validate(run, validation, metrics)
            since += time.monotonic() - began


def _due(step: int, every: int, total: int) -> bool:
    return every > 0 and (step % every == 0 or step == total)


def _validate(run: Run, validation: Validation, metrics: Metrics | None) -> None:
    validation.draw(run.step, run.student.for_drawing(), metrics)
    if run.config.run.best_metric != "none":
        weights = run.student.averaged or run.student.trainable
        if worry := keep_best(run.folder, run.config.run.best_metric, run.step, weights):
            say(worry)


def _check_finite(loss: float, norm: Tensor, run: Run) -> None:
    # Under fp16 an infinite norm is the loss scaler's ordinary way of finding its scale.
    if math.isfinite(loss) and (run.accelerator.scaler is not None or bool(norm.isfinite())):
        return
    kept = checkpoints(run.folder / "checkpoints")
    last = f"the last good checkpoint, {kept[-1].name}, is kept" if kept else "no checkpoint had been written yet"
    raise RunError(
        f"the loss is no longer finite (step {run.step}: loss {loss:g}, gradient norm {float(norm):g}); {last}; "
        "lower --learning-rate, or use --precision fp32 or bf16"
    )


def _save(run: Run) -> None:
    run.accelerator.wait_for_everyone()
    by_noise = over_processes(run.by_noise, run.accelerator).sum(0).tolist()
    if run.accelerator.is_main_process:
        if not all(bool(value.isfinite().all()) for value in run.student.trainable.values()):
            _check_finite(math.nan, torch.tensor(math.nan), run)
        folder = run.folder / "checkpoints"
        scaler = run.accelerator.scaler
        groups = {
            "student": run.student.trainable,
            "target": run.student.averaged,
            "optimizer": optimizer_tensors(run.optimizer),
        }
        state = {
            "global_batch": run.global_batch,
            "scaler": scaler.state_dict() if scaler is not None else {},
            "unlogged": [loss.cpu() for loss in run.unlogged],
            "by_noise": by_noise,
        }
        save_checkpoint(folder, run.step, groups, state)
        prune(folder, run.config.run.keep_checkpoints)
    run.accelerator.wait_for_everyone()


def _restore(run: Run, path: Path) -> None:
    groups, state = load_checkpoint(path)
    if state["global_batch"] != run.global_batch:
        raise UsageError(
            f"{path.parent.parent} was trained with {state['global_batch']} samples a step and this command takes "
            f"{run.global_batch} (batch size x accumulate x processes); make them equal to resume"
        )
    _copy_into(run.student.trainable, groups["student"])
    _copy_into(run.student.averaged, groups["target"])
    run.student.refresh()
    restore_optimizer(run.optimizer, groups["optimizer"])
    if run.accelerator.scaler is not None and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]
    run.unlogged = [loss.to(run.accelerator.device) for loss in state["unlogged"]]
    if "by_noise" in state and run.accelerator.is_main_process:  # it is the sum of all processes'
        run.by_noise.copy_(torch.tensor(state["by_noise"]))


@torch.no_grad()
def _copy_into(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if parameters.keys() != saved.keys():
        raise RunError("the checkpoint's parameters are not this student's; it was written by another version")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _build(config: RunConfig, folder: Path, accelerator: Accelerator, teacher: Teacher, dataset: LatentDataset) -> Run:
    device, dtype = accelerator.device, compute_dtype(config.run.precision, accelerator.device)
    teacher.network.to(device)
    student = make_student(
        teacher,
        config.student,
        dtype=dtype,
        seed=config.run.seed,
        checkpointing=config.run.gradient_checkpointing,
        omega=config.objective.omega,
        same_dropout=config.objective.same_dropout,
    )
    optimizer = make_optimizer(config.optim, student.trainable.values(), device)
    online, optimizer = accelerator.prepare(student.online, optimizer)
    null = teacher.encode_prompts([""]).to(device)
    # From here on text encoder and VAE are needed for validation only.
    for part in teacher.pipeline.components.values():
        if isinstance(part, torch.nn.Module) and part is not teacher.network:
            part.to("cpu")
    schedule = teacher.schedule.to(device)
    of_teacher, of_student, of_target = (
        x0_eps_network(raw_network(module), schedule, teacher.prediction_type)
        for module in (student.teacher, online, student.target)
    )
    perceptual = perceptual_distance(config.objective, device)
    models = Models(schedule, of_teacher, of_student, of_target, null, perceptual, has_dropout=student.has_dropout)
    by_noise = torch.zeros(2, NOISE_BINS, device=device)
    return Run(config, folder, accelerator, teacher, dataset, student, online, models, optimizer, by_noise=by_noise)
