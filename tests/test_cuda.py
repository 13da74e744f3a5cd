"On a GPU: the same answers as on the CPU, and everything stays there until it is to be counted."
import json

import pytest
import torch
from typer.testing import CliRunner

from etrm.cli import app
from etrm.contexts import SEARCH_RULES, noise, search
from etrm.decoder import Decoder, DecoderConfig
from etrm.data import puzzle_data
from etrm.devices import device_of, where_is
from etrm.experiment import contexts_of, load_encoder, measures
from etrm.explorer import explore, set_contexts
from etrm.losses import stablemax_cross_entropy
from etrm.task_sets import make_task_sets
from etrm.tasks import load_tasks
from test_one_read import CHANGES, COMMANDS, made  # noqa: F401, a fixture

pytestmark = pytest.mark.cuda

SMALL = DecoderConfig(canvas=3, hidden_size=32, num_heads=4, H_cycles=1, L_cycles=2, puzzle_emb_len=2, forward_dtype='float32')


def test_auto_takes_the_gpu():
    assert device_of().type == 'cuda' and device_of('cpu').type == 'cpu'


def test_noise_is_that_of_the_cpu():
    contexts, tasks = torch.randn(4, 2, 8), torch.arange(4)
    found = []
    for device in ('cpu', 'cuda'):
        torch.manual_seed(0)
        found.append(noise(contexts.to(device), tasks.to(device)).cpu())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize('rule', SEARCH_RULES)
def test_a_search_goes_where_it_goes_on_the_cpu(rule):
    torch.manual_seed(0)
    decoder = Decoder(SMALL)
    demos = torch.randint(2, 12, (2, 3, 9)), torch.randint(2, 12, (2, 3, 9)), torch.ones(2, 3, dtype=torch.bool)
    there = lambda device: search(decoder.to(device), *demos, torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(1)), stablemax_cross_entropy, steps=3, rule=rule)
    (contexts, losses), (on_gpu, losses_there) = there('cpu'), there('cuda')
    assert on_gpu.device.type == losses_there.device.type == 'cuda'
    torch.testing.assert_close(on_gpu.cpu(), contexts, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(losses_there.cpu(), losses, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('line', COMMANDS)
def test_every_command_takes_the_gpu(line, made):
    done = CliRunner().invoke(app, [*line.format(made=made, changes=' '.join(CHANGES)).split(), '--device', 'cuda'])
    assert done.exit_code == 0, done.stderr or done.exception
    assert done.stderr.startswith('etrm: device cuda:')


def test_contexts_and_answers_stay_there_and_are_those_of_the_cpu(made):
    data, found = puzzle_data(load_tasks(made / 'swap.json'), 5, 3), {}
    for device in ('cpu', 'cuda'):
        decoder, encoder, config = load_encoder(made / 'encoder/checkpoint', device)
        contexts, groups = contexts_of(encoder, data, config.num_demos)
        assert {t.device.type for t in (contexts, groups)} == {device} == {where_is(decoder).type}
        found[device] = contexts.cpu(), torch.from_numpy(measures(decoder, data, contexts)['lm_loss'])
    for on_cpu, on_gpu in zip(*found.values()): torch.testing.assert_close(on_gpu, on_cpu, atol=1e-2, rtol=1e-2)


def test_search_curves_start_from_the_same_noise(made):
    line = f'search-curves {made}/encoder/checkpoint --decoder {made}/decoder/checkpoint --sets instances --groups 4 --steps 0 --json --device'
    rows = {device: json.loads(CliRunner().invoke(app, [*line.split(), device]).stdout) for device in ('cpu', 'cuda')}
    for on_cpu, on_gpu in zip(*rows.values()): assert on_gpu['lm_loss'] == pytest.approx(on_cpu['lm_loss'], abs=1e-2), on_cpu['start']


def test_the_explorer_follows_its_modules(made):
    decoder, encoder, config = load_encoder(made / 'encoder/checkpoint', 'cuda')
    tasks = make_task_sets(config)[1]['instances']
    data, contexts = set_contexts(config, encoder, tasks, decoder.config.canvas)
    seen = explore(decoder, data, contexts, tasks, 1)
    assert len(seen.moments) == config.decoder.halt_max_steps * config.decoder.H_cycles and list(seen.answers) == ['zero', 'mean', 'noise', 'shuffled']
