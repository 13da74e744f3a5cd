"Arrows point one way: a module imports only from modules before it in its folder, and from folders before its own."
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import etrm

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [p.name.partition('_')[2] for p in sorted((ROOT / 'nbs/api').iterdir()) if p.is_dir() and p.name[0].isdigit()]
PLACES = {(folder, module): (i, j) for i, folder in enumerate(FOLDERS)
          for j, module in enumerate(importlib.import_module(f'etrm.{folder}').MODULES)}


def imported(file: Path) -> set[tuple[str, str]]:  # of (folder, module)
    "The modules of this package that a module imports."
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom): continue
        parts = [file.parent.name] * (node.level == 1) + (node.module.split('.') if node.module else [])
        if not node.level:
            if parts[0] != 'etrm': continue
            parts = parts[1:]
        if len(parts) == 2: found.add(tuple(parts))
        elif parts: found |= {(parts[0], a.name) for a in node.names}
    return found


def test_every_module_has_its_place():
    files = {(f.parent.name, f.stem) for f in (ROOT / 'etrm').glob('*/*.py') if f.stem != '__init__'}
    assert files == set(PLACES)


@pytest.mark.parametrize('place', PLACES, ids='.'.join)
def test_imports_come_from_before(place):
    folder, module = place
    later = [f'{f}.{m}' for f, m in imported(ROOT / 'etrm' / folder / f'{module}.py') if PLACES[f, m] >= PLACES[place]]
    assert not later, f'etrm.{folder}.{module} imports from {", ".join(sorted(later))}, which come after it'


def test_what_most_people_need_is_at_the_door():
    code = "import sys, etrm; early = 'torch' in sys.modules; print(early, [name for name in etrm.__all__ if getattr(etrm, name).__module__ != f'etrm.{etrm.PLACES[name]}'])"
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == 'False []'  # torch is loaded when something is asked for, and each is where it is made
    with pytest.raises(AttributeError, match="module 'etrm' has no attribute 'Encoder'"): etrm.Encoder
    assert set(etrm.__all__) <= set(dir(etrm)) and len(etrm.__all__) <= 30
