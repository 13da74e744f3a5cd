"""Faults planted in the lab's decoder, encoder and data: each is caught by the check that is named for it."""
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from etrm.training.checkpoints import load_checkpoint
from etrm.training.checksums import CheckpointError
from etrm.evaluation.checks import CheckError, check_answers, check_contexts, check_gradients
from etrm.apps.cli import app
from etrm.experiments.configurations import load_config
from etrm.data.puzzles import puzzle_data
from etrm.data.batches import to_tensors
from etrm.data.stream import Stream
from etrm.model.encoders import DemoEncoder
from etrm.experiments.encoder_training import new_encoder
from etrm.experiments.task_sets import make_task_sets
from etrm.tasks.leakage import LeakageError, check_leakage
from etrm.model.contexts import context_of

LAB = Path(__file__).resolve().parent.parent / 'checkpoints/lineage_1/decoder/checkpoint'
NAME = 'L_level.layers.0.self_attn.qkv_proj.weight'


@pytest.fixture(scope='module')
def lab():
    config = load_config('cfg_test_frozen_decoder', ('tasks.max_train_groups=24', 'tasks.max_eval_groups=8'))
    decoder, table, _ = load_checkpoint(LAB)
    train, sets = make_task_sets(config)
    batch = to_tensors(Stream(puzzle_data(train, 5), 96, 0, config.num_demos).batch(0))
    return config, decoder, table, train, sets, batch


def verify(trm, etrm):  # in this process: test_end_to_end runs the command in one of its own
    "`etrm verify-decoder`: its result with exit_code, stdout and stderr."
    return CliRunner().invoke(app, ['verify-decoder', '--trm-checkpoint', str(trm), '--etrm-checkpoint', str(etrm)])


def copy_with(folder, change):
    "A copy of the lab's checkpoint whose tensors `change` has changed, without sums that would tell."
    shutil.copytree(LAB, folder, ignore=shutil.ignore_patterns('SHA256SUMS'), copy_function=shutil.copyfile)
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')
    return folder


def change_config(folder, **keys):
    "Change keys of the decoder's configuration in a checkpoint folder."
    config = yaml.safe_load((folder / 'config.yaml').read_text())
    config['decoder'].update(keys)
    (folder / 'config.yaml').write_text(yaml.safe_dump(config))
    return folder


def test_wrong_l_cycles_passes_the_weights_and_fails_the_answers(tmp_path):
    wrong = change_config(copy_with(tmp_path / 'wrong', lambda tensors: None), L_cycles=3)
    sound, found = verify(LAB, LAB), verify(LAB, wrong)
    assert (sound.exit_code, found.exit_code) == (0, 1), sound.stderr + found.stderr
    assert '14 of 14 decoder tensors equal' in found.stdout and 'config      L_cycles 2 against 3' in found.stdout and 'answers differ' in found.stdout
    assert 'answers equal' in sound.stdout and 'config ' not in sound.stdout


def test_a_key_that_changes_no_answer_is_named_and_passes(tmp_path):
    found = verify(LAB, change_config(copy_with(tmp_path / 'c', lambda tensors: None), halt_exploration_prob=.25))
    assert found.exit_code == 0 and 'halt_exploration_prob' in found.stdout and 'answers equal' in found.stdout


def test_a_changed_weight_is_named(tmp_path):
    def change(tensors): tensors[f'decoder.{NAME}'][3, 3] += 1e-3
    folder = copy_with(tmp_path / 'c', change)
    assert verify(LAB, LAB).exit_code == 0
    load_checkpoint(folder)  # reads without complaint: only the comparison sees it
    found = verify(LAB, folder)
    assert found.exit_code == 1 and f'differs     {NAME}' in found.stdout and '13 of 14' in found.stdout


def test_a_sound_copy_reads(tmp_path):
    read, table, _ = load_checkpoint(copy_with(tmp_path / 'c', lambda tensors: None))
    assert check_answers(load_checkpoint(LAB)[0], read, table.contexts())['difference'] == 0


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
    found = verify(LAB, folder)
    assert found.exit_code == 1 and NAME in found.stdout


@pytest.mark.parametrize('prefix', ['_orig_mod.model.inner.', 'module.model.inner.', 'model.inner.', ''])
def test_every_prefix_reads_the_same_decoder(tmp_path, prefix, lab):
    _, decoder, table, *_ = lab
    torch.save({f'{prefix}{n}': t for n, t in decoder.state_dict().items()} | {f'{prefix}puzzle_emb.weights': table.weights}, tmp_path / 'step_1')
    arch = {k: v for k, v in decoder.config.model_dump().items() if k != 'canvas'} | dict(puzzle_emb_ndim=table.weights.shape[1])
    (tmp_path / 'all_config.yaml').write_text(yaml.safe_dump(dict(arch=arch)))
    read, rows, _ = load_checkpoint(tmp_path / 'step_1', 5)
    assert check_answers(decoder, read, table.contexts())['difference'] == 0
    assert torch.equal(rows.weights, table.weights)
    torch.save({f'{prefix}{n}': t for n, t in decoder.state_dict().items() if n != NAME}, tmp_path / 'step_1')
    with pytest.raises(CheckpointError, match='missing tensors .*' + NAME.replace('.', r'\.')): load_checkpoint(tmp_path / 'step_1', 5)


class Detached(DemoEncoder):
    def read_set(self, x, mask): return super().read_set(x.detach(), mask)


def test_detached_encoder_is_named(lab):
    config, decoder, table, _, _, batch = lab
    assert len(check_gradients(decoder, new_encoder(config, decoder, table), batch)) > 10
    detached = Detached(config.encoder_config(decoder.config))
    with pytest.raises(CheckError, match='cells.tables'): check_gradients(decoder, detached, batch)
    for p in detached.parameters(): p.grad = torch.ones_like(p)  # what an update before has left hides nothing
    with pytest.raises(CheckError, match='cells.tables'): check_gradients(decoder, detached, batch)


def test_collapsed_encoder_is_named(lab):
    config, decoder, table, _, _, batch = lab
    encoder = new_encoder(config, decoder, table)
    assert check_contexts(context_of(encoder, batch), batch['group'])['p'] < .01
    for block in encoder.set_layers: block.self_attn.o_proj.weight.data.zero_()  # what was read never arrives
    with pytest.raises(CheckError, match='the same for every sample'): check_contexts(context_of(encoder, batch), batch['group'])


def test_context_that_is_not_finite_is_named(lab):
    config, decoder, table, _, _, batch = lab
    contexts = context_of(new_encoder(config, decoder, table), batch).detach()
    contexts[5, 0, 0] = float('nan')
    with pytest.raises(CheckError, match='1 of 96 contexts .* sample 5'): check_contexts(contexts, batch['group'])


def test_shuffled_demonstrations_are_named(lab):
    config, decoder, table, _, _, batch = lab
    encoder, demos = new_encoder(config, decoder, table), ('demo_inputs', 'demo_outputs', 'demo_mask')
    mixed = torch.randperm(len(batch['group']), generator=torch.Generator().manual_seed(0))
    assert check_contexts(context_of(encoder, batch), batch['group'])['p'] < .01
    with pytest.raises(CheckError, match='do not follow the tasks'): check_contexts(context_of(encoder, batch | {k: batch[k][mixed] for k in demos}), batch['group'])


def test_leaked_test_pair_is_named(lab):
    _, _, _, train, sets, _ = lab
    check_leakage({'training': train, 'variants': sets['variants']})
    leaked = [*sets['variants'][1:], train[0].__class__('planted', sets['variants'][0].train, train[0].test)]
    with pytest.raises(LeakageError, match='planted'): check_leakage({'training': train, 'variants': leaked})
