"""The notebooks run from top to bottom on any run's folder, and hold no logic of their own."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from tests.harness.run_fixture import cell, write_run

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def code_of(notebook):
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_one_variable_and_no_logic(path):
    cells = code_of(json.loads(path.read_text()))
    assert cells[0].startswith('RUN = "results/reference/')
    for code in cells:
        tree = ast.parse("\n".join(x for x in code.splitlines() if not x.startswith("%")))
        banned = (ast.FunctionDef, ast.If, ast.While, ast.Lambda, ast.BinOp, ast.ListComp)
        assert not any(isinstance(node, banned) for node in ast.walk(tree)), code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_executed_in_order_with_pictures(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs)
    assert any("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.beside
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_shows_its_figures(path, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    rows = [cell(name, 1_000_000, 1.0) for name in ("static", "paged")]
    folder = write_run(tmp_path / "run", rows)
    next(c for c in notebook.cells if c.cell_type == "code").source = f"RUN = {str(folder)!r}"
    run = client.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}
    )
    run.execute(env=os.environ | {"PYTHONPATH": str(path.parents[1])})
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    kinds = {kind for o in outputs if "data" in o for kind in o["data"]}
    assert "image/png" in kinds and "text/html" in kinds
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs)
