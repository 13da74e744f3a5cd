"""The vote, pass@k and submission against what TRM's own evaluator gave for the same predictions."""
import json
from pathlib import Path

import numpy as np
import pytest

from etrm.evaluation.scores import pass_at_k
from etrm.evaluation.intervals import clopper_pearson
from etrm.evaluation.submissions import NO_ANSWER, score_submission, submission
from etrm.evaluation.votes import Predictions, load_predictions, save_predictions, vote
from etrm.tasks.grids import tokens_to_grid
from etrm.tasks.augmentations import Augmentation
from etrm.tasks.task import task_from_json

FIXTURE = Path(__file__).parents[2]/'shared'/'fixtures'/'official_arc_evaluator'
pytestmark = pytest.mark.skipif(not FIXTURE.is_dir(), reason=f'no official evaluator fixture at {FIXTURE}')
BLANK = 0  # the identifier of padding rows, which the official evaluator drops


def read(name): return json.loads((FIXTURE/name).read_text())


@pytest.fixture(scope='module')
def tasks(): return [task_from_json(obj, name, FIXTURE/'test_puzzles.json') for name, obj in read('test_puzzles.json').items()]


@pytest.fixture(scope='module')
def predictions():
    names = read('identifiers.json')
    with np.load(FIXTURE/'predictions.npz', allow_pickle=False) as f:
        real = f['puzzle_identifiers'] != BLANK
        return Predictions([names[i] for i in f['puzzle_identifiers'][real]], f['inputs'][real], f['preds'][real], f['q_halt_logits'][real], 30)


@pytest.fixture(scope='module')
def votes(predictions, tasks): return vote(predictions, tasks)


def test_every_pass_at_k_is_equal(votes, tasks):
    expected = read('expected.json')
    ks = tuple(int(name.split('@')[1]) for name in expected)
    scores = pass_at_k(votes, tasks, ks, allow_missing=True).as_dict()
    assert {name: scores[name] for name in expected} == expected


def test_the_submission_is_equal(votes): assert submission(votes) == read('submission.json')


def test_the_denominators_are_the_tasks_and_their_test_inputs(votes, tasks):
    score = pass_at_k(votes, tasks, (2,), allow_missing=True)[2]
    assert (score.n_tasks, score.n_inputs) == (len(tasks), sum(len(task.test) for task in tasks))
    assert (score.tasks.low, score.tasks.high) == clopper_pearson(score.tasks_solved, len(tasks))


def test_scoring_the_official_submission_gives_pass_at_2(tasks):
    assert score_submission(read('submission.json'), tasks)[2].share == read('expected.json')['ARC/pass@2']


def test_another_order_of_predictions_changes_only_ties(predictions, votes, tasks):
    order = np.random.default_rng(0).permutation(len(predictions))
    other = vote(predictions[order], tasks)
    for task in tasks:
        for a, b in zip(votes[task.name], other[task.name]):
            assert [c.count for c in a] == [c.count for c in b]
            assert np.allclose([c.confidence for c in a], [c.confidence for c in b], rtol=0, atol=1e-12)


def test_a_test_input_without_predictions_keeps_its_place(predictions, tasks, votes):
    task = next(t for t in tasks if len(t.test) == 2 and all(votes[t.name]))
    base_and_augmentation = [Augmentation.from_name(name) for name in predictions.names]
    first = [base == task.name and np.array_equal(a.invert(tokens_to_grid(row, 30)), task.test[0].input)
             for (base, a), row in zip(base_and_augmentation, predictions.inputs)]
    without = submission(vote(predictions[~np.array(first)], tasks))[task.name]
    assert any(first) and without == [dict.fromkeys(('attempt_1', 'attempt_2'), NO_ANSWER), submission(votes)[task.name][1]]


def test_predictions_survive_the_disk(predictions, tasks, votes, tmp_path):
    save_predictions(predictions, tmp_path/'predictions.npz')
    assert submission(vote(load_predictions(tmp_path/'predictions.npz'), tasks)) == submission(votes)
