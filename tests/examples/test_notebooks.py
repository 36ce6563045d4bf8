"""The notebooks run from top to bottom, with small parameters, in an empty folder; and are kept without outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SMALL = {
    "digits": "EPOCHS, TEST_IMAGES, SEVERITIES = 2, 20, (3,)",
    "finetune_hf_trainer": "MODEL, DATASET, IMAGE_SIZE, EPOCHS, SEVERITIES = None, None, 32, 1, (3,)",
}


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def names_set(source):
    return set(re.findall(r"\b[A-Z_]{3,}\b", re.sub("#.*", "", source)))


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read(name)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert names_set(parameters.source) == names_set(SMALL[name])
    parameters.source = SMALL[name]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "Hscore" in printed


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_kept_without_outputs(name):
    for cell in read(name).cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")
