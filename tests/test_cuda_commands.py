"On a GPU: every command runs there, and contexts and answers are those of the CPU and stay there until they are to be counted."
import json

import pytest
import torch
from typer.testing import CliRunner

from etrm.apps.cli import app
from etrm.data.puzzles import puzzle_data
from etrm.basics.devices import where_is
from etrm.experiments.loading import load_encoder
from etrm.evaluation.answers import contexts_of, measure_answers
from etrm.apps.exploration import explore, set_contexts
from etrm.experiments.task_sets import make_task_sets
from etrm.tasks.reading import load_tasks
from test_one_read import CHANGES, COMMANDS, made  # noqa: F401, a fixture

pytestmark = pytest.mark.cuda


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
        found[device] = contexts.cpu(), torch.from_numpy(measure_answers(decoder, data, contexts)['lm_loss'])
    for on_cpu, on_gpu in zip(*found.values()): torch.testing.assert_close(on_gpu, on_cpu, atol=1e-2, rtol=1e-2)


def test_search_curves_start_from_the_same_noise(made):
    line = f'search-curves {made}/encoder/checkpoint --decoder {made}/decoder/checkpoint --sets variants --groups 4 --steps 0 --json --device'
    rows = {device: json.loads(CliRunner().invoke(app, [*line.split(), device]).stdout) for device in ('cpu', 'cuda')}
    for on_cpu, on_gpu in zip(*rows.values()): assert on_gpu['lm_loss'] == pytest.approx(on_cpu['lm_loss'], abs=1e-2), on_cpu['start']


def test_the_explorer_follows_its_modules(made):
    decoder, encoder, config = load_encoder(made / 'encoder/checkpoint', 'cuda')
    tasks = make_task_sets(config)[1]['variants']
    data, contexts = set_contexts(config, encoder, tasks, decoder.config.canvas)
    seen = explore(decoder, data, contexts, tasks, 1)
    assert len(seen.moments) == config.decoder.halt_max_steps * config.decoder.H_cycles and list(seen.answers) == ['zero', 'mean', 'noise', 'shuffled']
