"""Killed at any moment, in the middle of a save too, a run goes on to the same weights and the same record, bit for bit."""
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from etrm.training import saving
from etrm.training.checkpoints import load_checkpoint, read_tensors
from etrm.training.saving import restore_previous_save, load_training_state, save_checkpoint
from etrm.experiments.configurations import load_config
from etrm.model.decoder import Decoder
from etrm.experiments.encoder_training import train_encoder
from etrm.experiments.pretraining import pretrain
from etrm.experiments.runs import open_run
from etrm.experiments.run_settings import settings_of
from etrm.experiments.task_sets import make_task_sets

FORKS = mp.get_context('forkserver')  # imports once, and starts clean of this process's threads
FORKS.set_forkserver_preload(['etrm.experiments.encoder_training'])
TINY = ('decoder.hidden_size=32', 'decoder.num_heads=2', 'decoder.L_layers=1', 'decoder.H_cycles=1', 'decoder.L_cycles=1', 'decoder.puzzle_emb_len=2', 'decoder.halt_max_steps=3',
        'decoder.forward_dtype=float32', 'tasks.max_train_groups=4', 'tasks.max_eval_groups=2', 'tasks.pairs_per_task=4',
        *(f'{phase}.{setting}' for phase in ('pretrain', 'train') for setting in ('steps=12', 'global_batch_size=8', 'log_every=3', 'save_every=1', 'eval_every=4', 'compile=false', 'optim.lr=0.001', 'optim.lr_warmup_steps=2')))
TABLE = load_config('lab', TINY + ('table.init_std=0.5', 'table.noise=0.1', 'translate=true'))
ENCODER = load_config('cfg_test_frozen_decoder', TINY + ('encoder.output=matched', 'encoder.variational=set', 'train.freeze_decoder=false', 'train.steps=6', *(f'regression.{s}' for s in ('steps=6', 'global_batch_size=8', 'save_every=1', 'log_every=2'))))


def train_table(folder: Path, table: Path): pretrain(TABLE, folder)


def train_with_regression(folder: Path, table: Path):
    decoder, rows, _ = load_checkpoint(table / 'checkpoint')
    with open_run(folder, settings_of('train', ENCODER, dict(decoder=table / 'checkpoint'))) as record:
        train_encoder(ENCODER, decoder, rows, make_task_sets(ENCODER)[0], record)


def child(train, folder: Path, table: Path, dies_at: int, threads: int = 1):  # 0 lives
    torch.set_num_threads(threads)
    if dies_at: die_in_a_save(dies_at)
    train(folder, table)


def die_in_a_save(at: int):
    "Kill this process in the `at`-th act on files of its saves: an odd one before it, an even one after it, or with half of the file written."
    acts = 0
    def watched(function):
        def act(*args, **kwargs):
            nonlocal acts
            acts += 1
            if acts == at and at % 2: os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if acts == at:
                if function in (tensors_to, state_to): os.truncate(args[1], Path(args[1]).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return act
    tensors_to, state_to = saving.save_file, torch.save
    saving.save_file, torch.save = watched(tensors_to), watched(state_to)
    os.replace, shutil.rmtree = watched(os.replace), watched(shutil.rmtree)


def start(*arguments):
    process = FORKS.Process(target=child, args=arguments)
    process.start()
    return process


def files_in(folder: Path) -> set[Path] | None:  # None: they change as one looks
    try: return set(folder.rglob('*'))
    except FileNotFoundError: return None


def to_the_end(train, folder: Path, table: Path) -> tuple[dict, str]:
    process = start(train, folder, table, 0)
    process.join()
    assert process.exitcode == 0
    return read_tensors(folder / 'checkpoint'), (folder / 'record.jsonl').read_text()


def good_updates(folder: Path) -> list[int]:
    "How far the last good checkpoints of both phases are: each is whole and readable."
    found = []
    for place in (folder / 'regression', folder / 'checkpoint'):
        restore_previous_save(place)
        if place.exists(): read_tensors(place)
        found.append(load_training_state(place)['updates'] if (place / 'training_state.pt').exists() else 1000 if place.exists() else 0)
    return found


def assert_same(found, expected):
    for part, tensors in expected[0].items():
        for name, tensor in tensors.items(): assert torch.equal(tensor, found[0][part][name]), (part, name)
    assert found[1] == expected[1]


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp('straight')
    (folder / 'encoder').mkdir()
    table = to_the_end(train_table, folder / 'table', folder / 'table')
    return folder / 'table', {train_table: table, train_with_regression: to_the_end(train_with_regression, folder / 'encoder', folder / 'table')}


@pytest.mark.parametrize('train', [train_table, train_with_regression])
def test_killed_within_saves(train, straight, tmp_path):
    "A save is six or seven acts; the first kill comes in the first save, and the following go through all places of a save."
    table, expected = straight
    kills, before = [], [0, 0]
    for dies_at in (2, 4, 13, 14, 15, 16, 17, 18, 19, 20, 0):
        process = start(train, tmp_path, table, dies_at)
        process.join()
        if process.exitcode == 0: break
        assert process.exitcode == -signal.SIGKILL
        now = good_updates(tmp_path)
        assert all(n >= b for n, b in zip(now, before)), f'killed at act {dies_at}: the last good checkpoint went from {before} to {now}'
        kills.append(now); before = now
    assert len(kills) >= 6 and len({tuple(k) for k in kills}) >= 4, kills
    assert_same(to_the_end(train, tmp_path, table), expected[train])


@pytest.mark.parametrize('train', [train_table, train_with_regression])
def test_killed_at_random_moments(train, straight, tmp_path):
    table, expected = straight
    rng, kills, longest = np.random.default_rng(time.time_ns()), 0, .25
    for _ in range(30):
        process = start(train, tmp_path, table, 0)
        before = files_in(tmp_path)
        while process.is_alive() and files_in(tmp_path) == before: time.sleep(.001)  # it has begun to write
        process.join(rng.uniform(0, longest))
        process.kill(); process.join()
        if process.exitcode == -signal.SIGKILL: kills += 1
        else:  # it was faster than the kill: once more from the start, and sooner
            longest /= 2
            for place in tmp_path.iterdir(): shutil.rmtree(place) if place.is_dir() else place.unlink()
        if kills == 4: break
    assert kills == 4, f'killed {kills} times in 30'
    assert_same(to_the_end(train, tmp_path, table), expected[train])


def test_a_finished_run_is_read_back_and_another_configuration_is_refused(straight, tmp_path):
    table, expected = straight
    folder = shutil.copytree(table, tmp_path / 'again')
    decoder, rows = pretrain(TABLE, folder)
    assert torch.equal(rows.weights, expected[train_table][0]['table']['weights']) and (folder / 'record.jsonl').read_text() == expected[train_table][1]
    longer = TABLE.with_(pretrain=dict(steps=13))
    with pytest.raises(ValueError, match='pretrain.steps is 12 there, 13 now'): pretrain(longer, folder)


def train_through_the_decoder(folder: Path, table: Path):
    "Batches large enough for torch to share each operation among its threads; decoder and encoder train."
    config = load_config('cfg_test_frozen_decoder', TINY + ('train.steps=4', 'train.global_batch_size=64', 'train.freeze_decoder=false'))
    torch.manual_seed(0)
    decoder = Decoder(config.decoder)
    encoder = train_encoder(config, decoder, None, make_task_sets(config)[0], lambda *_: None)
    save_checkpoint(folder / 'checkpoint', dict(decoder=decoder, encoder=encoder), config.model_dump(mode='json'))


def test_threads_add_up_in_one_order(tmp_path):
    "Gradients that threads add to one another's in no fixed order would differ from run to run."
    found = []
    for i in range(3):
        process = start(train_through_the_decoder, tmp_path / str(i), tmp_path, 0, 2)
        process.join()
        assert process.exitcode == 0
        found.append((read_tensors(tmp_path / str(i) / 'checkpoint'), ''))
    for again in found[1:]: assert_same(again, found[0])
