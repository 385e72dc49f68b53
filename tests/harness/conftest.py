"""Work that several tests share, begun with the session; files for harness.explain."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.harness.ahead import WORK
from tests.harness.explain_case import ONE_RANK

BESIDE = pytest.StashKey[Future]()


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "beside: begun with the session, as it waits for processes of its own; such a test takes "
        "nothing but tmp_path and parameters",
    )


def pytest_collection_modifyitems(items):
    """What is begun with the session comes last: by then it is done."""

    def turn(item):
        if item.get_closest_marker("beside"):
            return 2
        return not WORK.keys().isdisjoint(item.fixturenames)

    items.sort(key=turn)


def _yield_to_others():
    """Lower this thread's priority, and that of the processes that it starts."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 3)


@pytest.fixture(scope="session", autouse=True)
def _ahead(request, tmp_path_factory):
    """Begin what the chosen tests share, and those beside others; the former as futures."""
    items = request.session.items
    wanted = {name for item in items for name in item.fixturenames}
    with ThreadPoolExecutor(1, initializer=_yield_to_others) as pool:
        futures = {
            name: pool.submit(work, tmp_path_factory.mktemp(name))
            for name, work in WORK.items()
            if name in wanted
        }
        for item in items:
            if item.get_closest_marker("beside"):
                given = {"tmp_path": tmp_path_factory.mktemp("beside")}
                if hasattr(item, "callspec"):
                    given |= item.callspec.params
                item.stash[BESIDE] = pool.submit(item.obj, **given)
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that was begun before ends as it ended there."""
    if BESIDE not in pyfuncitem.stash:
        return None
    pyfuncitem.stash[BESIDE].result()
    return True


def _result(name):
    @pytest.fixture(scope="session", name=name)
    def give(_ahead):
        return _ahead[name].result()

    return give


ten_million, timed, scaled, died, failed, nodes, layouts = map(_result, WORK)


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
