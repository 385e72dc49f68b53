"""The peers: FlashAttention-3 FP8, FlashInfer XQA and cuDNN FP8, called without their frameworks.

Each lives in the folder given by ``--peers`` (bench/README.md says how to fill it); one that cannot
be loaded is named in the results as absent, with the reason.
"""

from __future__ import annotations

import hashlib
import importlib
import lzma
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
DECODE_SPLITS = (0, 64, 128, 256)


class Peers:
    """What could be loaded, and why the rest could not."""

    def __init__(self, folder: Path | None) -> None:
        self.absent: dict[str, str] = {}
        self.modules: dict[str, Any] = {}
        self.builds: dict[str, str] = {}
        loaders = {"FA3": self._fa3, "XQA": self._xqa, "cuDNN": self._cudnn}
        for name, load in loaders.items():
            try:
                if folder is None:
                    raise RuntimeError("no --peers folder")
                if not torch.cuda.is_available():
                    raise RuntimeError("no GPU")
                self.modules[name] = load(folder)
            except Exception as reason:
                self.absent[name] = f"{type(reason).__name__}: {reason}".splitlines()[0][:160]

    @property
    def described(self) -> dict[str, str]:
        """Of each peer ``loaded``, with what tells its build apart, or why it is absent."""
        loaded = {name: f"loaded {self.builds.get(name, '')}".strip() for name in self.modules}
        return loaded | {name: f"absent: {reason}" for name, reason in self.absent.items()}

    def has(self, name: str) -> bool:
        """Whether a peer was loaded."""
        return name in self.modules

    def _fa3(self, folder: Path) -> Any:  # noqa: ANN401
        library = next(folder.glob("**/_vllm_fa3_C*.so"), None)
        if library is None:
            packed = next(folder.glob("**/fa3.so.xz"))
            library = Path(tempfile.mkdtemp()) / "_vllm_fa3_C.abi3.so"
            library.write_bytes(lzma.decompress(packed.read_bytes()))
        torch.ops.load_library(str(library))
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        self.builds["FA3"] = f"sha256 {digest[:16]}"
        return torch.ops._vllm_fa3_C

    @staticmethod
    def _site(folder: Path) -> None:
        for path in (folder / "site", folder):
            if path.is_dir() and str(path) not in sys.path:
                sys.path.insert(0, str(path))

    def _xqa(self, folder: Path) -> Any:  # noqa: ANN401
        self._site(folder)
        return importlib.import_module("flashinfer")

    def _cudnn(self, folder: Path) -> Any:  # noqa: ANN401
        self._site(folder)
        return importlib.import_module("cudnn")

    def fa3(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        causal: bool,
        splits: int,
    ) -> Call:
        """``q [tokens, heads, D]`` of equal parts a sequence; K, V ``[pages, page, heads, D]``."""
        sequences = len(lengths)
        queries = len(q) // sequences
        i32 = {"dtype": torch.int32, "device": "cuda"}
        cu_q = torch.arange(0, len(q) + 1, queries, **i32)
        one = torch.ones(sequences, k.shape[-2], device="cuda")
        used = lengths.to(torch.int32)
        longest, scale = int(lengths.max()), q.shape[-1] ** -0.5
        forward = self.modules["FA3"].fwd
        return lambda: forward(
            *(q, k, v, None, None, None, None, cu_q, None, None, None, used),
            *(queries, longest, table),
            *(None, None, None, None, None, one, one, one, scale, causal, -1, -1, 0.0, True),
            *(None, splits, None, 0, None, 1, 0, None),
        )

    def xqa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor,
            lengths: torch.Tensor) -> Call:  # fmt: skip
        """``q [sequences, heads, D]`` bf16; K, V as for FA3."""
        workspace = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
        run = self.modules["XQA"].decode.xqa_batch_decode_with_kv_cache
        longest, scale, used = int(lengths.max()), q.shape[-1] ** -0.5, lengths.to(torch.uint32)
        return lambda: run(
            q, (k, v), workspace, table, used, longest, bmm1_scale=scale, bmm2_scale=1.0
        )

    def cudnn(self, queries: int, context: int, heads: int, kv_heads: int, depth: int) -> Call:
        """Contiguous FP8 in and out, no mask: the fastest any of them goes."""
        cudnn = self.modules["cuDNN"]
        f8, f32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        handle = cudnn.create_handle()
        cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
        graph = cudnn.pygraph(
            io_data_type=f8, intermediate_data_type=f32, compute_data_type=f32, handle=handle
        )

        def random(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
            return values.to(torch.float8_e4m3fn).permute(0, 2, 1, 3)

        q = random(1, queries, heads, depth)
        k, v = (random(1, context, kv_heads, depth) for _ in range(2))
        o = torch.empty_like(q)
        tensors = {
            name: graph.tensor(name=name, dim=list(x.shape), stride=list(x.stride()), data_type=f8)
            for name, x in (("q", q), ("k", k), ("v", v))
        }
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        scales = {
            n: graph.tensor(name=n, dim=[1] * 4, stride=[1] * 4, data_type=f32) for n in names
        }
        out, _, *maxima = graph.sdpa_fp8(
            **tensors, **scales, is_inference=True, attn_scale=depth**-0.5, use_causal_mask=False
        )
        out.set_output(True).set_dim(list(o.shape)).set_stride(list(o.stride())).set_data_type(f8)
        for m in maxima:
            m.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(f32)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        one = torch.ones(1, 1, 1, 1, device="cuda")
        work = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")
        pack = {tensors["q"]: q, tensors["k"]: k, tensors["v"]: v, out: o}
        pack |= {m: one.clone() for m in maxima} | dict.fromkeys(scales.values(), one)
        return lambda: graph.execute(pack, work, handle=handle)
