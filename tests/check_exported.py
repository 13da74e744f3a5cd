"""Fail if the exported module, the notebooks' cleanliness or the README differ from what the notebooks give."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generated() -> dict[str, str]:
    "A hash of every file that cleaning, exporting and the README's making may write."
    files = [*ROOT.glob('etrm/**/*.py'), *ROOT.glob('nbs/**/*.ipynb'), ROOT / 'README.md', ROOT / 'checkpoints' / 'README.md']
    return {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if '.ipynb_checkpoints' not in f.parts}


def main() -> int:
    for notebook in ROOT.glob('nbs/**/*.ipynb'): json.loads(notebook.read_text())  # nbdev_clean only warns about broken JSON
    before, bin_folder = generated(), Path(sys.executable).parent
    environment = os.environ | {'PATH': f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    for command in (['nbdev_clean'], ['nbdev_export'], [sys.executable, 'nbs/_readme.py']):
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    after = generated()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed: print(f'differs after nbdev_clean, nbdev_export and nbs/_readme.py: {name}', file=sys.stderr)
    modules = {'.'.join(p.relative_to(ROOT / 'etrm').with_suffix('').parts) for p in ROOT.glob('etrm/**/*.py')}
    stale = modules - {'__init__', '_modidx'} - exported()
    for name in sorted(stale): print(f'the module etrm.{name} comes from no notebook: delete it', file=sys.stderr)
    ignored = subprocess.run(['git', 'ls-files', '--others', '--ignored', '--exclude-standard', 'etrm/*.py'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in ignored: print(f'git ignores {name}: no clone would have it', file=sys.stderr)
    return 1 if changed or stale or ignored else 0


def exported() -> set[str]:
    "The modules that the notebooks name in `default_exp`."
    cells = (''.join(c['source']) for f in ROOT.glob('nbs/**/*.ipynb') for c in json.loads(f.read_text())['cells'])
    return {line.split()[-1] for cell in cells for line in cell.splitlines()[:1] if line.startswith('#| default_exp')}


if __name__ == '__main__': sys.exit(main())
