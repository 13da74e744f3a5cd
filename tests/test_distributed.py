"""Two processes compute what one computes: losses, weights, pass@k; by `torchrun` too."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.overrides import TorchFunctionMode

from etrm.training.checkpoints import read_tensors
from etrm.experiments.configurations import load_config
from etrm.data.puzzles import puzzle_data
from etrm.data.stream import Stream
from etrm.model.decoder import Decoder
from etrm.basics.distributed import draw, processes
from etrm.experiments.encoder_training import new_encoder, train_encoder
from etrm.experiments.evaluating import evaluate
from etrm.experiments.pretraining import new_table, pretrain
from etrm.experiments.runs import open_run
from etrm.experiments.run_settings import settings_of
from etrm.experiments.task_sets import make_task_sets
from etrm.training.records import read_record
from etrm.training.trainer import Trainer

FORKS = mp.get_context('forkserver')  # imports once, and starts clean of this process's threads
FORKS.set_forkserver_preload(['etrm.experiments.experiment'])
TINY = ('decoder.hidden_size=32', 'decoder.num_heads=2', 'decoder.L_layers=1', 'decoder.H_cycles=2', 'decoder.L_cycles=1', 'decoder.puzzle_emb_len=2', 'decoder.halt_max_steps=3',
        'decoder.halt_exploration_prob=0.5', 'decoder.forward_dtype=float32', 'tasks.fold=0', 'tasks.max_train_groups=6', 'tasks.max_eval_groups=6', 'tasks.pairs_per_task=6', 'evaluation.num_aug=1', 'evaluation.batch_size=5',
        *(f'{phase}.{setting}' for phase in ('pretrain', 'train') for setting in ('steps=8', 'global_batch_size=12', 'log_every=3', 'save_every=0', 'eval_every=0', 'compile=false', 'optim.lr=0.001', 'optim.lr_warmup_steps=2', 'optim.grad_clip=0.5', 'optim.ema_rate=0.9')))
TABLE = ('table.init_std=0.5', 'table.noise=0.1', 'translate=true', 'pretrain.eval_every=4')
ENCODER = ('encoder.output=matched', 'encoder.variational=set', 'regression.steps=4', 'regression.global_batch_size=12', 'regression.optim.lr=0.001', 'train.freeze_decoder=false')


def one_run(folder: Path):
    "Table pre-training, then regression and encoder training, then the evaluation; the halting head starts undecided, so slots halt at different steps."
    torch.set_num_threads(1)
    begin = Decoder.__init__
    def undecided(self, config):
        begin(self, config)
        torch.nn.init.zeros_(self.q_head.bias); torch.nn.init.normal_(self.q_head.weight)
    Decoder.__init__ = undecided
    try: decoder, table = pretrain(load_config('lab', TINY + TABLE), folder / 'table')
    finally: Decoder.__init__ = begin
    config = load_config('cfg_test_frozen_decoder', TINY + ENCODER)
    train, sets = make_task_sets(config)
    with open_run(folder / 'encoder', settings_of('train', config)) as record: encoder = train_encoder(config, decoder, table, train, record)
    rows, _ = evaluate(config, decoder, encoder, None, sets)
    return dict(decoder=decoder.state_dict(), table=table.state_dict(), encoder=encoder.state_dict()), rows


def one_of(n: int, rank: int, port: int, folder: Path):
    os.environ |= dict(WORLD_SIZE=str(n), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    with processes(): weights, rows = one_run(folder)
    torch.save(weights, folder / f'weights{rank}.pt')
    (folder / f'rows{rank}.json').write_text(json.dumps(rows))


def on(n: int, folder: Path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    started = [FORKS.Process(target=one_of, args=(n, rank, port, folder)) for rank in range(n)]
    for p in started: p.start()
    for p in started: p.join()
    assert [p.exitcode for p in started] == [0] * n
    return [(torch.load(folder / f'weights{r}.pt'), json.loads((folder / f'rows{r}.json').read_text())) for r in range(n)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(f'on{n}') for n in (1, 2)]
    return folders, on(1, folders[0])[0], on(2, folders[1])


def apart(a, b): return float((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30))


def test_weights_are_those_of_one_process_and_equal_on_both(runs):
    _, (alone, _), ((first, _), (second, _)) = runs
    for part in alone:
        for name, tensor in alone[part].items():
            assert torch.equal(first[part][name], second[part][name]), (part, name)
            assert apart(tensor, first[part][name]) <= 1e-5, (part, name, apart(tensor, first[part][name]))


def test_records_are_those_of_one_process(runs):
    (one, two), _, _ = runs
    for phase in ('table', 'encoder'):
        a, b = read_record(one / phase), read_record(two / phase)
        assert [list(r) for r in a] == [list(r) for r in b] and len(a) >= 3
        for x, y in zip(a, b):
            for key in x: assert y[key] == pytest.approx(x[key], rel=1e-5, abs=1e-7, nan_ok=True), (phase, x['step'], key)
    halted = [r['train/steps'] for r in read_record(two / 'table') if 'train/steps' in r]
    assert any(1 < steps < 3 for steps in halted), f'all slots halt at once, exploration was not put to the test: {halted}'


def test_scores_are_those_of_one_process(runs):
    _, (_, alone), ((_, first), (_, second)) = runs
    assert first == alone and second == alone
    assert any(r['n'] > 5 for r in alone), 'one batch would leave the second process nothing to answer'


def test_torchrun_runs_the_experiment_and_writes_once(runs, tmp_path):
    (one, _), _, _ = runs
    etrm = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'etrm.apps.cli']
    arguments = ['run', 'cfg_test_frozen_decoder', *TINY, 'train.steps=12', '--decoder', one / 'table' / 'checkpoint', '--runs', tmp_path / 'runs', '--no-wandb']
    done = subprocess.run([*etrm, *map(str, arguments)], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1', 'WANDB_MODE': 'disabled'})
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if 'etrm:' in line] or done.stderr[-2000:]
    folders = list((tmp_path / 'runs').iterdir())
    assert [f.name for f in folders] == ['cfg_test_frozen_decoder-001'] and done.stdout.count('(this verdict)') == 1
    steps = [r['step'] for r in read_record(folders[0])]
    assert steps == sorted(steps) and steps.count(12) == 2  # one row of training, one of the evaluation
    assert read_tensors(folders[0] / 'checkpoint')['encoder']


DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial, torch.nn.functional.dropout,
         torch.rand_like, torch.randn_like, torch.randint_like}


class DrawsForAll(TorchFunctionMode):
    "Inside, a draw that is not made by `draw` is an error: on several processes each would draw the same."
    def __init__(self): super().__init__(); self.seen = 0
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in DRAWS:
            frames, frame = [], sys._getframe(1)
            while frame: frames.append(frame.f_code); frame = frame.f_back
            assert draw.__code__ in frames, f'{function.__name__} is called without draw'
            self.seen += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('source', ['table', 'encoder.variational=pair', 'encoder.variational=set'])
def test_whatever_draws_in_an_update_draws_for_all_processes(source):
    config = load_config('cfg_test_frozen_decoder', (*TINY, *TABLE[:3], *([] if source == 'table' else [source])))
    data = puzzle_data(make_task_sets(config)[0], config.decoder.canvas)
    decoder = Decoder(config.decoder)
    made = new_table(config, data) if source == 'table' else new_encoder(config, decoder, None)
    trainer = Trainer(decoder, made, Stream(data, 12, num_demos=0 if source == 'table' else 4), config.train.with_(freeze_decoder=False))
    with DrawsForAll() as found: trainer.step()
    assert found.seen == 3  # exploration, the earliest step, and the source's own
