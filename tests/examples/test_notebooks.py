"""The notebooks run from top to bottom, with small parameters, in an empty folder; and are kept without outputs."""

import json
import re

import matplotlib.pyplot as plt
import pytest

from tests.helpers.in_process import ROOT, working_in

NOTEBOOKS = ROOT / "notebooks"
SMALL = {
    "digits": "EPOCHS, TEST_IMAGES, SEVERITIES = 2, 20, (3,)",
    "finetune_hf_trainer": "MODEL, DATASET, IMAGE_SIZE, EPOCHS, SEVERITIES = None, None, 32, 1, (3,)",
}


def code_cells(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def names_set(source):
    return set(re.findall(r"\b[A-Z_]{3,}\b", re.sub("#.*", "", source)))


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name, tmp_path):
    plt.switch_backend("Agg")
    namespace, parameters = {"__name__": "notebook"}, 0
    with working_in(tmp_path) as printed:
        for number, cell in enumerate(code_cells(name)):
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", ()):
                assert names_set(source) == names_set(SMALL[name])
                source, parameters = SMALL[name], parameters + 1
            exec(compile(source, f"{name}, code cell {number}", "exec"), namespace)
    plt.close("all")
    assert parameters == 1
    assert "Hscore" in printed.getvalue()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_kept_without_outputs(name):
    for cell in code_cells(name):
        assert not cell["outputs"]
        assert not cell["execution_count"]
