"""``Trainer``: the training run, from the first step to the finished checkpoint, through interruptions and accidents.

A step whose gradient is not finite, or whose loss is far above chance, is skipped and counted; when that repeats, the
last saved state is loaded and the run goes on with other networks and batches. SIGTERM and SIGINT save the state.

Reference: Knyazev et al. 2023 (arXiv:2303.04143), section 4 and appendix (recipe).
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghn_architectures.architecture import Architecture
from ghn_client.finetune.images import ImageSet, Normalization
from ghn_service.errors import TrainingError
from ghn_service.hypernetwork.config import decode_config
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.distributed import Workers
from ghn_service.training.images import Augmentation, Batches, digest_images
from ghn_service.training.networks import (
    ArchitectureSource,
    NetworkStream,
    PreparedNetwork,
    multiply_adds,
    prepare_network,
)
from ghn_service.training.optimizers import OptimizerGroup, moving_average, rate_factor
from ghn_service.training.precision import choose_precision
from ghn_service.training.processes import on_stop_signals
from ghn_service.training.run_log import RunLog
from ghn_service.training.settings import TrainingSettings
from ghn_service.training.state import Progress, TrainingState, save_state
from ghn_service.training.step import StepOutcome, accumulate_gradients, make_recorder

logger = logging.getLogger(__name__)
_MOST_PREPARED = 20_000  # about 50 kB each


class Trainer:
    """A training run in one process of possibly several.

    State and log go to ``folder``; ``validation`` is called with the averaged hypernetwork now and then, in the main
    process.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        images: ImageSet,
        normalization: Normalization,
        source: ArchitectureSource,
        folder: Path,
        workers: Workers,
        *,
        validation: Callable[[GraphHyperNetwork], dict[str, float]] | None = None,
    ) -> None:
        self.settings, self.folder, self.workers, self.validation = settings, folder, workers, validation
        self.data = digest_images(images)
        augmentation = Augmentation(pad=settings.data.pad, flip=settings.data.flip)
        self.batches = Batches(images.to(workers.device), normalization, augmentation, settings.data.batch_size)
        self.config = decode_config(settings.hypernetwork)
        generator = torch.Generator().manual_seed(settings.seed)
        self.hypernetwork = GraphHyperNetwork(self.config, generator=generator).to(workers.device)
        self.optimizers = OptimizerGroup(self.hypernetwork, settings.optimizer)
        self.average = moving_average(self.hypernetwork, settings.optimizer)
        self.progress = Progress()
        self.earlier_pools: dict[str, int] = {}
        self.stream = NetworkStream(source, settings.sampling, seed=settings.seed)
        self.precision = choose_precision(settings.precision, workers.device)
        self.recorder = make_recorder(workers.device) if settings.limits.cuda_graphs else None
        self.stop_requested = False
        self._prepared: dict[Architecture, PreparedNetwork | None] = {}
        self._last_good = self.state()

    def state(self) -> TrainingState:
        """The present state, as a copy."""
        return TrainingState(
            self.settings.digest(),
            self.settings.model_dump(mode="json"),
            replace(self.progress, next_index=self.stream.next_index),
            copy.deepcopy(self.hypernetwork.state_dict()),
            copy.deepcopy(self.average.module.state_dict()),
            copy.deepcopy(self.optimizers.state_dicts()),
            dict(self.earlier_pools),
            self.data,
        )

    def restore(self, state: TrainingState) -> None:
        """Continues from ``state``.

        Raises:
            TrainingError: The state belongs to other settings or images.
        """
        if state.digest != self.settings.digest():
            raise TrainingError(
                "the saved state belongs to other settings; resume with the settings of its run, "
                "start in an empty folder, or begin from its weights with --start-from"
            )
        if state.data not in ("", self.data):
            raise TrainingError(
                f"the saved state was trained on other images: expected digest {state.data}, got {self.data}; "
                "resume with the data of its run, start in an empty folder, or begin from its weights with --start-from"
            )
        self.hypernetwork.load_state_dict(state.hypernetwork)
        self.average.module.load_state_dict(state.average)
        self.average.n_averaged.fill_(state.progress.step // self.settings.optimizer.ema_every)
        self.optimizers.load_state_dicts(copy.deepcopy(state.optimizers))
        self.progress = replace(state.progress)
        self.stream.next_index = state.progress.next_index
        self.earlier_pools = dict(state.earlier_pools)

    def start_from(self, tensors: dict[str, Tensor], trained_on: Mapping[str, int]) -> None:
        """Begins with the given hypernetwork weights, trained on pools of these sizes, instead of random ones.

        Where they know no places and this run does, the layer of places begins with zeros, so that all is as before.
        """
        own = self.hypernetwork.state_dict()
        added = {name: torch.zeros_like(own[name]) for name in own if name.startswith("node_encoder.place.")}
        tensors = added | tensors
        self.hypernetwork.load_state_dict(tensors)
        self.average.module.load_state_dict(tensors)
        self.earlier_pools = dict(trained_on)

    def run(self) -> Progress:
        """Trains until the end of the schedule, or until a signal asks to stop; the state is saved in both cases.

        Raises:
            TrainingError: The run keeps diverging.
        """
        limits, workers = self.settings.limits, self.workers
        window: list[tuple[StepOutcome, float]] = []
        bad_in_row, rollbacks = 0, 0
        self._last_good = self.state()
        window_since = saved_at = validated_at = time.monotonic()
        with closing(RunLog(self.folder if workers.is_main else None)) as log, on_stop_signals(self._request_stop):
            while self.done < 1.0 and not workers.any(self.stop_requested):
                started = time.monotonic()
                outcome, norm = self.step()
                bad_in_row = 0 if math.isfinite(norm) else bad_in_row + 1
                if bad_in_row >= limits.rollback_after:
                    rollbacks, bad_in_row = rollbacks + 1, 0
                    self._roll_back(log, rollbacks)
                window.append((outcome, norm))
                now = time.monotonic()
                # the same duration in all processes: the mean
                seconds = workers.sum_(torch.tensor(now - started, device=workers.device))
                self.progress.elapsed_s += seconds.item() / workers.world_size
                if self.progress.step % limits.log_every == 0:
                    self._log_window(log, window, now - window_since)
                    window, window_since = [], now
                if self._is_time(now - saved_at, limits.save_minutes) and bad_in_row == 0:
                    self._save()
                    saved_at = time.monotonic()
                if limits.validate_minutes and self._is_time(now - validated_at, limits.validate_minutes):
                    self._validate(log)
                    validated_at = time.monotonic()
            self._save()
            if self.done >= 1.0:
                self._validate(log)
        return self.progress

    @property
    def done(self) -> float:
        """Progress of the run between 0 and 1: by the clock where ``limits.minutes`` is given, else by steps."""
        limits, progress = self.settings.limits, self.progress
        if limits.minutes:
            return min(progress.elapsed_s / (60.0 * limits.minutes), 1.0)
        return min(progress.step / limits.steps, 1.0)

    def averaged(self) -> GraphHyperNetwork:
        """A copy of the hypernetwork with the averaged weights."""
        averaged = GraphHyperNetwork(self.config, generator=torch.Generator().manual_seed(0))
        averaged.load_state_dict(self.average.module.state_dict())
        return averaged.to(self.workers.device).eval()

    def step(self) -> tuple[StepOutcome, float]:
        """One step; gives what happened here and the norm of the whole gradient, NaN where it was skipped."""
        settings = self.settings
        meta_batch = settings.sampling.meta_batch
        chosen = self.stream.take(meta_batch, self.done)
        mine = self.workers.share([multiply_adds(architecture) for _, architecture in chosen])
        networks = [(slot, network) for slot in mine if (network := self._prepare(*chosen[slot]))]
        self.hypernetwork.zero_grad()
        outcome = accumulate_gradients(
            self.hypernetwork,
            networks,
            self.batches,
            settings,
            seeds=(settings.seed, self.progress.attempt, self.progress.step),
            precision=self.precision,
            recorder=self.recorder,
        )
        norm = self._update(outcome)
        self.progress.step += 1
        self.progress.networks += meta_batch
        if self.progress.step % settings.optimizer.ema_every == 0:
            self.average.update_parameters(self.hypernetwork)
        return outcome, norm

    def _prepare(self, index: int, architecture: Architecture) -> PreparedNetwork | None:
        """The network, ready to train on, kept for the next time round the pool; ``None`` where it cannot run."""
        if architecture in self._prepared:
            return self._prepared[architecture]
        network: PreparedNetwork | None = None
        number = index % self.settings.sampling.pool  # the same in every round
        try:
            network = prepare_network(number, architecture, self.config, self.workers.device)
            if (nodes := network.features.num_nodes) > (largest := self.settings.sampling.largest_nodes):
                raise TrainingError(f"its graph has {nodes} nodes; sampling.largest_nodes is {largest}")
        except TrainingError as error:
            logger.warning("network %d is left out: %s", index, error)
            network = None
        if len(self._prepared) < _MOST_PREPARED:
            self._prepared[architecture] = network
        return network

    def _update(self, outcome: StepOutcome) -> float:
        """Clips and applies the gradient of all processes; NaN where the step has to be skipped."""
        totals = self.workers.sum_(outcome.totals(self.workers.device))
        parameters = list(self.hypernetwork.parameters())
        self.workers.sum_gradients(parameters)
        whole = torch.nn.utils.clip_grad_norm_(parameters, self.settings.optimizer.clip, foreach=True)
        # the only place where a step waits for the device
        used, loss_sum, not_finite, out_of_memory, norm = torch.cat([totals, whole.to(totals).reshape(1)]).tolist()
        self.progress.skipped_networks += int(not_finite)
        self.progress.out_of_memory += int(out_of_memory)
        chance = math.log(max(self.config.num_classes, 2))
        diverging = used > 0 and loss_sum / used > self.settings.limits.divergence * chance
        if used == 0 or diverging or not math.isfinite(norm):
            self.progress.bad_steps += 1
            return math.nan
        self.optimizers.step(rate_factor(self.done, self.settings.optimizer))
        return float(norm)

    def _roll_back(self, log: RunLog, rollbacks: int) -> None:
        limits = self.settings.limits
        if rollbacks > limits.give_up_after:
            raise TrainingError(
                f"training diverged {rollbacks} times, last at step {self.progress.step}; lower the learning rate "
                "(optimizer.learning_rate) or look at the data"
            )
        before, next_index = self.progress, self.stream.next_index
        self.restore(self._last_good)
        self.stream.next_index = next_index
        self.progress.attempt = before.attempt + 1
        for counter in ("elapsed_s", "skipped_networks", "out_of_memory", "bad_steps"):
            setattr(self.progress, counter, getattr(before, counter))
        log.write("event", before.step, what="rollback", back_to=self.progress.step, rollbacks=rollbacks)

    def _log_window(self, log: RunLog, window: list[tuple[StepOutcome, float]], seconds: float) -> None:
        every = [result for outcome, _ in window for result in outcome.results]
        table = torch.stack(every).tolist() if every else []  # loss, accuracy, whether they are finite
        numbers = [(number, norm) for outcome, norm in window for number in outcome.networks]
        rows = list(zip(numbers, table, strict=True))
        if lost := [number for (number, _), (_, _, finite) in rows if not finite]:
            logger.warning("networks %s gave a loss or gradient that is not finite, and were left out", lost)
        used = [row for (_, norm), row in rows if math.isfinite(norm) and row[2]]
        losses, accuracies = [row[0] for row in used], [row[1] for row in used]
        norms = [norm for _, norm in window if math.isfinite(norm)]
        done = self.done
        log.write(
            "train",
            self.progress.step,
            loss=statistics.median(losses or [math.nan]),  # single networks may have losses of any size
            accuracy=statistics.fmean(accuracies or [math.nan]),
            gradient_norm=statistics.median(norms or [math.nan]),
            rate_factor=rate_factor(done, self.settings.optimizer),
            networks=self.progress.networks,
            networks_per_s=len(window) * self.settings.sampling.meta_batch / max(seconds, 1e-9),
            elapsed_s=self.progress.elapsed_s,
            eta_s=self.progress.elapsed_s * (1.0 - done) / max(done, 1e-9),
            skipped_networks=self.progress.skipped_networks,
            out_of_memory=self.progress.out_of_memory,
            bad_steps=self.progress.bad_steps,
        )

    def _save(self) -> None:
        self._last_good = self.state()
        if self.workers.is_main:
            save_state(self._last_good, self.folder, part_bytes=self.settings.limits.state_part_bytes)

    def _validate(self, log: RunLog) -> None:
        if self.validation and self.workers.is_main:
            started = time.monotonic()
            log.write("validation", self.progress.step, **self.validation(self.averaged()))
            logger.info("validation took %.0f s", time.monotonic() - started)

    def _is_time(self, waited_s: float, minutes: float) -> bool:
        return self.workers.any(self.workers.is_main and waited_s >= 60.0 * minutes)

    def _request_stop(self, number: int, frame: Any) -> None:
        logger.info("%s: stopping after this step", signal.Signals(number).name)
        self.stop_requested = True
