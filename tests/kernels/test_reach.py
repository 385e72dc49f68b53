"""Addresses beyond 2**31 elements and 2**31 rows, in sparse address space."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.config import TMA_PAGES, check_reach
from kernels.view import Geometry
from tests.kernels.cases import lse_error, random_case, random_q, relative_rms

GIB = 1 << 30

# Where a flat [rows, row bytes] descriptor would end: int32 rows of 64, 128, 256 and 512 bytes.
LIMITS = {
    "d64 fp8, 128 GiB": (Geometry(1, 1, 4, 64), 128 * GIB),
    "d128 fp8, 256 GiB": (Geometry(1, 1, 4, 128), 256 * GIB),
    "d256 fp8, 256 GiB of V rows": (Geometry(1, 1, 4, 256), 256 * GIB),
    "d128 bf16, 512 GiB": (Geometry(1, 1, 4, 128, "bf16"), 512 * GIB),
    "page 16, 4 GiB": (Geometry(1, 1, 4, 128, page_tokens=16), 4 * GIB),
}


def check_far(geometry, beyond):
    """Append far out, then decode what lies there."""
    from kernels.append import append, append_run
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode

    first_page = beyond // geometry.page_bytes + 1
    case = random_case(geometry, (200, 300), first_page=first_page)
    view = case.view
    assert int(view.page_table.min()) * geometry.page_bytes > beyond
    view.k_scale.fill_(0.5)
    view.v_scale.fill_(0.25)
    x = torch.randn(2, 300, 1, geometry.head_dim).clamp(-3, 3).to(torch.float8_e4m3fn).float()
    append_run(view, 0, *x[:, :280], 1, 0)
    rest = torch.arange(280, 300)
    append(view, 0, *x[:, 280:], torch.ones(20, dtype=torch.int32), rest)
    case.k[0][1], case.v[0][1] = x.double()
    case.k[0][0], case.v[0][0] = (t[:, None] for t in reference.gather(view, 0, 0, 0, 0, 200))
    q = random_q(geometry, 2)
    out, lse = decode(view, 0, q, plan_decode(view, 2))
    want, want_lse = case.expected_decode(0, q, geometry.head_dim**-0.5)
    assert relative_rms(out, want) < 4e-2
    assert lse_error(lse, want_lse) < 1e-3


@pytest.mark.parametrize("name", LIMITS)
def test_interpreted_beyond(name, interpreter):
    interpreter(check_far, *LIMITS[name])


def test_reach_is_stated_and_refused():
    geometry = Geometry(1, 1, 1, 64)
    check_reach(geometry, TMA_PAGES * geometry.page_bytes)
    with pytest.raises(ValueError, match="a TMA descriptor reaches 1 to 2147483647"):
        check_reach(geometry, (TMA_PAGES + 1) * geometry.page_bytes)
    with pytest.raises(ValueError, match="holds 0 pages"):
        check_reach(geometry, geometry.page_bytes - 1)
    with pytest.raises(ValueError, match="page_bytes="):
        check_reach(Geometry(1 << 26, 1, 1, 64), 1 << 50)


@pytest.mark.gpu
@pytest.mark.parametrize("page_tokens", [16, 128])
def test_on_gpu_beyond_4_gib(page_tokens):
    """Pages that all lie beyond 2**32 bytes of a real arena."""
    geometry = Geometry(1, 1, 5, 128, page_tokens=page_tokens)
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode

    first_page = 4 * GIB // geometry.page_bytes + 1
    case = random_case(geometry, (700, 129), device="cuda", first_page=first_page)
    q = random_q(geometry, 2, device="cuda")
    out, lse = decode(case.view, 0, q, plan_decode(case.view))
    want, want_lse = case.expected_decode(0, q, 128**-0.5)
    assert relative_rms(out, want) < 4e-2
    assert lse_error(lse, want_lse) < 1e-3
