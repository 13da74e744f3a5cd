"""The findings as they are committed: every figure and table that a cell makes is there, and nothing that a run leaves by the way."""
import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / 'nbs'
FINDINGS = sorted(NOTEBOOKS.glob('[0-9]*.ipynb'))
DRAWS = ('plt.subplots(', 'figure = plot_', 'draw_pairs(')


def cells_of(path: Path) -> list[tuple[str, list[dict]]]:
    "Source and outputs of each code cell."
    cells = json.loads(path.read_text())['cells']
    return [(''.join(c['source']), c['outputs']) for c in cells if c['cell_type'] == 'code']


def shows(outputs: list[dict], kind: str) -> bool: return any(kind in o.get('data', {}) for o in outputs)


@pytest.mark.parametrize('path', FINDINGS, ids=lambda path: path.stem)
def test_every_figure_is_shown(path):
    assert [source for source, outputs in cells_of(path) if any(d in source for d in DRAWS) and not shows(outputs, 'image/png')] == []


@pytest.mark.parametrize('path', FINDINGS, ids=lambda path: path.stem)
def test_every_table_is_shown(path):
    tables = [(source, outputs) for source, outputs in cells_of(path) if any(line.startswith('Markdown(') for line in source.splitlines())]
    assert [source for source, outputs in tables if not shows(outputs, 'text/markdown')] == []


@pytest.mark.parametrize('path', FINDINGS, ids=lambda path: path.stem)
def test_no_progress_bar_warning_or_error_is_left(path):
    left = [o for _, outputs in cells_of(path) for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr' or shows([o], 'application/vnd.jupyter.widget-view+json')]
    assert left == []


@pytest.mark.parametrize('path', [*FINDINGS, *sorted((NOTEBOOKS / 'api').rglob('*.ipynb'))], ids=lambda path: path.stem)
def test_no_bar_is_stored(path):
    assert 'application/vnd.jupyter.widget' not in path.read_text()
