"""Faults planted in the lab's decoder, encoder and data: each is caught by the check that is named for it."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from etrm.checkpoints import CheckpointError, load_checkpoint
from etrm.checks import CheckError, check_answers, check_contexts, check_gradients
from etrm.configs import load_config
from etrm.data import Stream, puzzle_data
from etrm.encoders import DemoEncoder
from etrm.experiment import make_task_sets, new_encoder
from etrm.tasks import LeakageError, check_leakage
from etrm.training import context_of, to_tensors

LAB = Path(__file__).resolve().parent.parent / 'checkpoints' / 'lab_decoder'
NAME = 'L_level.layers.0.self_attn.qkv_proj.weight'


@pytest.fixture(scope='module')
def lab():
    config = load_config('cfg_test_frozen_decoder', ('tasks.max_eval_groups=8',))
    decoder, table, _ = load_checkpoint(LAB)
    train, sets = make_task_sets(config)
    batch = to_tensors(Stream(puzzle_data(train, 5), 256, 0, config.num_demos).batch(0))
    return config, decoder, table, train, sets, batch


def verify(trm, etrm):
    return subprocess.run([sys.executable, '-m', 'etrm.cli', 'verify-decoder', '--trm-checkpoint', str(trm), '--etrm-checkpoint', str(etrm)], capture_output=True, text=True)


def copy_with(folder, change):
    "A copy of the lab's checkpoint whose tensors `change` has changed."
    shutil.copytree(LAB, folder, copy_function=shutil.copyfile)
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')
    return folder


def test_wrong_l_cycles_passes_the_weights_and_fails_the_answers(tmp_path):
    shutil.copytree(LAB, tmp_path / 'wrong')
    config = yaml.safe_load((tmp_path / 'wrong' / 'config.yaml').read_text())
    config['decoder']['L_cycles'] = 3
    (tmp_path / 'wrong' / 'config.yaml').write_text(yaml.safe_dump(config))
    sound, wrong = verify(LAB, LAB), verify(LAB, tmp_path / 'wrong')
    assert (sound.returncode, wrong.returncode) == (0, 1), sound.stderr + wrong.stderr
    assert '14 of 14 decoder tensors equal' in wrong.stdout and 'L_cycles 2 against 3' in wrong.stdout
    assert 'answers equal' in sound.stdout


def test_a_changed_weight_is_named(tmp_path):
    def change(tensors): tensors[f'decoder.{NAME}'][3, 3] += 1e-3
    found = verify(LAB, copy_with(tmp_path / 'c', change))
    assert found.returncode == 1 and f'differs     {NAME}' in found.stdout and '13 of 14' in found.stdout


@pytest.mark.parametrize('fault, message', [
    ('missing', f"missing tensors ['{NAME}']"), ('renamed', "unknown tensors ['L_level.layers.0.self_attn.qkv.weight']"),
    ('misshapen', f'{NAME} has shape'), ('nan', f'{NAME} has values that are not finite')])
def test_a_spoilt_tensor_is_named(tmp_path, fault, message):
    def change(tensors):
        tensor = tensors.pop(f'decoder.{NAME}')
        if fault == 'renamed': tensors['decoder.L_level.layers.0.self_attn.qkv.weight'] = tensor
        if fault == 'misshapen': tensors[f'decoder.{NAME}'] = tensor[:-1].contiguous()
        if fault == 'nan': tensors[f'decoder.{NAME}'] = tensor.fill_(float('nan'))
    folder = copy_with(tmp_path / 'c', change)
    with pytest.raises(CheckpointError) as error: load_checkpoint(folder)
    assert message in str(error.value) and str(folder) in str(error.value)
    assert verify(LAB, folder).returncode in (1, 2)


@pytest.mark.parametrize('prefix', ['_orig_mod.model.inner.', 'module.model.inner.', 'model.inner.', ''])
def test_every_prefix_reads_the_same_decoder(tmp_path, prefix, lab):
    _, decoder, table, *_ = lab
    torch.save({f'{prefix}{n}': t for n, t in decoder.state_dict().items()} | {f'{prefix}puzzle_emb.weights': table.weights}, tmp_path / 'step_1')
    arch = {k: v for k, v in decoder.config.model_dump().items() if k != 'canvas'} | dict(puzzle_emb_ndim=table.weights.shape[1])
    (tmp_path / 'all_config.yaml').write_text(yaml.safe_dump(dict(arch=arch)))
    read, rows, _ = load_checkpoint(tmp_path / 'step_1', 5)
    assert check_answers(decoder, read, table.lay_out(table.weights[1:]))['difference'] == 0
    assert torch.equal(rows.weights, table.weights)


class Detached(DemoEncoder):
    def read_set(self, x, mask): return super().read_set(x.detach(), mask)


def test_detached_encoder_is_named(lab):
    config, decoder, table, _, _, batch = lab
    assert len(check_gradients(decoder, new_encoder(config, decoder, table), batch)) > 10
    with pytest.raises(CheckError, match='cells.tables'): check_gradients(decoder, Detached(config.encoder_config(decoder.config)), batch)


def test_collapsed_encoder_is_named(lab):
    config, decoder, table, _, _, batch = lab
    encoder = new_encoder(config, decoder, table)
    assert check_contexts(context_of(encoder, batch), batch['group'])['p'] < .01
    for block in encoder.set_layers: block.self_attn.o_proj.weight.data.zero_()  # what was read never arrives
    with pytest.raises(CheckError, match='the same for every sample'): check_contexts(context_of(encoder, batch), batch['group'])


def test_shuffled_demonstrations_are_named(lab):
    config, decoder, table, _, _, batch = lab
    mixed = torch.randperm(len(batch['group']), generator=torch.Generator().manual_seed(0))
    wrong = batch | {k: batch[k][mixed] for k in ('demo_inputs', 'demo_labels', 'demo_mask')}
    with pytest.raises(CheckError, match='do not follow the tasks'): check_contexts(context_of(new_encoder(config, decoder, table), wrong), batch['group'])


def test_leaked_test_pair_is_named(lab):
    _, _, _, train, sets, _ = lab
    check_leakage({'training': train, 'instances': sets['instances']})
    leaked = [*sets['instances'][1:], train[0].__class__('planted', sets['instances'][0].train, train[0].test)]
    with pytest.raises(LeakageError, match='planted'): check_leakage({'training': train, 'instances': leaked})
