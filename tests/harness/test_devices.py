"""The device that a trial opens is as small as its settings say."""

from __future__ import annotations

import pytest

from harness.devices import open_device
from harness.ledger import Ledger
from harness.validate import compose_settings
from strategies import device_cuda


class Opened(Exception):
    """The device would have been made now."""


@pytest.mark.parametrize(("typed", "held"), [(["hardware.capacity=3GiB"], 3 << 30), ([], None)])
def test_a_capacity_that_a_user_types_is_made_of_ballast(monkeypatch, typed, held):
    def device(index, capacity_bytes, observer):
        raise Opened(capacity_bytes)

    monkeypatch.setattr(device_cuda, "CudaDevice", device)
    settings = compose_settings(["strategy=static", "hardware=h200", *typed], planning=True)
    with pytest.raises(Opened) as found:
        open_device(settings, Ledger(lambda row: None), loads_kernels=False)
    assert found.value.args == (held,)
