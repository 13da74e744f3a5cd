"Records that lie where their recipe says: of its commands and settings, of the files that are there, after the predictions."
import json
import subprocess
from pathlib import Path

import pytest

from etrm.apps.recipe_runs import is_finished
from etrm.apps.recipe_steps import planned
from etrm.apps.recipes import load_recipe, recipe_file, recipe_names
from etrm.basics.files import file_sha256
from etrm.basics.listing import records_in

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / 'checkpoints'
RECIPES = [name for name in recipe_names() if (SHIPPED / name).is_dir() and name != 'real_compare']  # older than its recipe
OF_REAL_RULES, OF_THE_LAB = SHIPPED / 'real_predictions.json', SHIPPED / 'lineage_predictions.json'


def git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(['git', '-C', str(ROOT), *words], capture_output=True, text=True)


def whole_history() -> bool:
    try: return git('rev-parse', '--is-shallow-repository').stdout.strip() == 'false'
    except FileNotFoundError: return False


def steps_of(name: str):
    "Those of whose results something is stored."
    return [step for step in planned(recipe_file(name), SHIPPED) if step.path.exists()]


@pytest.mark.parametrize('name', RECIPES)
def test_a_record_is_what_its_recipe_makes(name):
    assert (steps := [step for step in steps_of(name) if step.recipe == name])
    for step in steps: assert is_finished(step), step.path  # raises where command or configuration differ


@pytest.mark.parametrize('name', RECIPES)
def test_nothing_else_lies_there(name):
    known = {step.path.relative_to(SHIPPED / name).as_posix() for step in planned(recipe_file(name), SHIPPED) if step.recipe == name}
    assert set(records_in(SHIPPED / name)) <= known


@pytest.mark.parametrize('name', RECIPES)
def test_a_step_read_what_another_step_made(name):
    by_path = {step.path.relative_to(SHIPPED).as_posix(): step for step in steps_of(name)}
    for place, entries in records_in(SHIPPED / name).items():
        for file, digest in entries[-1]['read'].items():
            made = SHIPPED / '/'.join(Path(file).parts[-4:])  # recipe, step, checkpoint, file
            if not made.is_file() or f'{name}/{place}' in made.as_posix(): continue
            assert made.parent.parent.relative_to(SHIPPED).as_posix() in by_path
            assert file_sha256(made) == digest, (place, file)


@pytest.mark.skipif(not whole_history(), reason='there is no whole git history')
@pytest.mark.parametrize('name', RECIPES)
def test_predictions_are_older(name):
    file = OF_REAL_RULES if name.startswith('real_') else OF_THE_LAB
    last = git('log', '-1', '--format=%H', '--', str(file)).stdout.strip()
    for place, entries in records_in(SHIPPED / name).items():
        for entry in entries:
            assert git('merge-base', '--is-ancestor', last, entry['checkout']['commit']).returncode == 0, place


def test_every_recipe_is_read():
    for name in recipe_names(): assert load_recipe(recipe_file(name)).steps


def test_predictions_are_read():
    for file in (OF_REAL_RULES, OF_THE_LAB):
        found = json.loads(file.read_text())
        assert found and all({'about', 'prediction'} <= set(entry) for entry in found)
