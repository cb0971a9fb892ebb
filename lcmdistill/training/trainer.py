"""One run, from top to bottom: `distill` sets it up and finishes it, `Trainer` goes through its steps."""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.eviction import evict_lru
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.data.loader import batch_of
from lcmdistill.data.stream import SampleStream
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import Batch
from lcmdistill.sampling.prompts import nearest_validated
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.naming import redact_paths
from lcmdistill.training.best import collapse_warning, compared_with_untrained, history, keep_best, restore_best
from lcmdistill.training.checkpoint import CheckpointWriter
from lcmdistill.training.cost_disk import check_space
from lcmdistill.training.cost_time import REFERENCES, TEACHER_OUTPUTS, TimeLeft
from lcmdistill.training.distributed import Accelerator, StopSignal, check_same_step, make_accelerator, min_free_memory
from lcmdistill.training.documents import RunDocuments
from lcmdistill.training.feed import CachedFeed, Feed, StreamFeed
from lcmdistill.training.finish import finish
from lcmdistill.training.memory.estimate import Breakdown
from lcmdistill.training.memory.plan import MemoryCheck, plan_memory
from lcmdistill.training.optimizer import learning_rate_at
from lcmdistill.training.prefetch import InOrder
from lcmdistill.training.preflight import validate_for_teacher
from lcmdistill.training.profiling import RunProfiler, make_profiler
from lcmdistill.training.run_data import record_of, sources_of
from lcmdistill.training.run_settings import check_run, finished_message, open_run, resolve_run_defaults
from lcmdistill.training.setup import build_train_step, caching_progress, open_data
from lcmdistill.training.sharding import Replicas
from lcmdistill.training.signals import Stop, catch_signals
from lcmdistill.training.summary import estimate_cost, log_summary, output_text
from lcmdistill.training.train_step import TrainStep
from lcmdistill.training.unlogged import Unlogged
from lcmdistill.training.validation import Validator
from lcmdistill.utils.checkpoint import Checkpoint, load_latest_checkpoint
from lcmdistill.utils.device import compute_dtype
from lcmdistill.utils.errors import Interrupted, RunError, UsageError
from lcmdistill.utils.logging import Progress, log_file, progress
from lcmdistill.utils.metrics_log import Metrics
from lcmdistill.utils.run_dir import checkpoints, run_lock
from lcmdistill.utils.trackers import check_tracker

logger = logging.getLogger(__name__)

SLOW_DATA = 0.05
"the share of its time that a run may wait for data without a word about it"


def distill(config: RunConfig, documents: RunDocuments) -> Path:
    """Run, or resume, a distillation to its end, and return the run folder.

    Raises:
        UsageError: The user can correct it on the command line or in the configuration.
        RunError: Something failed on the way.
        Interrupted: Ctrl-C or SIGTERM, after everything was saved.
    """
    with catch_signals() as stop:
        accelerator = make_accelerator(config)
        folder, is_main = Path(config.run.output or ""), accelerator.is_main_process
        if is_main:
            check_run(config)
        try:
            with contextlib.ExitStack() as held:
                if is_main:
                    held.enter_context(run_lock(folder))
                return _distill(config, documents, accelerator, stop, held)
        finally:
            accelerator.end_training()


def _distill(
    requested: RunConfig, documents: RunDocuments, accelerator: Accelerator, stop: Stop, held: contextlib.ExitStack
) -> Path:
    """Do what `distill` says. held: what is released at the run's end, such as its lock and its log file."""
    config, is_main, world = requested, accelerator.is_main_process, accelerator.num_processes
    folder = Path(config.run.output or "")
    if message := finished_message(config):
        if is_main:
            logger.info(message)
        return folder

    # Check everything before anything is written.
    if is_main:
        check_tracker(config.run.report_to)
        logger.info(output_text(config))
    early = "stopped before training started; re-run the same command"
    with stop.at_once(early):
        teacher = load_teacher(**asdict(config.teacher))
    config = resolve_run_defaults(config, world, teacher)
    if is_main:
        check_run(config)
    validate_for_teacher(config, teacher)
    teacher = teacher.in_run(config)
    free = min_free_memory(accelerator)
    plan = plan_memory(config, teacher, accelerator.device, free=free, world=world, loud=is_main)
    config = plan.config if plan is not None else config
    stop.check(early)
    accelerator.wait_for_everyone()
    sources = sources_of(config, teacher)
    cost = None
    if is_main:
        with stop.at_once(early):
            cost = estimate_cost(config, teacher, sources, accelerator.device, plan=plan, world=world)
        check_space(cost.items)
        open_run(config, record_of(sources, config, teacher), requested)
        held.enter_context(log_file(folder))
        log_summary(config, teacher, cost, plan, world=world)

    # Set up: data, reference images, networks.
    teacher.to(accelerator.device)
    data, own_captions = open_data(
        config, sources, teacher, accelerator, stop, cost.after_source if cost else lambda index: 0.0
    )
    validator = Validator(config, teacher, folder, own_captions.captions) if is_main else None
    if validator is not None and config.run.validate_every:
        dtype = compute_dtype(config.run.precision, accelerator.device)
        with stop.at_once(
            "stopped while the teacher generated the reference images; re-run the same command to continue"
        ):
            validator.generate_references(dtype, cost.after(REFERENCES) if cost else 0.0)
    after = cost.after(TEACHER_OUTPUTS) if cost else 0.0
    count = len(data) if isinstance(data, LatentDataset) else 0
    with caching_progress(config, count, stop, loud=is_main, after=after) as report:
        trainer = make_trainer(config, folder, accelerator, teacher, data, report)
    trainer.needed = plan and plan.needed
    trainer.left = cost.time_left(config) if cost else TimeLeft(config)
    if is_main:
        used = [*(data.folders if isinstance(data, LatentDataset) else ()), *trainer.train_step.cache_folders]
        used += validator.cache_entries(trainer.train_step.student.network) if validator is not None else []
        evict_lru(cache_root(config.data), config.data.cache_limit * 1e9, used)
    if checkpoint := load_latest_checkpoint(folder / "checkpoints", trainer.sharing.reader(trainer.train_step.groups)):
        trainer.restore(checkpoint)
        if is_main:
            logger.info(f"resuming from {checkpoint.path.name}")
    check_same_step(trainer.step, accelerator)
    if is_main and trainer.is_compiled:
        logger.info("the networks are compiled at the first step, which takes minutes; use --compile off to skip it")

    # Train.
    metrics = Metrics(folder, config.run.report_to, redact_paths(flatten(config)), trainer.step) if is_main else None
    try:
        trainer.fit(validator, metrics, stop)
        trainer.feed.log_reports()
    finally:
        trainer.writer.wait()
        if metrics is not None:
            metrics.close()

    student = trainer.sharing.product(trainer.train_step.student)
    if is_main:
        trainer.writer.close()
        with stop.at_once("stopped while the result was written; re-run the same command to write it"):
            finish(config, folder, teacher, student, trainer.step, documents, trainer.left.writing)
    accelerator.wait_for_everyone()
    return folder


def make_trainer(
    config: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    teacher: Teacher,
    data: LatentDataset | SampleStream,
    on_progress: Callable[[float], None] = lambda done: None,
) -> "Trainer":
    """Build a trainer at its first step. on_progress: as `build_train_step`."""
    is_stream = isinstance(data, SampleStream)
    built = build_train_step(config, accelerator, teacher, None if is_stream else data, on_progress)
    feed = StreamFeed(config, accelerator, teacher, data) if is_stream else CachedFeed(config, accelerator, data)
    profiler = make_profiler(config, teacher, folder, accelerator.device, is_main=accelerator.is_main_process)
    built.train_step.phase = profiler.phase
    return Trainer(
        config=config,
        folder=folder,
        accelerator=accelerator,
        feed=feed,
        train_step=built.train_step,
        order=built.order,
        is_compiled=built.is_compiled,
        profiler=profiler,
        sharing=built.sharing,
        writer=built.sharing.writer(folder / "checkpoints", config.run.keep_checkpoints),
        unlogged=Unlogged(accelerator),
        left=TimeLeft(config),
    )


@dataclass(kw_only=True)
class Trainer:
    """The steps of a run. It knows no method, only a TrainStep."""

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    feed: Feed
    train_step: TrainStep
    order: InOrder
    "how the work of a step is ordered"
    sharing: Replicas
    "how the processes share the networks"
    writer: CheckpointWriter
    profiler: RunProfiler
    unlogged: Unlogged
    "what the steps since the last log line reported"
    left: TimeLeft
    is_compiled: bool = False
    step: int = 0
    "optimizer steps done"
    needed: Breakdown | None = None
    "the memory that a step was estimated to take"
    waited: float = 0.0
    "seconds that were spent waiting for data since the last log line"

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step, over all micro-batches and processes."""
        optim = self.config.optim
        return optim.batch_size * optim.gradient_accumulation_steps * self.accelerator.num_processes

    def fit(self, validator: Validator | None, metrics: Metrics | None, stop: Stop) -> None:
        """Go through the remaining steps. validator, metrics: of the main process, None on the others."""
        config, total = self.config.run, self.config.optim.max_train_steps
        stop_signal = StopSignal(stop, self.accelerator)
        memory = MemoryCheck(self.needed if validator is not None else None, self.accelerator.device)
        with progress("distilling", total, enabled=validator is not None) as bar, self.profiler:
            bar.update(self.step)
            if self._is_due(config.validate_every):
                if self.sharing.agreed(validator is not None and validator.is_missing(self.step)):
                    began = time.monotonic()
                    self._validate(validator, metrics)
                    self.left.validation = time.monotonic() - began
                elif config.best_metric != "none":
                    weights = self.sharing.whole(self.train_step.student.weights)
                    if validator is not None:
                        restore_best(self.folder, config.best_metric, self.step, weights)
            count, since = 0, time.monotonic()
            for _, norm in self.steps():
                self.profiler.step()
                count += 1
                memory.after_step()
                bar.update(self.step)
                signal = stop_signal.signal()
                if self.step % config.log_every == 0 or self.step == total:
                    self._log(bar, metrics, norm, count, time.monotonic() - since)
                    count, since = 0, time.monotonic()
                paused = time.monotonic()
                if self.step % config.checkpoint_every == 0 or self.step == total or signal:
                    with self.profiler.phase("checkpoint"):
                        self.save()
                if signal:
                    self.writer.wait()
                    stop.signal = signal
                    stop.check(f"stopped at step {self.step}, which is saved; re-run the same command to resume")
                if self._is_due(config.validate_every):
                    with self.profiler.phase("validation"), self._saved_if_stopped(stop):
                        self._validate(validator, metrics)
                    self.left.validation = time.monotonic() - paused
                since += time.monotonic() - paused

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Take optimizer steps, and yield each one's mean loss and gradient norm, on the device."""
        accumulation = self.config.optim.gradient_accumulation_steps
        micro_batches = self.order.prepared(self.train_step, self._micro_batches())
        while self.step < self.config.optim.max_train_steps:
            report = self.train_step.take(self.step, itertools.islice(micro_batches, accumulation), self.order.run)
            loss = self.unlogged.add(report)
            self.step += 1
            yield loss, report.norm

    def save(self) -> None:
        """Start to write a checkpoint. All processes call it, and the main one writes, or each its shards."""
        self.accelerator.wait_for_everyone()
        collected = {**self.unlogged.state(), **self.feed.state(self.step)}
        if not self.train_step.is_finite():
            self._check_finite(math.nan, torch.tensor(math.nan))
        if self.sharing.writes:
            scaler = self.accelerator.scaler
            state = {"global_batch": self.global_batch, "scaler": scaler.state_dict() if scaler else {}, **collected}
            self.writer.save(self.step, self.train_step.groups(), state)
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Raises UsageError if it was trained with another global batch."""
        groups, state = checkpoint.groups, checkpoint.state
        if state["global_batch"] != self.global_batch:
            raise UsageError(
                f"{self.folder} was trained with {state['global_batch']} samples per step and this command uses "
                f"{self.global_batch} (batch size x gradient accumulation steps x processes); make them equal to resume"
            )
        self.train_step.restore(groups)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.unlogged.restore(state)
        self.feed.restore(state)

    def _micro_batches(self) -> Iterator[tuple[Rng, Batch]]:
        """Yield this process's micro-batches; the next one is read while one is computed."""
        micro_batches = self.feed.micro_batches(self.step)
        while True:
            began = time.monotonic()
            with self.profiler.phase("data"):
                rng, read = next(micro_batches, (None, None))
            self.waited += time.monotonic() - began
            if rng is None or read is None:
                return
            with self.profiler.phase("encoding"):
                samples = read()
            yield rng, batch_of(samples, rng, self.train_step.null, self.config.data.caption_drop)

    @contextlib.contextmanager
    def _saved_if_stopped(self, stop: Stop) -> Iterator[None]:
        """Let a signal stop this block at once, after the step is saved. Several processes stop after it, together."""
        if self.accelerator.num_processes > 1:
            yield
            return
        try:
            with stop.at_once(f"stopped at step {self.step}, which is saved; re-run the same command to resume"):
                yield
        except Interrupted:
            self.save()
            raise

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.optim.max_train_steps)

    def _log(self, bar: Progress, metrics: Metrics | None, norm: Tensor, count: int, seconds: float) -> None:
        """Log the steps since the last line: to metrics.jsonl, the trackers and the console."""
        total = self.config.optim.max_train_steps
        loss, numbers, by_noise = self.unlogged.means()
        self._check_finite(loss, norm)
        speed, waiting = count * self.global_batch / seconds, self.waited / seconds
        samples = self.global_batch // self.accelerator.num_processes
        if metrics is not None:
            rate = learning_rate_at(self.step - 1, self.config.optim)
            values = {"loss": loss, "grad_norm": float(norm), "learning_rate": rate, "samples_per_s": speed}
            values |= {**numbers, "data_wait": waiting, **self.profiler.metrics(count * samples)}
            metrics.log(self.step, values, loss_by_noise=by_noise)
            line = f"loss {loss:.5f}  {speed:.1f} samples/s  MFU {values['mfu']:.0%}"
            if waiting > SLOW_DATA:
                line += f"  {waiting:.0%} of the time waiting for data"
            bar.update(self.step, line, left=self.left.seconds(self.step, self.global_batch / speed))
            if not bar.visible:
                logger.info(f"step {self.step}/{total}  {line}  {bar.left_text}")
        self.unlogged.clear()
        self.waited = 0.0

    def _validate(self, validator: Validator | None, metrics: Metrics | None) -> None:
        """Validate on the main process, with which the others evaluate and gather shards."""
        student, best_metric = self.train_step.student, self.config.run.best_metric
        numbers = self.sharing.lead(student, lambda network: validator and validator.draw(self.step, network, metrics))
        weights = self.sharing.whole(student.weights) if best_metric != "none" else {}
        if validator is None or numbers is None:
            return
        comparison = compared_with_untrained(best_metric, history(self.folder, best_metric))
        logger.info(validator.describe(self.step, numbers, comparison))
        may_collapse = self.config.objective.info.may_collapse and self.step
        if may_collapse and (warning := collapse_warning(numbers, self._made_for)):
            logger.warning(warning)
        if best_metric != "none" and (warning := keep_best(self.folder, best_metric, self.step, weights)):
            logger.info(warning)

    @property
    def _made_for(self) -> int:
        """The validated number of sampling steps that is nearest to what the student is made for."""
        return nearest_validated(self.config.objective.info.steps(self.config.objective).recommended)

    def _check_finite(self, loss: float, norm: Tensor) -> None:
        # Under fp16 an infinite norm is the loss scaler's ordinary way of finding its scale.
        if math.isfinite(loss) and (self.accelerator.scaler is not None or bool(norm.isfinite())):
            return
        self.writer.wait()
        saved = checkpoints(self.folder / "checkpoints")
        last = f"the last good checkpoint, {saved[-1].name}, is kept" if saved else "no checkpoint was written yet"
        raise RunError(
            f"the loss is NaN or infinite (step {self.step}: loss {loss:g}, gradient norm {float(norm):g}); {last}; "
            "lower --learning-rate, or use --precision fp32 or bf16"
        )
