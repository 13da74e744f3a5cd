"""The recipes on real rules run from nothing to a submission with a tiny model: their steps fit together. Speed, memory and what only
a GPU does are not tried here."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from etrm.apps.recipes import recipe_file
from etrm.tasks.rearc import shipped_pairs

TINY = ('decoder.hidden_size=32 decoder.num_heads=2 decoder.L_layers=1 decoder.L_cycles=1 decoder.halt_max_steps=2 decoder.forward_dtype=float32 '
        'tasks.pairs={pairs} tasks.held_out=2 tasks.num_aug=1 tasks.pairs_per_task=8 pretrain.minutes=0 pretrain.steps=2 pretrain.compile=false '
        'pretrain.global_batch_size=4 regression.minutes=0 regression.steps=2 regression.global_batch_size=4 '
        'train.minutes=0 train.steps=2 train.global_batch_size=4 train.compile=false')
SMALLER = {r'--groups \d+': '--groups 2', r'--steps \d+': '--steps 1', r'--views \d+': '--views 2'}


@pytest.fixture(scope='module')
def pairs(tmp_path_factory) -> Path:
    "Twenty-four pairs of each of thirty rules of the shipped set."
    with np.load(shipped_pairs()) as whole: rules, counts, shapes, cells = (whole[name] for name in ('rules', 'counts', 'shapes', 'cells'))
    areas = shapes.astype(int).prod(-1)
    grids = np.split(np.stack([cells // 16, cells % 16], 1).ravel()[:areas.sum()], areas.ravel().cumsum()[:-1])
    first = counts.cumsum() - counts
    kept = np.concatenate([first[i] + np.arange(24) for i in np.flatnonzero(counts >= 24)[:30]])
    flat = np.concatenate([grids[2 * i + side] for i in kept for side in (0, 1)])
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    file = tmp_path_factory.mktemp('pairs') / 'few.npz'
    np.savez(file, rules=rules[np.flatnonzero(counts >= 24)[:30]], counts=np.full(30, 24), shapes=shapes[kept], cells=flat[::2] * 16 + flat[1::2])
    return file


def shrunk(name: str, pairs: Path, folder: Path, more: str = '') -> Path:
    "A recipe of the same steps with few updates of a tiny model."
    recipe = yaml.safe_load(recipe_file(name).read_text())
    for step in recipe['steps']:
        kind = step['command'].split()[0]
        if kind in ('pretrain', 'train', 'oracle'): step['command'] += f' {TINY.format(pairs=pairs)} {more}'
        if kind == 'oracle': step['command'] += ' tasks.max_eval_groups=2'
        for long, short in SMALLER.items(): step['command'] = re.sub(long, short, step['command'])
        if kind == 'search' and '--skip-too-large' not in step['command']: step['command'] += ' --skip-too-large'
    file = folder / f'{name}.yaml'
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.parametrize('name, more, sets', [
    ('real_gpu', '', {'rules', 'evaluation'}), ('real_full', 'decoder.canvas=8 decoder.crop=4', {'evaluation'})])
def test_from_nothing_to_a_submission(name, more, sets, pairs, tmp_path):
    runs = tmp_path / 'runs'
    line = [sys.executable, '-m', 'etrm.apps.cli', 'reproduce', str(shrunk(name, pairs, tmp_path, more)), '--runs', str(runs), '--device', 'cpu']
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    made = runs / name
    submission = json.loads((made / 'submission.json').read_text())
    assert len(submission) == 400 and sum(bool(task[0]['attempt_1']) for task in submission.values()) > 20
    rows = [row for found in sets for row in json.loads((made / f'{found}.json').read_text())]
    assert {row['set'] for row in rows} == sets and {row['start'] for row in rows} >= {'encoder', 'mean'}
    read = json.loads((made / "evaluation.provenance.json").read_text())
    assert read['sets']['evaluation']


def test_more_is_asked_of_what_another_recipe_made(pairs, tmp_path):
    shrunk('real_two_cores', pairs, tmp_path)  # beside it
    runs = tmp_path / 'runs'
    line = [sys.executable, '-m', 'etrm.apps.cli', 'reproduce', str(shrunk('real_more', pairs, tmp_path)), '--runs', str(runs), '--device', 'cpu']
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (runs / 'real_two_cores').iterdir() if not p.name.startswith('.')) == ['decoder', 'encoder']
    made = {p.stem: json.loads(p.read_text()) for p in (runs / 'real_more').glob('*.json') if 'provenance' not in p.name}
    assert set(made) == {step['name'] for step in yaml.safe_load(recipe_file('real_more').read_text())['steps']}
    assert {row['fitted_to'] for row in made['oracle']} == {'demonstrations', 'answer'}
    for rows in made.values():
        assert all(len(row['demonstrations']) == row['n'] and max(row['demonstrations']) <= 4 for row in rows)
    for row in made['evaluation_views']:
        assert len(row['best_demonstrations']) == len(row['voted_2_each']) == row['n'] and sum(row['voted_2_each']) == row['voted_2']
        assert all(best >= own for best, own in zip(row['best_demonstrations'], row['demonstrations']))


@pytest.mark.parametrize('name', ['real_two_cores', 'real_gpu', 'real_full', 'real_compare', 'real_more'])
def test_what_trains_and_what_answers_are_of_one_line(name):
    "Each step reads the decoder that its encoder was trained through."
    recipes = {n: yaml.safe_load(recipe_file(n).read_text()) for n in (name, *yaml.safe_load(recipe_file(name).read_text()).get('needs', []))}
    steps = {f'{n}/{s["name"]}': re.sub(r'\{(\w+)\}', rf'{{{n}/\1}}', s['command']) for n, recipe in recipes.items() for s in recipe['steps']}
    trained = {n: re.search(r'--decoder \{([\w/]+)\}', c)[1] for n, c in steps.items() if c.startswith('train ')}
    for command in steps.values():
        if not command.startswith('search-curves'): continue
        encoder, decoder = re.search(r'search-curves \{([\w/]+)\}/checkpoint --decoder \{([\w/]+)\}', command).groups()
        assert decoder in (encoder, trained[encoder])
