"""What exporters computed from parameters is computed again: in the shapes' terms, and in a filled file that runs."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from ghn_client.onnx.export import read_source
from ghn_client.onnx.fill import as_stored, fill_model
from ghn_client.prediction import Prediction
from ghn_client.wire.metadata import PredictionMetadata, TensorInfo, TensorUse
from ghn_service.graph.onnx.reader import read_onnx

SIDE, HEADS, CHANNELS = 3, 2, 8
AREA = SIDE * SIDE


def slow_lookup(table: torch.Tensor) -> torch.Tensor:
    """(H, w^2, w^2), position by position."""
    bias = torch.empty(table.shape[1], AREA, AREA)
    for first in range(AREA):
        for second in range(AREA):
            rows = first // SIDE - second // SIDE + SIDE - 1
            columns = first % SIDE - second % SIDE + SIDE - 1
            bias[:, first, second] = table[rows * (2 * SIDE - 1) + columns]
    return bias


def example_table() -> torch.Tensor:
    return torch.randn((2 * SIDE - 1) ** 2, HEADS, generator=torch.Generator().manual_seed(0))


def test_a_table_is_read_for_every_pair_of_positions() -> None:
    table = example_table()
    expected = slow_lookup(table)
    for shape, stored in {
        (1, HEADS, AREA, AREA): expected[None],
        (HEADS, AREA, AREA): expected,
        (AREA, AREA, HEADS): expected.permute(1, 2, 0),
        (AREA * AREA, HEADS): expected.permute(1, 2, 0).reshape(-1, HEADS),
    }.items():
        found = as_stored(table, shape)
        assert found is not None
        assert torch.equal(found, stored)


def test_a_token_is_repeated() -> None:
    token = torch.arange(4.0).reshape(1, 1, 4)
    found = as_stored(token, (3, 1, 4))
    assert found is not None
    assert torch.equal(found, token.repeat(3, 1, 1))


@pytest.mark.parametrize("shape", [(24, 2), (1, HEADS, 8, 8), (2, 25), (25, 3), (50,)])
def test_other_shapes_are_not_guessed(shape: tuple[int, ...]) -> None:
    assert as_stored(example_table(), shape) is None


class WindowAttention(nn.Module):
    """Attention of one window, as in torchvision, timm and transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.relative_position_bias_table = nn.Parameter(example_table())
        place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
        difference = (place[:, :, None] - place[:, None, :]).permute(1, 2, 0) + SIDE - 1
        self.register_buffer("relative_position_index", difference[..., 0] * (2 * SIDE - 1) + difference[..., 1])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch = tokens.shape[0]
        heads = self.qkv(tokens).reshape(batch, AREA, 3, HEADS, CHANNELS // HEADS).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(AREA, AREA, HEADS).permute(2, 0, 1).contiguous()
        logits = heads[0] @ heads[1].transpose(-2, -1) + bias.unsqueeze(0)
        return (logits.softmax(-1) @ heads[2]).transpose(1, 2).reshape(tokens.shape)


class WindowNetwork(nn.Module):
    """Two attentions over the windows of an image, then a class token beside the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 4, 4)
        self.blocks = nn.ModuleList(WindowAttention() for _ in range(2))
        self.class_token = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        return self.head(tokens.mean(1))


def default_export(module: nn.Module, example: torch.Tensor, *, dynamo: bool) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(module.eval(), (example,), dynamo=True, verbose=False)
            assert program is not None
            return program.model_proto.SerializeToString()
        buffer = io.BytesIO()
        torch.onnx.export(module.eval(), (example,), buffer, dynamo=False)
        return buffer.getvalue()


def prediction_of(values: dict[str, torch.Tensor], data: bytes) -> Prediction:
    """A prediction of these values for the file, as a server would describe it."""
    from ghn_client.wire.codec import encode_safetensors_header
    from ghn_client.wire.metadata import encode_metadata

    specs = list(read_onnx(data).parameters())
    notes = tuple(
        TensorInfo(
            spec.name,
            "predicted",
            initializer=spec.initializer,
            torch_name=spec.torch_name,
            permutation=spec.permutation,
            uses=tuple(TensorUse(use.node, use.input_index) for use in spec.uses),
        )
        for spec in specs
    )
    tensors = {
        spec.name: values[spec.torch_name].permute(tuple(np.argsort(spec.permutation)))
        if spec.permutation
        else values[spec.torch_name]
        for spec in specs
    }
    metadata = PredictionMetadata(model="m", model_digest="d", graph_digest="g", seed=0, dtype="float32", tensors=notes)
    entries = {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    body = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors.values())
    buffer = bytearray(encode_safetensors_header(entries, encode_metadata(metadata)) + body)
    return Prediction.from_buffer(buffer)


@pytest.mark.parametrize("zero_tables", [False, True])
@pytest.mark.parametrize("dynamo", [True, False])
def test_default_exports_are_loaded_and_filled_exactly(dynamo: bool, zero_tables: bool) -> None:
    torch.manual_seed(0)
    module, example = WindowNetwork(), torch.randn(2, 3, 4 * SIDE, 4 * SIDE)
    if zero_tables:  # equal tables, which the exporter merges
        for block in module.blocks:
            nn.init.zeros_(block.relative_position_bias_table)
    data = default_export(module, example, dynamo=dynamo)
    trained = {name: torch.randn_like(value) for name, value in module.named_parameters()}
    prediction = prediction_of(trained, data)

    loaded = WindowNetwork().eval()
    assert prediction.load_into(loaded).is_complete
    assert all(torch.equal(value, trained[name]) for name, value in loaded.named_parameters())

    filled = fill_model(prediction, read_source(data))
    onnx.checker.check_model(filled)
    session = onnxruntime.InferenceSession(filled.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    np.testing.assert_allclose(found, loaded(example).detach().numpy(), rtol=1e-4, atol=1e-4)
