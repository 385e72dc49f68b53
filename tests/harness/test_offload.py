"""Weights that a step reads, from where they are and in their order."""

from __future__ import annotations

import pytest
import torch

from harness import offload
from harness.forecast import plan_spec
from harness.offload import (
    BUFFERS,
    CudaStreamReader,
    DeviceReader,
    HostStreamReader,
    device_weights,
    layer_weight_bytes,
    make_reader,
    read_around,
)
from harness.planner import oom_points
from harness.sizes import BadValue
from harness.validate import compose_settings

LAYERS, LAYER_BYTES = 7, 4096


def host_reader(layers=LAYERS):
    weights = torch.zeros(BUFFERS * LAYER_BYTES, dtype=torch.uint8)
    return HostStreamReader(weights, layers, LAYER_BYTES)


def steps(reader, count):
    for _ in range(count):
        for layer in range(reader.layers):
            with read_around(reader, [layer]):
                pass


@pytest.mark.parametrize("layers", [1, 2, 7, 8])
def test_every_layer_is_read_in_every_step(layers):
    reader = host_reader(layers)
    for _ in range(3):
        reader.seen.zero_()
        steps(reader, 1)
        assert reader.seen.tolist() == list(range(1, layers + 1))
        assert reader.wrong_layer() is None
    reader.close()


def test_a_layer_that_was_not_copied_shows():
    reader = host_reader()
    copy = reader._copy
    reader._copy = lambda layer, buffer: copy(0 if layer == 3 else layer, buffer)
    steps(reader, 1)
    assert reader.wrong_layer() == 3
    reader.close()


def test_weights_on_the_device_are_read_to_the_last_byte():
    weights = torch.zeros(LAYERS * 512 + 300, dtype=torch.uint8)
    reader = DeviceReader(weights, LAYERS)
    assert sum(p.numel() * 4 for p in reader._parts) == weights.numel() // 4 * 4
    steps(reader, 1)
    assert reader.wrong_layer() is None
    reader._parts[5].fill_(0)
    steps(reader, 1)
    assert reader.wrong_layer() == 5


def test_many_layers_of_weights_beside_one_of_attention():
    reader = host_reader()
    with read_around(reader, range(LAYERS)):
        assert reader.seen.tolist() == list(range(1, LAYERS + 1))
    with read_around(reader, range(0)), read_around(None, [0]):
        pass
    assert reader.wrong_layer() is None
    reader.close()


def settings_of(*words):
    return compose_settings(["hardware=scale_model", "strategy=static", "model=report", *words])


def test_offloaded_weights_leave_two_layers_on_the_device():
    kept, gone = settings_of(), settings_of("trial.read_weights=offload")
    assert device_weights(kept) == ("weights", -(-(4 << 30) // 192))
    name, nbytes = device_weights(gone)
    assert (name, nbytes) == ("weights_buffers", 2 * layer_weight_bytes(gone))
    assert 24 < device_weights(kept)[1] / layer_weight_bytes(gone) <= 48
    gained = [oom_points(plan_spec(s)).startup.ok for s in (kept, gone)]
    freed = device_weights(kept)[1] - nbytes
    chunk_tokens = kept.kv_model().groups[0].pages_per_chunk * 128
    assert abs(gained[1] - gained[0] - freed // 128) <= chunk_tokens


def test_the_reader_that_was_asked_for():
    weights = torch.zeros(1 << 20, dtype=torch.uint8)
    assert make_reader(settings_of(), weights) is None
    device = make_reader(settings_of("trial.read_weights=device"), weights)
    assert isinstance(device, DeviceReader) and device.graph_safe
    settings = settings_of("trial.read_weights=offload")
    _, nbytes = device_weights(settings)
    reader = make_reader(settings, torch.zeros(nbytes, dtype=torch.uint8))
    assert isinstance(reader, HostStreamReader) and not reader.graph_safe
    assert reader.pinned_bytes == 48 * layer_weight_bytes(settings)
    reader.close()


@pytest.mark.parametrize(
    "words",
    [
        ["trial.read_weights=sometimes"],
        ["trial.read_weights=device", "model.weights_per_rank=1MiB"],
        ["trial.read_weights=offload", "strategy=sglang"],
    ],
)
def test_what_cannot_be_read_is_refused(words):
    with pytest.raises(BadValue, match=r"trial\.read_weights"):
        settings_of(*words)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [2, 5])
def test_streamed_weights_are_the_layers_own_on_a_gpu(layers):
    layer_bytes = 64 << 20
    weights = torch.zeros(BUFFERS * layer_bytes, dtype=torch.uint8, device="cuda")
    reader = CudaStreamReader(weights, layers, layer_bytes)
    work = torch.randn(4096, 4096, device="cuda")
    for _ in range(4):
        for layer in range(layers):
            with read_around(reader, [layer]):
                work = work @ work.clamp(-1e-3, 1e-3)  # long enough for a copy to overtake
    torch.cuda.synchronize()
    assert reader.wrong_layer() is None
    # Without waiting for the layer in a buffer, its successor overwrites it.
    assert offload.BUFFERS == 2
    reader.close()
