"The log of runs on real tasks: its commits are there, its dates ascend, its numbers are those of its records."
import json
import subprocess
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / 'checkpoints'
LOG = json.loads((RECORDS / 'real_log.json').read_text())
KEYS = ['date', 'commit', 'record', 'change', 'recipe', 'device', 'minutes', 'seeds', 'numbers']
NUMBERS = dict(evaluation_1=('evaluation', 1), evaluation_2=('evaluation', 2), rules_1=('rules', 1))  # set, answers
ASKED = dict(evaluation=88, rules=64)  # test inputs
MEASURED = [(entry['record'], name, number)
            for entry in LOG for name, number in entry['numbers'].items() if number is not None]


def git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(['git', '-C', str(ROOT), *words], capture_output=True, text=True)


def no_history() -> str:
    "Why commits cannot be looked up, in words; empty if they can."
    try: shallow = git('rev-parse', '--is-shallow-repository').stdout.strip()
    except FileNotFoundError: return 'there is no git'
    return {'false': '', 'true': 'the clone is shallow'}.get(shallow, 'there is no git history')


def solved(number: dict, on: str, answers: int) -> tuple[int, int]:  # of how many
    "What the record says that a number of the log is of."
    place = on, number['start'], number['steps'], number['views']
    rows = json.loads((RECORDS / number['file']).read_text())
    (row,) = [r for r in rows if (r['set'], r['start'], r['steps'], r.get('views', 1)) == place]
    if answers == 2: return row['voted_2'], len(row['exact'])
    hits = row['exact'] if number['views'] == 1 else row['voted']
    return sum(map(bool, hits)), len(hits)  # None: nothing voted


@pytest.mark.parametrize('entry', LOG, ids=lambda entry: entry['record'])
def test_an_entry_has_its_keys(entry):
    assert list(entry) == KEYS and list(entry['numbers']) == list(NUMBERS)


def test_dates_ascend():
    days = [date.fromisoformat(entry['date']) for entry in LOG]
    assert all(before <= after for before, after in pairwise(days))


@pytest.mark.skipif(bool(no_history()), reason=no_history() or 'history is there')
@pytest.mark.parametrize('entry', LOG, ids=lambda entry: entry['record'])
def test_a_commit_is_in_the_history(entry):
    assert len(entry['commit']) == 40
    assert git('merge-base', '--is-ancestor', entry['commit'], 'HEAD').returncode == 0
    assert git('show', '-s', '--format=%cs', entry['commit']).stdout.strip() == entry['date']


@pytest.mark.parametrize('record, name, number', MEASURED, ids=[f'{record}-{name}' for record, name, _ in MEASURED])
def test_a_number_is_the_records(record, name, number):
    assert number['of'] == ASKED[NUMBERS[name][0]]
    assert record in number['file'] and solved(number, *NUMBERS[name]) == (number['solved'], number['of'])


@pytest.mark.parametrize('entry', LOG, ids=lambda entry: entry['record'])
def test_the_page_shows_an_entry_as_it_is(entry):
    cells = json.loads((ROOT / 'nbs/14_comparisons.ipynb').read_text())['cells']
    outputs = [out.get('data', {}) for cell in cells for out in cell.get('outputs', ())]
    lines = [line for data in outputs for line in ''.join(data.get('text/markdown', '')).splitlines()]
    (line,) = [line for line in lines if line.startswith(f"| {entry['commit'][:7]} |")]
    words = [word.strip() for word in line.strip('|').split('|')]
    assert words[1:8] == [str(entry[key]) for key in ('date', 'record', 'change', 'recipe', 'device', 'minutes', 'seeds')]


@pytest.mark.parametrize('entry', [e for e in LOG if (RECORDS / e['record'] / 'encoder/provenance.json').exists()], ids=lambda entry: entry['record'])
def test_minutes_are_those_that_training_was_given(entry):
    config = json.loads((RECORDS / entry['record'] / 'encoder/provenance.json').read_text())[-1]['config']
    assert entry['minutes'] == sum(config[stage]['minutes'] for stage in ('pretrain', 'regression', 'train'))
