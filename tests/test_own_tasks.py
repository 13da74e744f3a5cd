"""Tasks of one's own are answered by the encoder that is installed with the package: it is whole, small, and found from any folder."""
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from etrm.apps.cli import app
from etrm.apps.shipping import MOST_BYTES
from etrm.experiments.loading import load_encoder, table_for
from etrm.search.search import encoder_rate
from etrm.training.checkpoints import REAL_RULES
from etrm.training.checksums import check_checksum

ROOT = Path(__file__).resolve().parent.parent


def pair(a: int, b: int, **more) -> dict: return dict(input=[[a, b, 0]] * 2, output=[[0, b, a]] * 2) | more


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    "A folder of two small tasks, from the folder above; one has two test inputs, of which one's answer is not known."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_tasks').mkdir()
    asked = dict(one=[pair(1, 4)], two=[pair(1, 5), dict(input=[[3, 2, 0]] * 2)])
    for name, test in asked.items():
        (tmp_path / f'my_tasks/{name}.json').write_text(json.dumps(dict(train=[pair(1, 2), pair(3, 2), pair(4, 7)], test=test)))
    return Path('my_tasks')


def etrm(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def answered(*arguments) -> str:
    done = etrm(*arguments, '--device', 'cpu')
    assert done.exit_code == 0, done.stderr or done.exception
    return done.stdout


def test_it_is_whole_and_small():
    files = {f.name: f for f in REAL_RULES.iterdir()}
    assert set(files) == {'model.safetensors', 'config.yaml', 'identifiers.json', 'SHA256SUMS', 'provenance.json', 'rounding.json'}
    assert sum(f.stat().st_size for f in files.values()) < MOST_BYTES == 12_000_000
    assert all(check_checksum(files[name]) for name in ('model.safetensors', 'config.yaml', 'identifiers.json'))
    weights = load_file(files['model.safetensors'])
    assert {t.dtype for t in weights.values()} == {torch.bfloat16} and {name.split('.')[0] for name in weights} == {'decoder', 'table', 'encoder'}
    decoder, encoder, config = load_encoder(REAL_RULES)
    assert (config.name, config.decoder.canvas) == ('real_rules', 10)
    assert config.search.lr == pytest.approx(encoder_rate(encoder)) and config.search.rule == 'normalised'
    assert len(table_for(decoder, REAL_RULES).names) > 300


def test_rounding_costs_no_solved_task():
    "Without search the answers stay; 20 steps of search carry small differences far, so that many wrong answers become other wrong ones."
    at_once, after_search = json.loads((REAL_RULES / 'rounding.json').read_text())
    assert (at_once['steps'], after_search['steps'], at_once['n'], after_search['n']) == (0, 20, 88, 88)
    assert at_once['same'] >= 80
    assert abs(after_search['right_exact'] - after_search['right_rounded']) <= 2


def test_where_it_comes_from_is_written_beside_it():
    *runs, rounding = json.loads((REAL_RULES / 'provenance.json').read_text())
    assert {entry['arguments'][0] for entry in runs} == {'pretrain', 'train'} and rounding['arguments'][0] == 'ship'
    assert all(entry['checkout'] and entry['config']['name'] == 'real_rules' for entry in runs)
    assert not re.findall(r'"/[a-z]+/[^"]*"', (REAL_RULES / 'provenance.json').read_text())  # no path of one machine


def test_the_package_takes_it_along():
    patterns = re.search(r'^etrm = \[(.*)\]$', (ROOT / 'pyproject.toml').read_text(), re.M)[1]
    packed = {f for pattern in re.findall(r'"([^"]+)"', patterns) for f in (ROOT / 'etrm').glob(pattern)}
    assert set(REAL_RULES.iterdir()) <= packed


def test_search_uses_it_without_being_told(tasks):
    shown = answered('search', tasks, '--views', 2, '--out', 'submission.json')
    assert re.search(r'\| one \| \d of 3 \| \d+% \| \d of \d \| \d of 1 \|', shown)
    assert re.search(r'\| two \| \d of 3 \| \d+% \| \d of \d, \d of \d \| unknown \|', shown)
    assert 'No demonstration explained:' in shown and 'On real tasks these are seldom right either.' in shown
    assert {name: len(found) for name, found in json.loads(Path('submission.json').read_text()).items()} == dict(one=1, two=2)
    noted, own = json.loads(Path('submission.provenance.json').read_text()), load_encoder(REAL_RULES)[2]
    assert noted['config']['search'] == own.search.model_dump(mode='json')
    assert {Path(name).parent for name in noted['read']} == {REAL_RULES}


def test_it_starts_from_the_encoder_and_steps_as_its_configuration_says(tasks):
    def rows(*more): return json.loads(answered('search', tasks, '--json', *more))
    by_default, same, adam, unsearched = rows(), rows('--decoder', REAL_RULES, '--steps', 20), rows('--rule', 'adam'), rows('--steps', 0)
    assert by_default == same
    before = lambda found: [row['loss_before'] for row in found]
    assert before(by_default) == before(adam) == before(unsearched) and by_default != adam
    assert all(row['loss_before'] == row['loss_after'] for row in unsearched)


def test_what_is_larger_is_said_or_left_out(tasks):
    large = dict(train=[dict(input=[[1] * 11], output=[[1]])], test=[dict(input=[[1]])])
    (tasks / 'large.json').write_text(json.dumps(large))
    refused = etrm('search', tasks)
    assert refused.exit_code == 2 and 'a grid larger than the canvas of 10 (side in brackets): large (11)' in refused.stderr
    kept = etrm('search', tasks, '--skip-too-large', '--steps', 1, '--json')
    assert [row['task'] for row in json.loads(kept.stdout)] == ['one', 'two'] and 'left out: large' in kept.stderr


def test_the_page_shows_every_test_input(tasks):
    answered('explore', tasks, 'page.html', '--views', 2)
    page = Path('page.html').read_text()
    assert page.count('<img alt=') == 3
    told = re.findall(r'<p>([^:]+): the answer is [a-z ]+ after step 2 [^;]*; its context explains \d of 3 demonstrations, the best of 2 views \d;', page)
    assert told == ['one', 'two, test input 1', 'two, test input 2']


def test_the_explorer_opens_a_folder(tasks):
    pytest.importorskip('ipywidgets')
    from etrm.apps.explorer import OwnExplorer
    opened = OwnExplorer(tasks)
    assert [label for label, _ in opened.task.options] == ['0: one', '1: two, test input 1', '1: two, test input 2']
    assert 'one: the answer is' in opened.output.value and 'the best of 8 views' in opened.output.value


def test_the_labs_decoder_is_still_to_be_had(tasks):
    row, *_ = json.loads(answered('search', tasks, '--decoder', ROOT / 'checkpoints/lineage_1/decoder/checkpoint', '--steps', 1, '--json'))
    assert row['task'] == 'one'
