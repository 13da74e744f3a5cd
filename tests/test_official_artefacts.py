"""Official checkpoints as they are downloaded, and ours in their layout: read by plain torch and yaml, sharing no code with the writer."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from etrm.training.checkpoints import REAL_RULES, load_checkpoint
from etrm.training.checksums import CheckpointError
from etrm.training.saving import save_checkpoint
from etrm.model.contexts import PuzzleEmbedding
from etrm.model.decoder import Decoder, DecoderConfig
from etrm.training.official import export_official

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / 'checkpoints/lineage_1/decoder/checkpoint'
FIXTURE = ROOT.parent / 'shared' / 'fixtures' / 'official_trm_small'
# the official program's own names; the fixture, where it is at hand, says the same
NAMES = {'_orig_mod.model.inner.' + n for n in (
    'embed_tokens.embedding_weight', 'lm_head.weight', 'q_head.weight', 'q_head.bias', 'H_init', 'L_init', 'puzzle_emb.weights',
    *(f'L_level.layers.{i}.{w}.weight' for i in (0, 1) for w in ('self_attn.qkv_proj', 'self_attn.o_proj', 'mlp.gate_up_proj', 'mlp.down_proj')))}
ARCH = {'H_cycles', 'H_layers', 'L_cycles', 'L_layers', 'expansion', 'forward_dtype', 'halt_exploration_prob', 'halt_max_steps', 'hidden_size', 'loss', 'mlp_t', 'name', 'no_ACT_continue',
        'num_heads', 'pos_encodings', 'puzzle_emb_len', 'puzzle_emb_ndim'}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "The shipped decoder in the official layout."
    return export_official(LAB, tmp_path_factory.mktemp('official') / 'lab')


def official_shapes(arch, rows, vocab=12):
    "What the official program would allocate for this `arch`, by its own rules."
    D, N = arch['hidden_size'], arch['L_layers']
    inner = -(-round(arch['expansion'] * D * 2 / 3) // 256) * 256
    shapes = {'embed_tokens.embedding_weight': (vocab, D), 'lm_head.weight': (vocab, D), 'q_head.weight': (2, D), 'q_head.bias': (2,), 'H_init': (D,), 'L_init': (D,), 'puzzle_emb.weights': (rows, arch['puzzle_emb_ndim'])}
    for i in range(N):
        layer = f'L_level.layers.{i}.'
        shapes |= {layer + 'self_attn.qkv_proj.weight': (3 * D, D), layer + 'self_attn.o_proj.weight': (D, D), layer + 'mlp.gate_up_proj.weight': (2 * inner, D), layer + 'mlp.down_proj.weight': (D, inner)}
    return {'_orig_mod.model.inner.' + n: s for n, s in shapes.items()}


def test_what_we_write_has_the_official_names_and_shapes(written):
    assert sorted(p.name for p in written.parent.iterdir()) == ['all_config.yaml', 'identifiers.json', written.name] and re.fullmatch(r'step_\d+', written.name)
    tensors = torch.load(written, weights_only=True)
    config = yaml.safe_load((written.parent / 'all_config.yaml').read_text())
    assert tensors.keys() == NAMES and config['arch'].keys() == ARCH | {'canvas'}  # which the program there passes over
    rows = tensors['_orig_mod.model.inner.puzzle_emb.weights']
    assert {n: tuple(t.shape) for n, t in tensors.items()} == official_shapes(config['arch'], len(rows))
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors.values())
    assert (config['arch']['pos_encodings'], config['arch']['mlp_t'], config['arch']['name']) == ('rope', False, 'recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1')


@pytest.mark.skipif(not FIXTURE.is_dir(), reason=f'no official decoder fixture at {FIXTURE}')
def test_the_fixture_has_the_same_names_shapes_and_keys(written):
    tensors, config = torch.load(FIXTURE / 'step_1', weights_only=True), yaml.safe_load((FIXTURE / 'all_config.yaml').read_text())
    ours = yaml.safe_load((written.parent / 'all_config.yaml').read_text())
    assert tensors.keys() == NAMES and config['arch'].keys() == ARCH
    assert {n: tuple(t.shape) for n, t in tensors.items()} == official_shapes(config['arch'], len(tensors['_orig_mod.model.inner.puzzle_emb.weights']))
    assert config.keys() - ours.keys() == {'data_paths', 'epochs'} and not ours.keys() - config.keys()  # those two are of a dataset on a disk
    for key, value in config['arch'].items(): assert type(ours['arch'][key]) in (type(value), float if isinstance(value, int) else type(value)), key


@pytest.mark.parametrize('place', [LAB, REAL_RULES], ids=['lab', 'real rules'])
def test_read_back_it_answers_to_the_last_bit(place, tmp_path):
    decoder, table, config = load_checkpoint(place)
    save_checkpoint(tmp_path / 'own', dict(decoder=decoder, table=table), config)  # without an encoder
    by_the_clock = 1 if config['pretrain']['minutes'] else None  # such a checkpoint does not say its updates
    again, rows, _ = load_checkpoint(export_official(tmp_path / 'own', tmp_path / 'there', by_the_clock).parent)
    assert again.config == decoder.config and torch.equal(rows.weights, table.weights)
    ids = torch.tensor([1, 5, len(table.weights) - 1])
    inputs = torch.randint(2, 12, (3, decoder.config.seq_len), generator=torch.Generator().manual_seed(0))
    carry, other = decoder.initial_carry(3), again.initial_carry(3)
    with torch.no_grad():
        for _ in range(decoder.config.halt_max_steps):
            carry, logits, q = decoder(carry, inputs, table(ids))
            other, same, p = again(other, inputs, rows(ids))
            assert torch.equal(logits, same) and torch.equal(q[0], p[0]) and torch.equal(q[1], p[1])


@pytest.mark.skipif(not FIXTURE.is_dir(), reason=f'no official decoder fixture at {FIXTURE}')
def test_the_fixture_survives_the_way_there_and_back(tmp_path):
    there = export_official(FIXTURE, tmp_path / 'there', canvas=10)
    assert there.name == 'step_1'
    first, second = (torch.load(f, weights_only=True) for f in (FIXTURE / 'step_1', there))
    assert first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())
    a, b = (yaml.safe_load((f.parent / 'all_config.yaml').read_text())['arch'] for f in (FIXTURE / 'step_1', there))
    assert b == a | {'canvas': 10}  # read back, it is known
    assert load_checkpoint(there.parent)[0].config == load_checkpoint(FIXTURE, canvas=10)[0].config


# The folder as downloaded

def test_the_folder_as_downloaded_is_read(written, tmp_path):
    "arcprize/trm_arc_prize_verification: a folder a corpus, each with step_N, all_config.yaml and the program's own files."
    for corpus in ('arc_v1_public', 'arc_v2_public'):
        (folder := tmp_path / corpus).mkdir()
        for file in (written, written.parent / 'all_config.yaml'): (folder / file.name).write_bytes(file.read_bytes())
        for name in ('losses.py', 'trm.py'): (folder / name).write_text('raise SystemExit("executed")')
    decoder, table, config = load_checkpoint(tmp_path / 'arc_v1_public', canvas=5)
    assert torch.equal(table.weights, load_checkpoint(LAB)[1].weights) and config['arch']['L_cycles'] == decoder.config.L_cycles
    with pytest.raises(CheckpointError, match='name the checkpoint folder itself, as .*arc_v1_public'): load_checkpoint(tmp_path)
    (tmp_path / 'arc_v1_public' / 'step_7').write_bytes(written.read_bytes())
    with pytest.raises(CheckpointError, match=f'holds {written.name}, step_7: name one'): load_checkpoint(tmp_path / 'arc_v1_public')


@pytest.mark.parametrize('key, value', [('hidden_size', 128), ('L_layers', 3), ('expansion', 40), ('puzzle_emb_ndim', 64), ('puzzle_emb_ndim', 0), ('mlp_t', True), ('pos_encodings', 'learned'), ('rope_theta', 1000),
                                        ('name', 'hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1'), ('puzzle_emb_len', 2), ('forward_dtype', 'float64'), ('num_heads', 7), ('H_cycles', None), ('dropout', .1)])
def test_a_contradicting_key_is_named(written, tmp_path, key, value):
    (tmp_path / written.name).write_bytes(written.read_bytes())
    config = yaml.safe_load((written.parent / 'all_config.yaml').read_text())
    config['arch'][key] = value
    (tmp_path / 'all_config.yaml').write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=key): load_checkpoint(tmp_path, canvas=5)


def test_bfloat16_weights_are_those_of_the_file(written, tmp_path):
    torch.save({n: t.bfloat16() for n, t in torch.load(written, weights_only=True).items()}, tmp_path / 'step_1')
    (tmp_path / 'all_config.yaml').write_text((written.parent / 'all_config.yaml').read_text())
    (decoder, table, _), (whole, rows, _) = load_checkpoint(tmp_path, canvas=5), load_checkpoint(LAB)
    for name, tensor in whole.state_dict().items(): assert torch.equal(decoder.state_dict()[name], tensor.bfloat16().float()), name
    assert torch.equal(table(torch.tensor([3])), rows.lay_out(rows.weights[3:4].bfloat16().float()))


# Memory

ROWS, WIDTH = 200_000, 256
PEAK = r'''
import re, sys
import torch
from etrm.training.checkpoints import load_checkpoint
decoder, table, _ = load_checkpoint(sys.argv[1], canvas=3)
context = table(torch.tensor([1, len(table.weights) - 1]))
assert context.shape == (2, 4, 64) and context.dtype == torch.float32
# VmHWM begins with this program; getrusage would say what the process had before it became this one
print(len(table.weights), 1024 * int(re.search(r'VmHWM:\s+(\d+) kB', open('/proc/self/status').read())[1]))
'''


def peak(folder):
    "Rows of the table and most memory that a process of its own had while it read the checkpoint and two rows of it."
    done = subprocess.run([sys.executable, '-c', PEAK, str(folder)], env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='this system has no /proc to say how much memory a process had')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_large_table_is_in_memory_once_at_most(dtype, tmp_path):
    sizes = DecoderConfig(canvas=3, hidden_size=64, num_heads=4, H_cycles=1, L_cycles=1, puzzle_emb_len=4, halt_max_steps=1, forward_dtype='float32')
    save_checkpoint(tmp_path / 'mine', dict(decoder=Decoder(sizes), table=PuzzleEmbedding(4, WIDTH, 4, 64)), dict(decoder=sizes.model_dump()))
    few = export_official(tmp_path / 'mine', tmp_path / 'few', step=1)
    (tmp_path / 'many').mkdir()
    rows = ROWS * 32 // torch.finfo(dtype).bits  # 200 MB in either: what else a process takes is a small part of it
    (tmp_path / 'many' / 'all_config.yaml').write_text((tmp_path / 'few' / 'all_config.yaml').read_text())
    torch.save(torch.load(few, weights_only=True) | {'_orig_mod.model.inner.puzzle_emb.weights': torch.ones(rows, WIDTH, dtype=dtype)}, tmp_path / 'many' / 'step_1')
    (few_rows, least), (many, most) = peak(tmp_path / 'few'), peak(tmp_path / 'many')
    size = rows * WIDTH * torch.finfo(dtype).bits // 8
    assert (few_rows, many) == (4, rows)
    # all rows are looked at once, for values that are not finite, from the file: less than half says that this did not measure
    assert size * .5 < most - least < 1.4 * size, f'{(most - least) / size:.2f} times the table'
