"""The training run: it learns, resumes bit for bit, and survives NaN, divergence, full memory and signals."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch

from ghn_service.errors import TrainingError
from ghn_service.training import step as step_module
from ghn_service.training.run_log import read_log
from ghn_service.training.state import find_state
from tests.training.small_networks import SmallArchitecture, SmallConvnet
from tests.training.training_cases import make_trainer, small_source


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.hypernetwork.state_dict().items()}


def assert_same_run(one, other):
    for first, second in (
        (one.hypernetwork.state_dict(), other.hypernetwork.state_dict()),
        (one.average.module.state_dict(), other.average.module.state_dict()),
    ):
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


def test_training_lowers_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, "limits.steps=120", "optimizer.learning_rate=3e-3", "data.batch_size=32")
    trainer.run()
    losses = [record["loss"] for record in read_log(tmp_path) if record["kind"] == "train"]
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 - 0.2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, optimizer):
    changes = ("limits.steps=8", f"optimizer.name={optimizer}", "sampling.meta_batch=2", "sampling.pool=5")
    whole = make_trainer(tmp_path / "whole", *changes)
    whole.run()
    first = make_trainer(tmp_path / "parts", *changes)
    for _ in range(3):
        first.step()
    first._save()
    second = make_trainer(tmp_path / "parts", *changes)
    second.restore(find_state(tmp_path / "parts"))
    second.run()
    assert second.progress.step == whole.progress.step == 8
    assert_same_run(whole, second)


def test_a_state_of_other_settings_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, "limits.steps=1")
    trainer.run()
    with pytest.raises(TrainingError):
        make_trainer(tmp_path, "seed=1").restore(find_state(tmp_path))


def test_a_state_of_other_images_is_refused_where_it_knows_its_own(tmp_path):
    state = make_trainer(tmp_path).state()
    other = make_trainer(tmp_path, image_seed=1)
    with pytest.raises(TrainingError):
        other.restore(state)
    other.restore(dataclasses.replace(state, data=""))
    assert other.state().data not in ("", state.data)


def test_longer_limits_may_be_given_on_resume(tmp_path):
    make_trainer(tmp_path, "limits.steps=1").run()
    longer = make_trainer(tmp_path, "limits.steps=2")
    longer.restore(find_state(tmp_path))
    assert longer.run().step == 2


@pytest.mark.parametrize(("minutes", "done"), [((), 1.0), (("limits.minutes=4",), 0.25)], ids=["steps", "clock"])
def test_the_clock_alone_counts_where_minutes_are_given(tmp_path, minutes, done):
    trainer = make_trainer(tmp_path, "limits.steps=2", *minutes)
    trainer.progress.step, trainer.progress.elapsed_s = 5, 60.0
    assert trainer.done == done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, number):
    def source(index):
        if index == 3:
            os.kill(os.getpid(), number)
        return small_source(index)

    trainer = make_trainer(tmp_path, "limits.steps=100000", source=source)
    trainer.run()
    state = find_state(tmp_path)
    assert 4 <= state.progress.step <= 5
    assert torch.equal(state.average["output_norm.weight"], trainer.average.module.state_dict()["output_norm.weight"])


class NanConvnet(SmallConvnet):
    def forward(self, images):
        return super().forward(images) * float("nan")


class NanArchitecture(SmallArchitecture):
    def build(self, *, initialize=True):
        return NanConvnet(self.width, self.depth, self.kernel, self.in_channels, self.num_classes, self.stride_at)


def nan_source(bad):
    def source(index):
        kind = NanArchitecture if bad(index) else SmallArchitecture
        return kind(index, image_size=16, num_classes=4)

    return source


def test_a_nan_step_is_skipped_and_counted(tmp_path):
    trainer = make_trainer(tmp_path, "limits.steps=3", source=nan_source(lambda index: index == 1))
    trainer.step()
    before = weights_of(trainer)
    trainer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())
    assert trainer.progress.skipped_networks == trainer.progress.bad_steps == 1
    trainer.step()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())


def test_a_nan_network_does_not_stop_the_others_of_its_meta_batch(tmp_path):
    trainer = make_trainer(tmp_path, "sampling.meta_batch=2", source=nan_source(lambda index: index == 1))
    before = weights_of(trainer)
    outcome, _ = trainer.step()
    assert [(number, bool(row[2])) for number, row in zip(outcome.networks, outcome.results, strict=True)] == [
        (0, True),
        (1, False),
    ]
    assert trainer.progress.bad_steps == 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())


def test_repeated_bad_steps_roll_back(tmp_path):
    trainer = make_trainer(
        tmp_path, "limits.steps=6", "limits.rollback_after=3", source=nan_source(lambda index: 2 <= index < 5)
    )
    trainer.run()
    events = [record for record in read_log(tmp_path) if record["kind"] == "event"]
    assert [event["what"] for event in events] == ["rollback"]
    assert trainer.progress.attempt == 1
    assert trainer.progress.skipped_networks == 3
    assert trainer.progress.step == 6


def test_endless_divergence_is_an_error(tmp_path):
    trainer = make_trainer(
        tmp_path, "limits.rollback_after=1", "limits.give_up_after=2", source=nan_source(lambda index: True)
    )
    with pytest.raises(TrainingError):
        trainer.run()


def test_a_network_without_room_in_memory_is_left_out(tmp_path, monkeypatch):
    def crowded(module, *arguments, **options):
        if crowded.calls == 1:
            crowded.calls += 1
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
        crowded.calls += 1
        return real(module, *arguments, **options)

    real, crowded.calls = step_module.measure_loss, 0
    monkeypatch.setattr(step_module, "measure_loss", crowded)
    trainer = make_trainer(tmp_path, "limits.steps=3")
    trainer.run()
    assert trainer.progress.out_of_memory == 1
    assert trainer.progress.step == 3


def test_other_errors_are_not_swallowed(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(step_module, "measure_loss", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        make_trainer(tmp_path).step()


def test_the_average_follows_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, "optimizer.ema_decay=0.0")
    trainer.step()
    for name, tensor in trainer.hypernetwork.state_dict().items():
        torch.testing.assert_close(trainer.average.module.state_dict()[name], tensor)


def test_validation_is_logged_at_the_end(tmp_path):
    trainer = make_trainer(tmp_path, "limits.steps=1")
    trainer.validation = lambda hypernetwork: {"accuracy": 0.5}
    trainer.run()
    assert [record["accuracy"] for record in read_log(tmp_path) if record["kind"] == "validation"] == [0.5]
