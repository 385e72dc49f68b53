"""Reading the weights in every decode step: from the device, or streamed from pinned host memory.

Offloaded weights cost the device two buffers of one layer. While layer l is computed from one of
them, layer l + 1 is copied into the other, on a stream of its own; the first layer of the next
step is copied while the last one of this step is computed. What is read is the largest 32-bit word
of each layer, which is known beforehand: a reader that read the wrong layer, or a copy that came
too late, shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from harness.settings import Settings

if TYPE_CHECKING:
    import torch

ALIGN_BYTES = 512
BUFFERS = 2


def layer_weight_bytes(settings: Settings) -> int:
    """Bytes of one layer's share of a rank's weights here, aligned; all layers have the same."""
    nbytes = -(-settings.model.weights_bytes // (settings.scale * settings.model.layers))
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def device_weights(settings: Settings) -> tuple[str, int]:
    """Name and bytes of what the weights take on the device (its own bytes)."""
    if settings.trial.read_weights == "offload":
        return "weights_buffers", BUFFERS * layer_weight_bytes(settings)
    return "weights", -(-settings.model.weights_bytes // settings.scale)


class WeightReader(Protocol):
    """Reads weights around the attention of each layer of a step."""

    graph_safe: bool  # whether a step can be captured in a CUDA graph
    pinned_bytes: int  # host memory that holds the weights

    def begin(self, layer: int) -> None:
        """Read this layer's weights; copy the next one's meanwhile."""

    def end(self, layer: int) -> None:
        """The layer is computed: its buffer may be overwritten."""

    def wrong_layer(self) -> int | None:
        """The first layer whose weights were not what was read in its place; None: all were."""

    def close(self) -> None:
        """Give host memory back."""


@contextmanager
def read_around(reader: WeightReader | None, layers: Sequence[int]) -> Iterator[None]:
    """Read the weights of these layers; the block is the rest of the last one's computation."""
    if reader is None or not layers:
        yield
        return
    for layer in layers[:-1]:
        reader.begin(layer)
        reader.end(layer)
    reader.begin(layers[-1])
    yield
    reader.end(layers[-1])


def make_reader(settings: Settings, weights: torch.Tensor) -> WeightReader | None:
    """The reader that ``trial.read_weights`` asks for; None for ``none``.

    Parameters
    ----------
    weights : torch.Tensor
        uint8: the allocation that :func:`device_weights` describes.
    """
    kind = settings.trial.read_weights
    if kind == "none":
        return None
    layers, nbytes = settings.model.layers, layer_weight_bytes(settings)
    if kind == "device":
        return DeviceReader(weights, layers)
    if settings.on_host:
        return HostStreamReader(weights, layers, nbytes)
    return CudaStreamReader(weights, layers, nbytes)


def _words(flat: torch.Tensor) -> torch.Tensor:
    """The bytes as int32 words."""
    import torch

    return flat[: flat.numel() // 4 * 4].view(torch.int32)


class _Reader:
    """Reads the largest word of each layer into ``seen``."""

    graph_safe = True
    pinned_bytes = 0

    def __init__(self, layers: int, device: torch.device) -> None:
        import torch

        self.layers = layers
        self.seen = torch.zeros(layers, dtype=torch.int32, device=device)

    def _read(self, words: torch.Tensor, layer: int) -> None:
        import torch

        torch.amax(words, dim=0, keepdim=True, out=self.seen[layer : layer + 1])

    def wrong_layer(self) -> int | None:
        """The first layer whose weights were not what was read in its place; None: all were."""
        return next((i for i, n in enumerate(self.seen.tolist()) if n != i + 1), None)

    def close(self) -> None:
        """Give host memory back."""


class DeviceReader(_Reader):
    """Reads the weights where they lie: each layer's share of one allocation."""

    def __init__(self, weights: torch.Tensor, layers: int) -> None:
        super().__init__(layers, weights.device)
        share = weights.numel() // layers // ALIGN_BYTES * ALIGN_BYTES
        cuts = [share * i for i in range(layers)] + [weights.numel()]
        self._parts = [_words(weights[a:b]) for a, b in pairwise(cuts)]
        for layer, part in enumerate(self._parts):
            part.fill_(layer + 1)

    def begin(self, layer: int) -> None:
        """Read this layer's weights."""
        self._read(self._parts[layer], layer)

    def end(self, layer: int) -> None:
        """Nothing: weights stay where they are."""


class CudaStreamReader(_Reader):
    """Streams the weights from pinned host memory through two buffers of one layer.

    Three orders are kept by events: a copy waits until the layer that was in its buffer is
    computed; a layer waits until its weights are copied; and both streams keep their own order.
    """

    graph_safe = False  # which buffer a layer uses may differ from step to step

    def __init__(self, weights: torch.Tensor, layers: int, layer_bytes: int) -> None:
        import torch

        super().__init__(layers, weights.device)
        words = layer_bytes // 4
        self.pinned_bytes = layers * layer_bytes
        self._host = torch.empty((layers, words), dtype=torch.int32, pin_memory=True)
        for layer in range(layers):
            self._host[layer].fill_(layer + 1)
        self._buffers = _words(weights[: BUFFERS * layer_bytes]).view(BUFFERS, words)
        self._stream: Any = torch.cuda.Stream(weights.device)
        self._copied = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._free = [torch.cuda.Event() for _ in range(BUFFERS)]
        for event in self._free:
            event.record()
        self._turn = 0
        self._copy(0, 0)

    def _copy(self, layer: int, buffer: int) -> None:
        import torch

        self._stream.wait_event(self._free[buffer])
        with torch.cuda.stream(self._stream):
            self._buffers[buffer].copy_(self._host[layer], non_blocking=True)
        self._copied[buffer].record(self._stream)

    def begin(self, layer: int) -> None:
        """Read this layer's weights; copy the next one's meanwhile."""
        import torch

        here = self._turn % BUFFERS
        self._copy((layer + 1) % self.layers, (self._turn + 1) % BUFFERS)
        torch.cuda.current_stream().wait_event(self._copied[here])
        self._read(self._buffers[here], layer)

    def end(self, layer: int) -> None:
        """The layer is computed: its buffer may be overwritten."""
        self._free[self._turn % BUFFERS].record()
        self._turn += 1

    def close(self) -> None:
        """Wait for the copies and give the pinned memory back."""
        import torch

        self._stream.synchronize()
        self._host = torch.empty(0, dtype=torch.int32)


class HostStreamReader(_Reader):
    """The same on the scale model: host memory outside its budget, copied by a thread."""

    graph_safe = False

    def __init__(self, weights: torch.Tensor, layers: int, layer_bytes: int) -> None:
        import torch

        super().__init__(layers, weights.device)
        words = layer_bytes // 4
        self.pinned_bytes = layers * layer_bytes
        self._host = torch.empty((layers, words), dtype=torch.int32)
        for layer in range(layers):
            self._host[layer].fill_(layer + 1)
        self._buffers = _words(weights[: BUFFERS * layer_bytes]).view(BUFFERS, words)
        self._threads = ThreadPoolExecutor(1)
        self._turn = 0
        self._copied: Future[Any] = self._copy(0, 0)

    def _copy(self, layer: int, buffer: int) -> Future[Any]:
        return self._threads.submit(self._buffers[buffer].copy_, self._host[layer])

    def begin(self, layer: int) -> None:
        """Read this layer's weights; copy the next one's meanwhile."""
        self._copied.result()
        self._copied = self._copy((layer + 1) % self.layers, (self._turn + 1) % BUFFERS)
        self._read(self._buffers[self._turn % BUFFERS], layer)

    def end(self, layer: int) -> None:
        """The layer is computed: its buffer may be overwritten."""
        self._turn += 1

    def close(self) -> None:
        """Wait for the last copy."""
        self._threads.shutdown(wait=True)
