"""The host path and the float64 reference, on the layout that the GPU kernels read."""

from __future__ import annotations

import pytest
import torch

from kernels import host, reference
from kernels.view import Geometry
from tests.kernels.cases import empty_view, lse_error, random_case, random_q, relative_rms

GEOMETRIES = [
    Geometry(1, 1, 4, 64),
    Geometry(2, 2, 10, 128),
    Geometry(1, 1, 16, 256),
    Geometry(2, 2, 2, 64, "bf16"),
    Geometry(1, 3, 6, 128, page_tokens=16),
]
LENGTHS = [1, 127, 128, 129, 700]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 256 tokens, so that short sequences cross several."""
    monkeypatch.setattr("kernels.host_pages.BlockReader.__init__.__defaults__", (256,))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gather_reads_what_the_layout_says(geometry):
    case = random_case(geometry, LENGTHS)
    layer, head = geometry.layers - 1, geometry.kv_heads - 1
    k, v = reference.gather(case.view, layer, head, 4, 130, 514)
    assert torch.equal(k, case.k[layer][4][130:514, head])
    assert torch.equal(v, case.v[layer][4][130:514, head])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("starts", [(), (0, 5, 127, 128, 400)], ids=["full", "window"])
def test_decode_matches_float64(geometry, starts):
    case = random_case(geometry, LENGTHS, starts=starts)
    q = random_q(geometry, len(LENGTHS))
    plan = host.plan_decode(case.view)
    for layer in range(geometry.layers):
        out, lse = host.decode(case.view, layer, q, plan, q_scale=0.5, sm_scale=0.3)
        want, want_lse = case.expected_decode(layer, q, 0.3, q_scale=0.5)
        assert relative_rms(out, want) < 1e-5
        assert lse_error(lse, want_lse) < 1e-4


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 200), (641, 59), (500, 130)])
def test_prefill_matches_float64(geometry, start, tokens):
    case = random_case(geometry, [3, 700])
    q = random_q(geometry, tokens)
    plan = host.plan_prefill(case.view, 1, start, tokens)
    out, lse = host.prefill(case.view, 0, q, plan)
    want, want_lse = reference.attention(
        q.double(), case.k[0][1], case.v[0][1], geometry.head_dim**-0.5, causal_from=start
    )
    assert out.dtype == torch.bfloat16
    assert relative_rms(out, want) < 3e-3  # bf16 rounds by 2**-9
    assert lse_error(lse, want_lse) < 1e-4


def test_empty_sequence_sees_nothing():
    case = random_case(GEOMETRIES[0], [0, 5])
    out, lse = host.decode(case.view, 0, random_q(GEOMETRIES[0], 2), host.plan_decode(case.view))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))
    assert out[1].isfinite().all()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_appended_tokens_are_read_back(geometry):
    view = empty_view(geometry, [700, 300])
    layer = geometry.layers - 1
    values = torch.randn(2, 700, geometry.kv_heads, geometry.head_dim) * 3
    host.append_run(view, layer, values[0, :201], values[1, :201], 0, 0)
    host.append_run(view, layer, values[0, 201:699], values[1, 201:699], 0, 201)
    host.append(
        view, layer, values[0, [699, 5]], values[1, [699, 5]],
        torch.tensor([0, 1], dtype=torch.int32), torch.tensor([699, 42]),
    )  # fmt: skip
    for head in range(geometry.kv_heads):
        k, v = reference.gather(view, layer, head, 0, 0, 700)
        for found, kv, scale in ((k, 0, view.k_scale), (v, 1, view.v_scale)):
            codes = reference.quantise(values[kv, :, head], scale[head], geometry.kv_dtype)
            assert torch.equal(found, reference.dequantise(codes, scale[head]))
        k, _ = reference.gather(view, layer, head, 1, 42, 43)
        codes = reference.quantise(values[0, 5, head], view.k_scale[head], geometry.kv_dtype)
        assert torch.equal(k[0], reference.dequantise(codes, view.k_scale[head]))


def test_codes_of_a_transposed_bank_are_stored_alike():
    geometry = Geometry(1, 2, 8, 64)
    view, other = empty_view(geometry, [600]), empty_view(geometry, [600])
    bank = torch.randint(0, 120, (2, 2, 64, 500), dtype=torch.uint8)
    k, v = bank.permute(0, 3, 1, 2)
    host.append_codes_run(view, 0, k, v, 0, 77)
    host.append_codes_run(other, 0, k.contiguous(), v.contiguous(), 0, 77)
    assert torch.equal(view.arena, other.arena)
    found, _ = reference.gather(view, 0, 1, 0, 77, 577)
    assert torch.equal(
        found, reference.dequantise(k[:, 1].view(torch.float8_e4m3fn), view.k_scale[1])
    )


def test_quantise_clamps_and_rounds_to_even():
    x = torch.tensor([500.0, -1e9, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10])
    codes = reference.quantise(x, 1.0, "fp8_e4m3")
    assert codes.tolist() == [448.0, -448.0, 16.0, 20.0, 0.0, 2.0**-8]


def test_every_finite_code_is_converted_exactly():
    geometry = Geometry(1, 1, 1, 64)
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    codes = codes.repeat(64)[: 128 * 64].view(128, 1, 64)
    view = empty_view(geometry, [128], scales=[1.0])
    host.append_codes_run(view, 0, codes, codes, 0, 0)
    k, v = host.BlockReader(geometry).read(view, 0, 0, 0, 0, 1)
    want = codes[:, 0].view(torch.float8_e4m3fn).float()
    assert torch.equal(k * 256, want)
    assert torch.equal(v[0].T * 256, want)
