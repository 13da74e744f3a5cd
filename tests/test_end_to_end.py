"""What crosses notebooks: the shipped decoder, frozen training, ARC at both sizes, the command in its own process, kill and resume."""
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from etrm.training.checkpoints import load_checkpoint
from etrm.experiments.configurations import load_config
from etrm.data.puzzles import puzzle_data, unaugmented
from etrm.evaluation.intervals import clopper_pearson
from etrm.experiments.encoder_training import train_encoder
from etrm.experiments.experiment import check_decoder, run
from etrm.experiments.pretraining import pretrain
from etrm.evaluation.answers import solved_queries
from etrm.training.records import new_run_folder, Record, read_record
from etrm.experiments.task_sets import make_task_sets
from etrm.tasks.leakage import check_leakage, pair_keys

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / 'checkpoints/lineage_1/decoder/checkpoint'
SMALL = ('decoder.hidden_size=32', 'decoder.num_heads=2', 'decoder.L_layers=1', 'decoder.H_cycles=1', 'decoder.L_cycles=1', 'decoder.puzzle_emb_len=2', 'decoder.halt_max_steps=2', 'decoder.forward_dtype=float32')


@pytest.fixture(scope='module')
def lab():
    config = load_config('cfg_test_frozen_decoder', ('tasks.max_eval_groups=128', 'tasks.pairs_per_task=64', 'train.steps=8', 'train.log_every=2', 'train.global_batch_size=16'))
    return config, *load_checkpoint(LAB)[:2], *make_task_sets(config)


def etrm(*arguments, **options):
    return subprocess.run([sys.executable, '-m', 'etrm.apps.cli', *map(str, arguments)], capture_output=True, text=True, env=os.environ | {'WANDB_MODE': 'disabled'}, **options)


def test_shipped_decoder_solves_two_of_five_of_its_own_tasks_on_fresh_queries(lab):
    config, decoder, table, train, sets = lab
    hits = solved_queries(decoder, table, unaugmented(sets['training tasks'], puzzle_data(train, config.decoder.canvas)), 0, 256)
    assert hits.mean() >= .35, f'{hits.sum()} of {len(hits)}, interval {clopper_pearson(int(hits.sum()), len(hits))}'


def test_table_rows_matter_to_the_shipped_decoder(lab):
    config, decoder, table, train, sets = lab
    other = copy.deepcopy(table)
    other.weights[1:] = other.weights[1:].roll(1, 0)
    hits = solved_queries(decoder, other, unaugmented(sets['training tasks'], puzzle_data(train, config.decoder.canvas)), 0, 256)
    assert hits.mean() < .05


def test_frozen_decoder_is_bit_identical_and_every_encoder_tensor_moves(lab, tmp_path):
    config, decoder, table, train, _ = lab
    torch.manual_seed(config.train.seed)
    from etrm.model.encoders import DemoEncoder
    start = {n: p.detach().clone() for n, p in DemoEncoder(config.encoder_config(decoder.config)).named_parameters()}
    encoder = train_encoder(config, decoder, table, train, Record(tmp_path))
    assert check_decoder(decoder, LAB) == '14 of 14 tensors equal'
    still = [n for n, p in encoder.named_parameters() if torch.equal(p, start[n])]
    assert still == []
    assert all(row['grad/inner_norm'] == 0 and row['grad/encoder_norm'] > 0 for row in read_record(tmp_path))


def test_sets_share_no_pair_and_a_planted_leak_is_found(lab):
    _, _, _, train, sets = lab
    keys = {name: set(pair_keys(tasks).tolist()) for name, tasks in {'training': train, **sets}.items()}
    names = list(keys)
    assert all(not keys[a] & keys[b] for i, a in enumerate(names) for b in names[i + 1:])
    with pytest.raises(ValueError, match='share'): check_leakage({'training': train, 'variants': sets['variants'] + train[:1]})


@pytest.mark.parametrize('name, overrides', [
    pytest.param('arc1_10x10', ('tasks.max_train_groups=6', 'tasks.max_eval_groups=2', 'tasks.num_aug=2'), id='10x10'),
    pytest.param('arc1_10x10_rows_first', ('tasks.max_train_groups=6', 'tasks.max_eval_groups=2', 'tasks.num_aug=2', 'pretrain.compile=false', 'regression.steps=4', 'regression.global_batch_size=4', 'regression.log_every=2'), id='10x10, rows first'),
    pytest.param('arc1_10x10', ('decoder.canvas=30', 'tasks.max_train_groups=3', 'tasks.max_eval_groups=2', 'tasks.num_aug=1', 'num_demos=2', 'pretrain.global_batch_size=2', 'train.global_batch_size=2'), id='30x30')])
def test_arc_end_to_end(name, overrides, tmp_path):
    config = load_config(name, SMALL + ('pretrain.global_batch_size=4', 'train.global_batch_size=4', 'pretrain.steps=4', 'pretrain.log_every=2', 'pretrain.eval_every=4', 'pretrain.save_every=2',
                                                'train.steps=16', 'train.log_every=2', 'evaluation.num_aug=1') + overrides)
    pretrain(config, new_run_folder(tmp_path, 'pretrain'))
    folder = run(config, tmp_path / 'pretrain-001' / 'checkpoint', tmp_path, wandb_on=False)
    verdict, rows = json.loads((folder / 'verdict.json').read_text()), json.loads((folder / 'results.json').read_text())
    assert verdict['scenario'] in ('B', 'undecided')  # two tasks cannot tell A from C
    assert {r['set'] for r in rows} == {'training tasks', 'evaluation'}
    assert not (folder / 'regression').exists()  # kept for resuming only
    answers = json.loads((folder / 'submission.json').read_text())
    held_out = make_task_sets(config)[1]['evaluation']
    assert {t.name: len(t.test) for t in held_out} == {name: len(a) for name, a in answers.items()}
    assert all(np.array(x['attempt_1']).ndim == 2 or x['attempt_1'] == [] for a in answers.values() for x in a)


def test_full_size_configuration_is_the_official_one():
    c = load_config('arc1').decoder
    assert (c.hidden_size, c.num_heads, c.L_layers, c.H_cycles, c.L_cycles, c.puzzle_emb_len, c.halt_max_steps, c.canvas) == (512, 8, 2, 3, 4, 16, 16, 30)


def test_command_line_in_its_own_process(tmp_path):
    same = etrm('verify-decoder', '--trm-checkpoint', LAB, '--etrm-checkpoint', LAB)
    assert (same.returncode, same.stdout.splitlines()[-2]) == (0, '14 of 14 decoder tensors equal')
    wrong = etrm('run', 'cfg_test_frozen_decoder', 'train.step=5', '--runs', tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, '') and "did you mean 'steps'?" in wrong.stderr
    nothing = etrm('evaluate', tmp_path / 'nowhere')
    assert nothing.returncode == 2 and 'Traceback' not in nothing.stderr


def test_importing_the_package_needs_no_notebook_software():
    code = "import sys, etrm.experiments.experiment, etrm.apps.cli; print([m for m in ('jupyterlab', 'nbdev', 'IPython', 'ipywidgets') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == '[]'


def test_a_killed_pretraining_resumes_to_the_same_weights(tmp_path):
    changes = SMALL + ('tasks.max_train_groups=6', 'tasks.max_eval_groups=4', 'tasks.pairs_per_task=8', 'pretrain.global_batch_size=8', 'pretrain.steps=60', 'pretrain.save_every=3', 'pretrain.eval_every=0',
                       'pretrain.log_every=10', 'pretrain.compile=false')
    config = load_config('lab', changes)
    (straight := tmp_path / 'straight').mkdir(); (broken := tmp_path / 'broken').mkdir()
    whole, _ = pretrain(config, straight)
    process = subprocess.Popen([sys.executable, '-m', 'etrm.apps.cli', 'pretrain', 'lab', *changes, '--resume', str(broken), '--no-wandb'], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (broken / 'checkpoint' / 'training_state.pt').exists() and process.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    process.send_signal(signal.SIGKILL); process.wait()
    assert (broken / 'checkpoint').exists()
    resumed, _ = pretrain(config, broken)
    for name, tensor in whole.state_dict().items(): assert torch.equal(tensor, resumed.state_dict()[name]), name
