"""Work that several tests share, begun with the session; files for harness.explain."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness.ahead import WORK
from tests.harness.explain_case import ONE_RANK


def pytest_collection_modifyitems(items):
    """Tests that read such work come last: it is done while others are tested."""
    items.sort(key=lambda item: not WORK.keys().isdisjoint(item.fixturenames))


@pytest.fixture(scope="session", autouse=True)
def _ahead(request, tmp_path_factory):
    """What the chosen tests read of it, as futures."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(1) as pool:
        yield {
            name: pool.submit(work, tmp_path_factory.mktemp(name))
            for name, work in WORK.items()
            if name in wanted
        }
        pool.shutdown(cancel_futures=True)


def _result(name):
    @pytest.fixture(scope="session", name=name)
    def give(_ahead):
        return _ahead[name].result()

    return give


ten_million, timed, scaled, died, failed, nodes, killed_rank, layouts, launched = map(_result, WORK)


@pytest.fixture
def config_file(tmp_path):
    """Writes a config.json of ``explain_case.ONE_RANK``, changed as told; its path."""

    def write(name="config.json", **changed):
        path = tmp_path / name
        path.write_text(json.dumps({**ONE_RANK, **changed}))
        return str(path)

    return write


@pytest.fixture
def log_file(tmp_path):
    """Writes an engine's log; its path."""

    def write(text, name="start.log"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write
