"""A recipe runs step by step, goes on where it was stopped, skips what is finished, and says whether its counts came out.
Under a minute on one thread."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from etrm.apps.cli import app
from etrm.apps.recipes import recipe_file, recipe_names
from etrm.training.records import read_record


def reproduce(*arguments, code: int = 0) -> tuple[str, str]:
    "What the command writes and says, in this process; its steps are others."
    done = CliRunner().invoke(app, ['reproduce', *map(str, arguments), '--device', 'cpu'])
    assert done.exit_code == code, done.stderr or done.exception
    return done.stdout, done.stderr


def started(*arguments, **more) -> subprocess.Popen:
    line = [sys.executable, '-m', 'etrm.apps.cli', 'reproduce', *map(str, arguments), '--device', 'cpu']
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores Ctrl-C, and a child would too
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listens, **more)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, said = process.communicate(timeout=900)
    return process.returncode, out, said


def updates(run: Path) -> int:
    try: return read_record(run)[-1]['step']
    except (ValueError, IndexError): return 0


def wait_for(condition, process: subprocess.Popen, seconds: float = 600):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline: time.sleep(.02)
    assert condition(), ended(process)[2] if process.poll() is not None else 'too slow'


def progress(said: str) -> list[str]:
    "What is said of each step, without its command."
    return [line.partition('step ')[2].partition(': etrm ')[0] for line in said.splitlines() if line.startswith('etrm: step ')]


def test_stopped_in_the_middle_it_goes_on_and_what_is_finished_is_skipped(tmp_path):
    runs = tmp_path / 'my runs'
    first = started('smoke', '--runs', runs)
    wait_for(lambda: updates(runs / 'smoke/table') >= 10, first)
    os.kill(first.pid, signal.SIGTERM)  # this process's alone: it has to pass it on
    code, out, said = ended(first)
    assert (code, out, progress(said)) == (130, '', ['1 of 3, smoke/table'])
    assert f"stopped in step 1 of 3, smoke/table; what is done is kept in {runs}; to go on: etrm reproduce smoke --runs '{runs}'" in said
    assert (runs / 'smoke/table/checkpoint/training_state.pt').exists()

    code, out, said = ended(started('smoke', '--runs', runs))
    assert code == 0, said
    assert progress(said) == ['1 of 3, smoke/table', '2 of 3, smoke/encoder', '3 of 3, smoke/curves']
    assert f'{runs}/smoke/table goes on after update ' in said
    entries = json.loads((runs / 'smoke/table/provenance.json').read_text())
    assert [e['ended'] for e in entries] == ['interrupted', 'done'] and entries[0]['arguments'] == entries[1]['arguments']
    assert [line.rpartition(' of 8 | ')[2] for line in out.splitlines()[2:]] == ['yes |', 'yes |']
    curves = json.loads((runs / 'smoke/curves.provenance.json').read_text())
    assert curves['sets'] == {'validation': dict(tasks=8, kind='validation')}

    again, said = reproduce('smoke', '--runs', runs)
    assert again == out
    assert progress(said) == [f'1 of 3, smoke/table: done before, in {runs}/smoke/table', f'2 of 3, smoke/encoder: done before, in {runs}/smoke/encoder',
                              f'3 of 3, smoke/curves: done before, in {runs}/smoke/curves.json']

    # the same steps, and another number expected of them
    recipe = yaml.safe_load(recipe_file('smoke').read_text())
    recipe['expect'][0]['solved'] = 8
    (tmp_path / 'smoke.yaml').write_text(yaml.safe_dump(recipe))
    found = reproduce(tmp_path / 'smoke.yaml', '--runs', runs, code=1)[0]
    assert [line.rpartition(' of 8 | ')[2] for line in found.splitlines()[2:]] == ['no |', 'yes |']

    # another command for a step that is finished
    recipe['steps'][2]['command'] += ' --views 2'
    (tmp_path / 'smoke.yaml').write_text(yaml.safe_dump(recipe))
    assert f'etrm: {runs}/smoke/curves.json was made by another command, etrm search-curves ' in reproduce(tmp_path / 'smoke.yaml', '--runs', runs, code=2)[1]


def test_ctrl_c_of_a_terminal_reaches_the_step(tmp_path):
    "It goes to the whole foreground group; the step is not in it, and its parent passes it on."
    process = started('smoke', '--runs', tmp_path, start_new_session=True)
    wait_for(lambda: updates(tmp_path / 'smoke/table') >= 10, process)
    os.killpg(process.pid, signal.SIGINT)
    code, _, said = ended(process)
    assert code == 130 and 'etrm: stopped after update ' in said and 'etrm: stopped in step 1 of 3, smoke/table; ' in said
    assert json.loads((tmp_path / 'smoke/table/provenance.json').read_text())[0]['ended'] == 'interrupted'


def test_a_step_that_fails_ends_the_recipe(tmp_path, capfd):
    (tmp_path / 'bad.yaml').write_text('question: Why?\ndevice: one CPU core\nminutes: 1\nsteps:\n  - {name: one, command: evaluate nowhere}\n')
    said = reproduce(tmp_path / 'bad.yaml', '--runs', tmp_path / 'runs', code=2)[1]
    assert said.splitlines()[-1] == 'etrm: step 1 of 1, bad/one: it ended with exit code 2, for the reason above; the same command goes on there'
    assert 'etrm: there is no checkpoint at nowhere' in capfd.readouterr().err  # from the step itself


@pytest.mark.parametrize('name', recipe_names())
def test_each_shipped_recipe_resolves(name, tmp_path):
    lines = reproduce(name, '--dry-run', '--runs', tmp_path / 'runs')[0].splitlines()
    assert lines and all(line.startswith('etrm ') for line in lines) and not (tmp_path / 'runs').exists()
    assert f'| {name} | ' in reproduce('--list')[0]


def test_a_recipe_that_is_not_valid_names_file_and_key(tmp_path):
    file = tmp_path / 'mine.yaml'
    file.write_text('question: Why?\ndevice: a laptop\nminutes: 1\nsteps: [{name: one, command: pretrain lab}]\n')
    assert reproduce(file, code=2)[1] == f"etrm: recipe {file}: device = 'a laptop': Input should be 'one CPU core', 'two CPU cores' or 'one GPU'\n"
    file.write_text('question: Why?\ndevice: one CPU core\nminutes: 1\nsteps: [{name: one, command: pretrain lab --untill 3}]\n')
    assert reproduce(file, code=2)[1].startswith('etrm: recipe mine, step one: etrm pretrain lab --untill 3')
