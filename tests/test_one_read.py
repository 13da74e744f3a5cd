"A command reads each checkpoint once, hashes it once, and lays its queries out once."
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from etrm.training import checkpoints, weights
from etrm.data import batches as data
from etrm.apps.cli import app
from etrm.experiments.configurations import load_config
from etrm.experiments.experiment import run
from etrm.experiments.pretraining import pretrain

CHANGES = ('decoder.hidden_size=32', 'decoder.num_heads=2', 'decoder.L_layers=1', 'decoder.H_cycles=1', 'decoder.L_cycles=1', 'decoder.halt_max_steps=2', 'tasks.max_train_groups=8',
           'tasks.max_eval_groups=2', 'tasks.pairs_per_task=6', 'pretrain.steps=1', 'pretrain.global_batch_size=4', 'pretrain.compile=false', 'train.steps=8', 'train.global_batch_size=4',
           'train.log_every=1', 'evaluation.num_aug=0')


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
    "A folder with a decoder, an encoder run and a task."
    folder = tmp_path_factory.mktemp('made')
    config = load_config('cfg_test_frozen_decoder', CHANGES)
    pretrain(config, folder / 'decoder')
    run(config, folder / 'decoder/checkpoint', folder, wandb_on=False, say=lambda line: None).rename(folder / 'encoder')
    pairs = [dict(input=[[1, n]], output=[[n, 1]]) for n in (2, 3, 4)]
    (folder / 'swap.json').write_text(json.dumps(dict(train=pairs[:2], test=pairs[2:])))
    return folder


@pytest.fixture
def reads(monkeypatch) -> dict[str, list]:
    "What is read, hashed and laid out: weights by their folder, batches by their number of samples."
    found = dict(read=[], hashed=[], laid_out=[])
    load_file, sha256, assemble = weights.load_file, checkpoints.sha256, data.assemble
    of = lambda file: Path(file).parent.parent.name
    monkeypatch.setattr(weights, 'load_file', lambda file, *more: found['read'].append(of(file)) or load_file(file, *more))
    monkeypatch.setattr(checkpoints, 'sha256', lambda file: (Path(file).suffix == '.safetensors' and found['hashed'].append(of(file))) or sha256(file))
    monkeypatch.setattr(data, 'assemble', lambda *args: found['laid_out'].append(len(args[1].puzzles)) or assemble(*args))
    return found


COMMANDS = {  # and how many sets of queries it asks
    'search {made}/swap.json --decoder {made}/decoder/checkpoint --steps 1': (['decoder'], 1),
    'search {made}/swap.json --decoder {made}/encoder/checkpoint --steps 1 --views 2': (['encoder'], 1),
    'search {made}/swap.json --decoder {made}/encoder/checkpoint --chains {made}/decoder/checkpoint --stages 2x1': (['decoder', 'encoder'], 1),
    'search-curves {made}/encoder/checkpoint --decoder {made}/decoder/checkpoint --sets variants --groups 2 --steps 1': (['decoder', 'encoder'], 1),
    'search-chains {made}/encoder/checkpoint --decoder {made}/decoder/checkpoint --sets variants --groups 2 --stages 2x1 --rows 2': (['decoder', 'encoder'], 1),
    'oracle cfg_test_frozen_decoder {changes} --decoder {made}/decoder/checkpoint --sets variants --steps 1': (['decoder'], 1),
    'side-by-side {made}/encoder/checkpoint --groups 2 --steps 1': (['encoder'], 4),
    'compare-contexts {made}/encoder/checkpoint --decoder {made}/decoder/checkpoint': (['decoder', 'encoder'], 4),
    'evaluate {made}/encoder/checkpoint': (['encoder'], 4),
    'evaluate {made}/decoder/checkpoint': (['decoder'], 2),  # the copies are of each task's own view
    'cycles {made}/decoder/checkpoint --l-cycles 2 --groups 2': (['decoder'], 1),
    'cycles {made}/encoder/checkpoint --h-cycles 2 --groups 2': (['encoder'], 1),
    'cut-gradients {made}/encoder/checkpoint --groups 2': (['encoder'], 1),
    'run cfg_test_frozen_decoder {changes} --decoder {made}/decoder/checkpoint --runs {made}/runs --no-wandb': (['decoder'], None),
}


@pytest.mark.parametrize('line', COMMANDS)
def test_a_command_reads_once(line, made, reads):
    (checkpoints_read, sets), arguments = COMMANDS[line], line.format(made=made, changes=' '.join(CHANGES)).split()
    done = CliRunner().invoke(app, [*arguments, '--device', 'cpu'])
    assert done.exit_code == 0, done.stderr or done.exception
    assert done.stderr.startswith('etrm: device cpu')
    assert sorted(reads['read']) == checkpoints_read
    assert {name: reads['hashed'].count(name) for name in checkpoints_read} == dict.fromkeys(checkpoints_read, 1)
    assert sets is None or len(reads['laid_out']) == sets, reads['laid_out']


def test_a_study_reads_its_decoder_once(made, reads, tmp_path):
    (tmp_path / 'study.yaml').write_text('name: small\nbase: cfg_test_frozen_decoder\nseeds: [0]\nvariants: {report: [], attentive: [encoder.pooling=attention]}\nsearch_steps: 1\n')
    done = CliRunner().invoke(app, ['study', str(tmp_path / 'study.yaml'), *CHANGES, '--decoder', str(made / 'decoder/checkpoint'), '--runs', str(tmp_path), '--device', 'cpu'])
    assert done.exit_code == 0, done.stderr or done.exception
    assert reads['read'] == ['decoder'] and reads['hashed'].count('decoder') == 1
