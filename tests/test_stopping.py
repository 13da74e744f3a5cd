"""A training that is stopped, diverges or finds no room leaves a good checkpoint; several processes stop at the same update."""
import errno
import json
import os
import signal
import socket
import time
import warnings
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from etrm.training import pace, saving, stopping
from etrm.training.checkpoints import load_checkpoint, read_tensors
from etrm.training.checksums import CheckpointError
from etrm.training.saving import load_training_state
from etrm.experiments.configurations import load_config
from etrm.basics.distributed import processes
from etrm.experiments.encoder_training import train_encoder
from etrm.experiments.pretraining import pretrain
from etrm.experiments.runs import open_run
from etrm.experiments.run_settings import settings_of
from etrm.experiments.task_sets import make_task_sets
from etrm.training.records import read_record
from etrm.training.stopping import Stopped

FORKS = mp.get_context('forkserver')  # imports once, and starts clean of this process's threads
FORKS.set_forkserver_preload(['etrm.experiments.encoder_training'])
TINY = ('decoder.hidden_size=32', 'decoder.num_heads=2', 'decoder.L_layers=1', 'decoder.H_cycles=1', 'decoder.L_cycles=1', 'decoder.puzzle_emb_len=2', 'decoder.halt_max_steps=2',
        'decoder.forward_dtype=float32', 'tasks.max_train_groups=4', 'tasks.max_eval_groups=2', 'tasks.pairs_per_task=4', 'table.init_std=0.5',
        *(f'{phase}.{setting}' for phase in ('pretrain', 'train') for setting in ('global_batch_size=8', 'log_every=1', 'save_every=0', 'eval_every=0', 'compile=false')))
ROWS = ('regression.global_batch_size=8', 'regression.log_every=1', 'regression.save_every=0')
LONG = 10**6


def table_of(folder: Path, *changes: str): return pretrain(load_config('lab', TINY + changes), folder)


def encoder_of(folder: Path, table: Path, *changes: str):
    config = load_config('cfg_test_frozen_decoder', TINY + ROWS + ('regression.steps=4', *changes))
    decoder, rows, _ = load_checkpoint(table / 'checkpoint')
    with open_run(folder, settings_of('train', config, dict(decoder=table / 'checkpoint'))) as record: return train_encoder(config, decoder, rows, make_task_sets(config)[0], record)


LOOPS = dict(table=lambda folder, table: table_of(folder, f'pretrain.steps={LONG}'),
             regression=lambda folder, table: encoder_of(folder, table, f'regression.steps={LONG}', 'train.steps=4'),
             encoder=lambda folder, table: encoder_of(folder, table, f'train.steps={LONG}'))
PLACE = dict(table='checkpoint', regression='regression', encoder='checkpoint')
LOGGED = dict(table='train/lr', regression='regression/error', encoder='train/lr')


def endless(loop: str, folder: Path, table: Path, rank: int = 0, port: int = 0, n: int = 1):
    "A training that only a signal ends; it notes how."
    for s in stopping.STOPS: signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)  # tests under nohup, or in the background, ignore some
    if n > 1: os.environ |= dict(WORLD_SIZE=str(n), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    with processes():
        try: LOOPS[loop](folder, table)
        except Stopped as error: (folder / f'stopped{rank}.json').write_text(json.dumps([error.updates, str(error.saved)]))


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline: time.sleep(.01)
    assert condition()


def has_rows(folder: Path, loop: str) -> bool:
    try: return any(LOGGED[loop] in row for row in read_record(folder))
    except ValueError: return False


def ended(started, seconds=60) -> list[int | None]:
    "The exit codes; None of one that hangs."
    deadline = time.monotonic() + seconds
    for p in started: p.join(max(0., deadline - time.monotonic()))
    codes = [p.exitcode for p in started]
    for p in started: p.kill(); p.join()
    return codes


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp('table')
    table_of(folder, 'pretrain.steps=2')
    return folder


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize('loop', LOOPS)
def test_what_a_scheduler_or_a_closed_terminal_sends_stops_after_the_update(loop, number, table, tmp_path):
    process = FORKS.Process(target=endless, args=(loop, tmp_path, table))
    process.start()
    wait_for(lambda: has_rows(tmp_path, loop))
    os.kill(process.pid, number)
    assert ended([process]) == [0]
    updates, saved = json.loads((tmp_path / 'stopped0.json').read_text())
    assert saved == str(tmp_path / PLACE[loop]) and 0 < updates < LONG
    assert load_training_state(saved)['updates'] == updates == read_record(tmp_path)[-1]['step']


@pytest.mark.parametrize('loop', LOOPS)
def test_killed_where_no_saving_was_asked_for_there_is_a_checkpoint_of_update_0(loop, table, tmp_path):
    process = FORKS.Process(target=endless, args=(loop, tmp_path, table))
    process.start()
    wait_for(lambda: has_rows(tmp_path, loop))
    process.kill()
    assert ended([process]) == [-signal.SIGKILL]
    assert load_training_state(tmp_path / PLACE[loop])['updates'] == 0


@pytest.mark.parametrize('loop, first, apart', [('table', 0, .05), ('table', 1, .05), ('encoder', 1, None), ('regression', 0, .05), ('regression', 1, None)])
def test_two_processes_stop_at_the_same_update(loop, first, apart, table, tmp_path):
    "Ctrl-C reaches them at two moments, or only one of them."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    started = [FORKS.Process(target=endless, args=(loop, tmp_path, table, rank, port, 2)) for rank in range(2)]
    for p in started: p.start()
    wait_for(lambda: has_rows(tmp_path, loop))
    os.kill(started[first].pid, signal.SIGINT)
    if apart is not None:
        time.sleep(apart)
        if started[1 - first].is_alive(): os.kill(started[1 - first].pid, signal.SIGINT)
    codes = ended(started)
    assert None not in codes, f'they hang: {codes}'
    assert codes[first] == 0 and (apart is not None or codes == [0, 0])  # the other may be asked when it is done
    one, two = (json.loads((tmp_path / f'stopped{rank}.json').read_text()) for rank in range(2))
    assert one == two and load_training_state(one[1])['updates'] == one[0]


def fails(times: list[int], monkeypatch):
    "Writing a checkpoint fails, as on a full disk, at the calls of these numbers, from 0."
    calls, real = [], saving._write_files
    def write(*args):
        calls.append(0)
        if len(calls) - 1 in times: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)
    monkeypatch.setattr(saving, '_write_files', write)
    monkeypatch.setattr(pace, 'WAITS', (0, 0))
    return calls


def test_the_last_save_is_tried_again(tmp_path, monkeypatch):
    calls = fails([1, 2], monkeypatch)
    with pytest.warns(UserWarning, match='No space left on device.*it is tried again in 0 seconds'): table_of(tmp_path, 'pretrain.steps=3')
    assert len(calls) == 4 and not (tmp_path / 'checkpoint' / 'training_state.pt').exists()  # finished


def test_the_last_save_of_the_regression_is_tried_again(table, tmp_path, monkeypatch):
    fails([1, 2], monkeypatch)
    with pytest.warns(UserWarning, match='tried again'): encoder_of(tmp_path, table, 'train.steps=1')
    assert load_training_state(tmp_path / 'regression')['updates'] == 4


def test_without_room_for_the_last_save_the_one_before_is_left(tmp_path, monkeypatch):
    fails([1, 2, 3], monkeypatch)
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match='The checkpoint of before is as it was'):
        warnings.simplefilter('ignore')
        table_of(tmp_path, 'pretrain.steps=3')
    assert load_training_state(tmp_path / 'checkpoint')['updates'] == 0
    table_of(tmp_path, 'pretrain.steps=3')
    assert not (tmp_path / 'checkpoint' / 'training_state.pt').exists() and [r['step'] for r in read_record(tmp_path)] == [1, 2, 3]


def test_no_room_for_the_first_save_is_an_error_at_once(tmp_path, monkeypatch):
    calls = fails([0], monkeypatch)
    with pytest.raises(CheckpointError, match='Nothing was saved'): table_of(tmp_path, 'pretrain.steps=3')
    assert len(calls) == 1


@pytest.mark.parametrize('number', stopping.STOPS)
def test_a_signal_in_the_last_save_waits_for_it(number, tmp_path, monkeypatch):
    calls, real = [], saving._write_files
    def write(*args):
        calls.append(0)
        if len(calls) == 2: signal.raise_signal(number)
        return real(*args)
    monkeypatch.setattr(saving, '_write_files', write)
    before = {s: signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL) for s in stopping.STOPS}
    try:
        with pytest.raises(KeyboardInterrupt), stopping.stops_interrupt(): table_of(tmp_path, 'pretrain.steps=3')
    finally:
        for s, handler in before.items(): signal.signal(s, handler)
    assert not (tmp_path / 'checkpoint' / 'training_state.pt').exists() and read_tensors(tmp_path / 'checkpoint')['table']


def test_a_table_that_diverges_keeps_its_finite_checkpoint(tmp_path):
    with pytest.raises(ValueError, match='update 2 diverged: .*; what was saved after update 1 is finite. Start anew with a smaller optim.lr'):
        table_of(tmp_path, 'pretrain.steps=40', 'pretrain.save_every=1', 'pretrain.optim.lr=1.0e+30', 'pretrain.optim.lr_warmup_steps=0')
    assert load_training_state(tmp_path / 'checkpoint')['updates'] == 1 == read_record(tmp_path)[-1]['step']
    assert load_checkpoint(tmp_path / 'checkpoint')  # refuses what is not finite


def test_a_regression_that_diverges_keeps_its_finite_checkpoint(table, tmp_path):
    with pytest.raises(ValueError, match='update 2 diverged: .*; what was saved after update 1 is finite'):
        encoder_of(tmp_path, table, 'encoder.output=matched', 'regression.steps=40', 'regression.save_every=1', 'regression.optim.lr=1.0e+30', 'regression.optim.lr_warmup_steps=0', 'train.steps=1')
    assert load_training_state(tmp_path / 'regression')['updates'] == 1
    assert all(t.isfinite().all() for t in read_tensors(tmp_path / 'regression')['encoder'].values())
