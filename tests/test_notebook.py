"""The notebook of examples/ runs from its first cell to its last."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "learning_curve.ipynb"


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    lines = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    small = ("regime.prompts_per_step=2", "regime.group_size=4", "dataset.max_completion_tokens=16")
    code = "\n".join(lines).replace("STEPS = 12", "STEPS = 2")
    code = code.replace('"regime=aggressive"', str(small)[1:-1])
    code += "\nassert set(metrics['algo.name']) == {'capo', 'grpo'} and len(metrics) == 4"
    code += "\nassert score.scores['problems'] == 50 and axes.lines and len(completions)"
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(NOTEBOOK), "exec"), {})
