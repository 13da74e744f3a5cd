"""A run's folder is its own: whoever else names it is refused and changes nothing; a run goes on as what it was begun as, from where it was saved."""
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from etrm.experiments import experiment, runs as of_runs, study_runs
from etrm.training.saving import load_training_state
from etrm.apps.cli import app
from etrm.experiments.configurations import load_config
from etrm.experiments.pretraining import pretrain
from etrm.training.records import lock_folder, read_record
from etrm.training.trainer import Trainer

SIZES = ['decoder.canvas=5', 'decoder.hidden_size=32', 'decoder.num_heads=2', 'decoder.L_layers=1', 'decoder.H_cycles=1', 'decoder.L_cycles=1', 'decoder.puzzle_emb_len=2', 'decoder.halt_max_steps=2']
SHORT = ['tasks.max_train_groups=4', 'tasks.max_eval_groups=2', 'tasks.pairs_per_task=4', 'evaluation.num_aug=0',
         *(f'{phase}.{setting}' for phase in ('pretrain', 'train') for setting in ('steps=12', 'global_batch_size=4', 'log_every=1', 'save_every=4', 'compile=false'))]
REGRESSION = ['encoder.output=matched', *(f'regression.{s}' for s in ('steps=8', 'global_batch_size=4', 'log_every=1', 'save_every=3'))]
STUDY = 'name: small\nbase: cfg_test_frozen_decoder\nseeds: [0]\nvariants: {report: [], deep: [encoder.encoder_num_layers=3]}\n'
cli = CliRunner()


@pytest.fixture(scope='module')
def decoders(tmp_path_factory):
    "Two decoders of one configuration and other weights, for the same tasks."
    folder = tmp_path_factory.mktemp('decoders')
    for name in ('a', 'b'): pretrain(load_config('lab', (*SIZES, *SHORT, 'table.init_std=0.5')), folder / name, start=None if name == 'a' else folder / 'a' / 'checkpoint')
    return folder / 'a' / 'checkpoint', folder / 'b' / 'checkpoint'


def line_of(command: str, decoder: Path, runs: Path, *more) -> list[str]:
    "A command that makes a run, with its arguments."
    if command == 'study': (runs / 'small.yaml').write_text(STUDY)
    first = {'pretrain': ['lab', *SIZES], 'study': [str(runs / 'small.yaml')]}.get(command, ['cfg_test_frozen_decoder'])
    reads = ['--start', str(decoder)] if command == 'pretrain' else ['--decoder', str(decoder)]
    return [command, *first, *SHORT, *reads, '--runs', str(runs), *([] if command == 'study' else ['--no-wandb']), *map(str, more)]


def going_on(command: str, decoder: Path, runs: Path, folder: Path, *more) -> list[str]:
    return line_of(command, decoder, runs, *more, *([] if command == 'study' else ['--resume', folder]))


def stopped(monkeypatch, command, decoder, runs) -> Path:
    "The folder of a run that was stopped by Ctrl-C after six updates of training."
    step, made = Trainer.step, []
    updates = 9 if command == 'study' else 6  # with three to count the operations
    def stopping(trainer):
        made.append(0)
        if len(made) == updates: os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, 'step', stopping)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
        try: found = cli.invoke(app, line_of(command, decoder, runs))
        finally: signal.signal(signal.SIGINT, before)
    assert found.exit_code == 130, found.stderr
    return next(p.parent for p in runs.rglob('settings.json'))


def files_of(folder: Path) -> dict[Path, bytes]: return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name != '.lock'}


@contextmanager
def another_process(folder: Path):
    "It holds the folder, and is killed at the end."
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with lock_folder(folder):
            os.write(writing, b'1')
            time.sleep(300)
        os._exit(0)
    os.read(reading, 1)
    try: yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize('command', ['run', 'pretrain', 'train', 'study'])
def test_refused_where_it_is_no_run_of_these_settings_and_gone_on_with_where_it_is(command, decoders, tmp_path, monkeypatch):
    folder = stopped(monkeypatch, command, decoders[0], tmp_path)
    before = files_of(folder)
    assert len(read_record(folder)) == 6
    def refused(said, decoder=decoders[0], more=(), place=folder):
        found = cli.invoke(app, going_on(command, decoder, tmp_path, place, *more))
        assert found.exit_code == 2 and said in found.stderr, found.stderr
        assert files_of(folder) == before
    with another_process(folder): refused(f'another process is writing to {folder}')  # a killed process holds no folder
    refused(f'{folder} is of another run: {"start" if command == "pretrain" else "decoder"} is {decoders[0]} (weights ', decoders[1])
    refused('num_demos is 4 there, 3 now', more=('num_demos=3',))
    if command != 'study':
        (tmp_path / 'no run').mkdir(); (tmp_path / 'no run' / 'record.jsonl').write_text('{"step": 1}\n')
        refused('no run is not the folder of a run: it holds record.jsonl and no settings.json', place=tmp_path / 'no run')
    place = folder / 'checkpoint' if command in ('pretrain', 'train') else folder  # its folder is meant
    done = cli.invoke(app, going_on(command, decoders[0], tmp_path, place))
    assert done.exit_code == 0, done.stderr
    assert done.stderr.splitlines()[1] == f'{folder} goes on after update 6'
    assert [r['step'] for r in read_record(folder) if 'train/lr' in r] == list(range(1, 13)) and not (folder / 'checkpoint' / 'record.jsonl').exists()


def test_stopped_in_the_regression_it_goes_on_through_its_own_decoder_only(decoders, tmp_path, monkeypatch):
    runs, save = tmp_path, of_runs.save_checkpoint
    def die(*args):
        save(*args)
        if args[3]['updates'] == 6: raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(of_runs, 'save_checkpoint', die)
        assert cli.invoke(app, line_of('train', decoders[0], runs, *REGRESSION)).exit_code == 130
    folder = runs / 'cfg_test_frozen_decoder-train-001'
    assert load_training_state(folder / 'regression')['updates'] == 6
    other = cli.invoke(app, going_on('train', decoders[1], runs, folder, *REGRESSION))
    assert other.exit_code == 2 and 'is of another run: decoder is' in other.stderr
    done = cli.invoke(app, going_on('train', shutil.copytree(decoders[0], runs / 'moved'), runs, folder, *REGRESSION))
    assert done.exit_code == 0 and done.stderr.splitlines()[1] == f'{folder} goes on after update 6 of the regression'


def test_a_record_without_its_checkpoint_is_kept(decoders, tmp_path, monkeypatch):
    folder = stopped(monkeypatch, 'train', decoders[0], tmp_path)
    rows = (folder / 'record.jsonl').read_text()
    shutil.rmtree(folder / 'checkpoint')
    with pytest.warns(UserWarning, match='they are kept in record-001.jsonl, and training begins anew'): done = cli.invoke(app, going_on('train', decoders[0], tmp_path, folder))
    assert done.exit_code == 0 and done.stderr.splitlines()[1] == f'{folder} holds no checkpoint: training begins at update 0'
    assert (folder / 'record-001.jsonl').read_text() == rows and len(read_record(folder)) == 12


def is_held(folder: Path) -> bool:
    try:
        with lock_folder(folder): return False
    except ValueError: return True


@pytest.mark.parametrize('command, last', [('run', (experiment, 'write_verdict')), ('pretrain', (of_runs, 'save_checkpoint')), ('train', (of_runs, 'save_checkpoint')), ('study', (study_runs, 'measured'))])
def test_the_folder_is_held_until_the_last_file_is_written(command, last, decoders, tmp_path, monkeypatch):
    write, held = getattr(*last), []
    def watched(*args, **kwargs):
        held.append(is_held(next(p.parent for p in tmp_path.rglob('settings.json'))))
        return write(*args, **kwargs)
    monkeypatch.setattr(*last, watched)
    more = ['--variants', 'report'] if command == 'study' else []
    done = cli.invoke(app, line_of(command, decoders[0], tmp_path, *more))
    assert done.exit_code == 0, done.stderr
    assert held and all(held)


def test_overrides_of_the_decoder_are_not_dropped(decoders, tmp_path):
    for command in ('run', 'train', 'study', 'oracle'):
        line = [w for w in line_of(command, decoders[0], tmp_path, 'decoder.L_cycles=3') if command != 'oracle' or w not in ('--no-wandb', '--runs', str(tmp_path))]
        found = cli.invoke(app, line)
        assert found.exit_code == 2 and f'decoder.L_cycles is 1 in {decoders[0]}, not 3' in found.stderr, found.stderr
    assert not any(tmp_path.rglob('settings.json'))


def test_a_study_shows_no_rows_of_other_settings(decoders, tmp_path):
    first = cli.invoke(app, line_of('study', decoders[0], tmp_path, '--variants', 'report'))
    assert first.exit_code == 0, first.stderr
    for decoder, more, said in ((decoders[0], ['num_demos=3'], 'num_demos is 4 there, 3 now'), (decoders[1], [], 'decoder is'), (decoders[0], ['tasks.seed=1'], 'tasks.seed is 0 there, 1 now')):
        found = cli.invoke(app, line_of('study', decoder, tmp_path, *more, '--variants', 'deep'))
        assert found.exit_code == 2 and f'report-0 is of another run: {said}' in found.stderr, found.stderr
    assert not (tmp_path / 'study-small' / 'deep-0').exists()
