"""Published files come in unchanged, whatever their container; files that want to run code, or are broken, do not."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ghn_service.errors import CheckpointError
from ghn_service.hypernetwork.checkpoint import load_checkpoint
from ghn_service.hypernetwork.import_checkpoint import import_checkpoint
from tests.golden_checkpoints import golden_ghn
from tests.shared_data import shared_path

NAMES = ("ghn3_seeded", "ghn2_cifar10_seeded")


def official(name: str) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict(load_file(shared_path(f"golden/{name}.safetensors")))


def declared(name: str) -> dict:
    return json.loads(shared_path(f"golden/{name}.config.json").read_text())["config"]


def joblib_dump(value: object, path: Path) -> None:
    """What joblib writes for values without numpy arrays: one plain pickle."""
    path.write_bytes(pickle.dumps(value, protocol=4))


def training_file(name: str) -> dict:
    return {
        "state_dict": official(name),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3, name="run"),
        "config": declared(name),
    }


def check_import(source: Path, name: str) -> None:
    destination = source.with_name("imported.safetensors")
    summary = import_checkpoint(source, destination)
    loaded, _ = load_checkpoint(destination)
    assert loaded.config == golden_ghn(name).config == summary.config
    torch.testing.assert_close(loaded.state_dict(), golden_ghn(name).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_joblib_dumps_of_bare_state_dicts(name, tmp_path):
    joblib_dump(official(name), tmp_path / "ghn.pt")
    check_import(tmp_path / "ghn.pt", name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_training_files(name, zipped, tmp_path):
    torch.save(training_file(name), tmp_path / "ghn.pt", _use_new_zipfile_serialization=zipped)
    check_import(tmp_path / "ghn.pt", name)


@pytest.mark.parametrize("name", NAMES)
def test_torch_files_of_bare_state_dicts(name, tmp_path):
    torch.save(official(name), tmp_path / "ghn.pt")
    check_import(tmp_path / "ghn.pt", name)


def test_node_tables_may_be_within_the_first_layer(tmp_path):
    tables = ("centrality_embed_in.weight", "centrality_embed_out.weight", "input_dist_embed.weight")
    moved = {f"gnn.0.{key}" if key in tables else key: value for key, value in official("ghn3_seeded").items()}
    joblib_dump(moved, tmp_path / "ghn.pt")
    check_import(tmp_path / "ghn.pt", "ghn3_seeded")


def test_data_parallel_prefixes_are_removed(tmp_path):
    torch.save({f"module.{key}": value for key, value in official("ghn3_seeded").items()}, tmp_path / "ghn.pt")
    check_import(tmp_path / "ghn.pt", "ghn3_seeded")


def test_decoders_may_be_matrices_or_convolutions(tmp_path):
    name = "ghn2_cifar10_seeded"
    matrices = {key: value.flatten(1) if value.dim() == 4 else value for key, value in official(name).items()}
    joblib_dump(matrices, tmp_path / "ghn.pt")
    check_import(tmp_path / "ghn.pt", name)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class HiddenInStorage:
    """The same, in the bytes that a pickled tensor keeps its values in."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        buffer = io.BytesIO()
        torch.save(Malicious(self.path), buffer)
        return torch.storage._load_from_bytes, (buffer.getvalue(),)


@pytest.mark.parametrize("payload", [Malicious, HiddenInStorage])
@pytest.mark.parametrize("container", ["joblib", "zip", "legacy"])
def test_no_pickled_code_is_run(payload, container, tmp_path):
    trap, source = tmp_path / "trap", tmp_path / "ghn.pt"
    state = {"embed.weight": torch.zeros(15, 8), "evil": payload(trap)}
    if container == "joblib":
        joblib_dump(state, source)
    else:
        torch.save(state, source, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(source, tmp_path / "out.safetensors")
    assert "weights_only" not in str(caught.value)  # torch's advice is to run it
    assert "trust" not in str(caught.value)
    assert not trap.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_pickles_cannot_change_what_they_call(tmp_path):
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    tamper = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    (tmp_path / "ghn.pt").write_bytes(tamper)
    with pytest.raises(CheckpointError):
        import_checkpoint(tmp_path / "ghn.pt", tmp_path / "out.safetensors")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


def without(*keys):
    return lambda state: [state.pop(key) for key in keys]


@pytest.mark.parametrize(
    "change",
    [
        without("gnn.0.attn.to_qkv.weight"),
        without("decoder.conv.2.weight"),
        without("gnn.1.ln1.weight"),
        without("embed.weight"),
        lambda state: state.update({"decoder.mlp.fc.0.weight": torch.zeros(1)}),
        lambda state: state.update({"embed.weight": torch.zeros(15, 8)}),
        lambda state: state.update({"embed.weight": torch.zeros(16, 32)}),
        lambda state: state.update({"embed.weight": torch.zeros(0, 32)}),
        lambda state: state.update({"ln.bias": torch.full((32,), torch.nan)}),
        lambda state: state.update({"ln.bias": torch.zeros(32, dtype=torch.int32)}),
        lambda state: state.update({"ln.bias": "text"}),
        lambda state: state.update({"ln.bias": torch.zeros(1).expand(32)}),
        lambda state: state.clear(),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(change, tmp_path):
    state = official("ghn3_seeded")
    change(state)
    joblib_dump(state, tmp_path / "ghn.pt")
    with pytest.raises(CheckpointError):
        import_checkpoint(tmp_path / "ghn.pt", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"PK\x03\x04 no zip",
        b"x\x9c compressed",
        b"\x80\x04",
        b"\x80\x04]q\x00.",
        b"\x80\x02r\xff\xff\xff\xffK\x01.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2),
    ],
    ids=["empty", "text", "zip", "zlib", "cut", "list", "memo", "length", "legacy"],
)
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "ghn.pt").write_bytes(content)
    with pytest.raises(CheckpointError):
        import_checkpoint(tmp_path / "ghn.pt", tmp_path / "out.safetensors")


def test_truncated_dumps_are_refused(tmp_path):
    joblib_dump(official("ghn2_cifar10_seeded"), tmp_path / "ghn.pt")
    data = (tmp_path / "ghn.pt").read_bytes()
    (tmp_path / "ghn.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        import_checkpoint(tmp_path / "ghn.pt", tmp_path / "out.safetensors")


def copy_golden(folder: Path, **changes: object) -> Path:
    """The seeded GHN-3 with its configuration changed."""
    shutil.copy(shared_path("golden/ghn3_seeded.safetensors"), folder / "ghn.safetensors")
    document = {"config": declared("ghn3_seeded") | changes}
    (folder / "ghn.config.json").write_text(json.dumps(document))
    return folder / "ghn.safetensors"


def test_safetensors_with_a_configuration_beside_them(tmp_path):
    check_import(copy_golden(tmp_path), "ghn3_seeded")


@pytest.mark.parametrize(
    "changes",
    [{"hid": 64}, {"layers": 5}, {"heads": 16}, {"num_classes": 10}, {"max_shape": [64, 64, 16, 16]}],
    ids=str,
)
def test_configurations_that_contradict_the_tensors_are_refused(changes, tmp_path):
    with pytest.raises(CheckpointError):
        import_checkpoint(copy_golden(tmp_path, **changes), tmp_path / "out.safetensors")


def test_options_that_tensors_do_not_tell_come_from_the_configuration(tmp_path):
    config = import_checkpoint(copy_golden(tmp_path, weight_norm=False, ve=False), tmp_path / "out.safetensors").config
    assert (config.weight_norm, config.distance_cutoff) == (False, 1)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"config": 3}'])
def test_safetensors_without_a_sound_configuration_are_refused(text, tmp_path):
    source = copy_golden(tmp_path)
    beside = tmp_path / "ghn.config.json"
    beside.unlink() if text is None else beside.write_text(text)
    with pytest.raises(CheckpointError):
        import_checkpoint(source, tmp_path / "out.safetensors")


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(CheckpointError):
        import_checkpoint(tmp_path / "absent.pt", tmp_path / "out.safetensors")
