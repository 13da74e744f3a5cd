"Beside each result stands what it depends on: checkpoints by their digests, task sets, configuration, code."
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from test_one_read import CHANGES as OF_READS, made  # noqa: F401, a fixture

from etrm.apps.cli import app
from etrm.experiments.configurations import load_config
from etrm.experiments.experiment import run
from etrm.experiments.pretraining import pretrain
from etrm.training.checksums import write_checksums

CHANGES = (*OF_READS, 'pretrain.steps=2')
SEEDS = {'tasks.seed': 0, 'pretrain.seed': 0, 'train.seed': 0}


def digest(file: Path) -> str: return hashlib.sha256(file.read_bytes()).hexdigest()


def etrm(line: str, **places) -> str:
    "What a command answers; places stand in braces."
    done = CliRunner().invoke(app, [word.format(**places) for word in line.split()])
    assert done.exit_code == 0, done.stderr or done.exception
    return done.stdout


def read(file: Path): return json.loads(file.read_text())


CURVES = ('search-curves {encoder} --decoder {decoder} --sets variants,validation --groups 2 --steps 1 '
          '--device cpu --out {out}')


def curves(encoder: Path, decoder: Path, out: Path) -> dict:
    etrm(CURVES, encoder=encoder, decoder=decoder, out=out)
    return read(out.with_name(f'{out.stem}.provenance.json'))


def test_a_row_file_has_beside_it_what_it_depends_on(made, tmp_path):
    encoder, decoder = made / 'encoder/checkpoint', made / 'decoder/checkpoint'
    found = curves(encoder, decoder, tmp_path / 'rows.json')
    for place in (encoder, decoder):
        for name in ('model.safetensors', 'config.yaml'): assert found['read'][str(place / name)] == digest(place / name)
    assert found['sets'] == {'variants': dict(tasks=2, kind='held out'), 'validation': dict(tasks=2, kind='validation')}
    assert found['wrote'] == {'rows.json': digest(tmp_path / 'rows.json')}
    assert found['config']['tasks']['max_eval_groups'] == 2 and found['config']['decoder']['hidden_size'] == 32
    assert SEEDS.items() <= found['seeds'].items()
    assert (found['device'], found['processes']) == ('cpu', 1) and found['arguments'] == sys.argv[1:]


def test_another_checkpoint_has_another_digest(made, tmp_path):
    place = shutil.copytree(made / 'encoder/checkpoint', tmp_path / 'other')
    weights, before = place / 'model.safetensors', curves(place, made / 'decoder/checkpoint', tmp_path / 'rows.json')
    content = bytearray(weights.read_bytes())
    content[-4:] = b'\0\0\0\0'  # the last of its numbers
    weights.write_bytes(content)
    (place / 'SHA256SUMS').unlink()
    write_checksums(place)
    after = curves(place, made / 'decoder/checkpoint', tmp_path / 'rows.json')
    differ = {file for file in after['read'] if after['read'][file] != before['read'].get(file)}
    assert differ == {str(weights)} and after['read'][str(weights)] == digest(weights)


def test_a_checkpoint_without_a_list_of_checksums_is_named_too(made, tmp_path):
    place = shutil.copytree(made / 'encoder/checkpoint', tmp_path / 'other')
    (place / 'SHA256SUMS').unlink()
    found = curves(place, made / 'decoder/checkpoint', tmp_path / 'rows.json')['read']
    for name in ('model.safetensors', 'config.yaml'): assert found[str(place / name)] == digest(place / name)


def test_a_submission_and_a_folder_of_results(made, tmp_path):
    etrm('search {made}/swap.json --decoder {made}/decoder/checkpoint --steps 1 --out {out}', made=made, out=tmp_path / 'submission.json')
    assert read(tmp_path / 'submission.provenance.json')['sets'] == {str(made / 'swap.json'): dict(tasks=1, kind='given')}
    for n in (1, 2):
        etrm('evaluate {made}/encoder/checkpoint --max-eval-groups 2 --out {out}', made=made, out=tmp_path / 'results')
        assert len(entries := read(tmp_path / 'results/provenance.json')) == n
    assert entries[1]['sets']['training tasks'] == dict(tasks=2, kind='training')
    assert entries[1]['sets']['variants'] == dict(tasks=2, kind='held out')
    assert entries[1]['config']['tasks']['max_eval_groups'] == 2
    weights = made / 'encoder/checkpoint/model.safetensors'
    assert entries[1]['read'][str(weights)] == digest(weights)


def test_folders_that_a_command_makes(made, tmp_path):
    etrm('export {made}/decoder/checkpoint {out}', made=made, out=tmp_path / 'official')
    weights = made / 'decoder/checkpoint/model.safetensors'
    assert read(tmp_path / 'official/provenance.json')[0]['read'][str(weights)] == digest(weights)
    etrm(f'data lab {{out}} {" ".join(CHANGES)}', out=tmp_path / 'set')
    entry, = read(tmp_path / 'set/provenance.json')
    assert entry['sets'] == {'all training tasks': dict(tasks=8, kind='training'), 'variants': dict(tasks=2, kind='held out')}
    assert entry['config']['tasks']['max_train_groups'] == 8


def test_a_command_that_fails_leaves_no_record(made, tmp_path):
    line = CURVES.replace('validation', 'nowhere').format(encoder=made / 'encoder/checkpoint', decoder=made / 'decoder/checkpoint', out=tmp_path / 'rows.json')
    (tmp_path / 'rows.json').write_text('of before')
    assert CliRunner().invoke(app, line.split()).exit_code == 2
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('rows.json', 'of before')]


def test_a_resumed_run_has_two_entries(tmp_path):
    line = f'pretrain lab {" ".join(CHANGES)} --no-wandb --device cpu --runs {{runs}}'
    folder = Path(etrm(f'{line} --until 1', runs=tmp_path).strip()).parent
    saved = digest(folder / 'checkpoint/training_state.pt')
    etrm(f'{line} --resume {{folder}}', runs=tmp_path, folder=folder)
    first, second = read(folder / 'provenance.json')
    assert (first['ended'], second['ended']) == ('done', 'done')
    assert str(folder / 'checkpoint/training_state.pt') not in first['read']
    assert second['read'][str(folder / 'checkpoint/training_state.pt')] == saved
    for entry in (first, second):
        assert entry['config']['pretrain']['steps'] == 2 and SEEDS.items() <= entry['seeds'].items()
        assert entry['sets']['all training tasks'] == dict(tasks=8, kind='training')


def test_a_study_says_it_for_each_run_and_for_its_rows(made, tmp_path):
    (tmp_path / 's.yaml').write_text('name: small\nbase: cfg_test_frozen_decoder\nseeds: [0]\nequal_compute: false\n'
                                     'variants: {report: [], attentive: [encoder.pooling=attention]}\n')
    etrm(f'study {{tmp}}/s.yaml {" ".join(CHANGES)} --decoder {{made}}/decoder/checkpoint --runs {{tmp}} --out {{tmp}}/rows.json', tmp=tmp_path, made=made)
    pooling = {}
    for variant in ('report', 'attentive'):
        entry, = read(tmp_path / f'study-small/{variant}-0/provenance.json')
        pooling[variant] = entry['config']['encoder'].get('pooling')
        assert entry['sets']['variants'] == dict(tasks=2, kind='held out')
    assert pooling['attentive'] == 'attention' != pooling['report']
    whole = read(tmp_path / 'rows.provenance.json')
    assert whole['config']['variants'] == dict(report=[], attentive=['encoder.pooling=attention']) and whole['seeds']['seeds'] == [0]
    assert whole['sets']['variants'] == dict(tasks=2, kind='held out')
    assert str(made / 'decoder/checkpoint/model.safetensors') in whole['read']


@pytest.mark.parametrize('number, ended', [(signal.SIGTERM, 'interrupted'), (signal.SIGKILL, None)])
def test_a_run_that_is_stopped_or_killed_has_its_entry(number, ended, tmp_path):
    line = ['pretrain', 'lab', *CHANGES, 'pretrain.steps=1000000', 'pretrain.log_every=1', '--no-wandb', '--device', 'cpu', '--runs', str(tmp_path)]
    process = subprocess.Popen([sys.executable, '-m', 'etrm.apps.cli', *line], stderr=subprocess.PIPE)
    record, deadline = tmp_path / 'lab-pretrain-001/record.jsonl', time.monotonic() + 600
    while not (record.exists() and record.stat().st_size) and time.monotonic() < deadline: time.sleep(.05)
    os.kill(process.pid, number)
    said = process.communicate(timeout=600)[1].decode()
    assert process.returncode == (130 if ended else -number), said
    entry, = read(record.with_name('provenance.json'))
    assert entry['ended'] == ended and entry['arguments'] == line
    assert entry['sets']['all training tasks'] == dict(tasks=8, kind='training')
