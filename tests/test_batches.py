"""A seed's batches are the same to the bit, however they are made; hashes of those that were drawn first are kept here."""
import hashlib
from dataclasses import replace

import numpy as np
import pytest

import etrm.data.layout
from etrm.data.puzzles import gather_pairs, puzzle_data
from etrm.data.batches import assemble
from etrm.data.stream import Stream
from etrm.tasks.task import Pair, Task

WAS = dict(demo_outputs='demo_labels')  # what it was called when the hashes were taken
SLICES = {'whole': slice(None), 'second half': slice(12, 24)}


def make_data(canvas: int, pairs: list[int], num_aug: int):
    "Tasks of grids of any size that fits; the last pair of each is its test pair."
    rng = np.random.default_rng(canvas)
    grid = lambda: rng.integers(0, 10, rng.integers(1, canvas + 1, size=2)).astype(np.uint8)
    tasks = [[Pair(grid(), grid()) for _ in range(n)] for n in pairs]
    return puzzle_data([Task(f'task{i}', tuple(t[:-1]), tuple(t[-1:])) for i, t in enumerate(tasks)], canvas, num_aug)


DATA = {
    'square 5, few pairs': lambda: make_data(5, [2, 3, 4, 8], 6),
    'square 10, more': lambda: make_data(10, [3, 12, 12, 30, 5], 3),
    'square 4, plain': lambda: make_data(4, [6, 6, 3], 0),
    'square 30, ragged': lambda: make_data(30, [4, 9, 70], 2),
}
OPTIONS = {
    'bare': dict(),
    'translate': dict(translate=True),
    'extents': dict(extents=True),
    'drawn': dict(num_demos=4),
    'drawn, translate': dict(num_demos=4, translate=True),
    'drawn, extents': dict(num_demos=4, extents=True),
    'fewer': dict(num_demos=3, demos='fewer', translate=True),
    'first': dict(num_demos=4, demos='first'),
    'many': dict(num_demos=20, translate=True),
    'test': dict(num_demos=4, query='test', translate=True),
    'test, first': dict(num_demos=2, query='test', demos='first'),
    'opens': dict(num_demos=2, opens=True),
}


def make_stream(data, options: dict) -> Stream:
    groups = len(np.unique(data.group))
    return Stream(data, 24, 7, **options | (dict(opens=np.arange(groups)) if 'opens' in options else {}))


def hashed(batches: list[dict]) -> str:
    "Of names, shapes and values, whatever their integer type."
    digest = hashlib.sha256()
    for batch in batches:
        batch = {WAS.get(name, name): values for name, values in batch.items()}
        for name in sorted(batch):
            values = np.asarray(batch[name]).astype(np.int64)
            digest.update(f'{name} {values.shape}'.encode()); digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


FIRST = {
    'square 5, few pairs': {
        'bare': '07166af846c6e7ae',
        'translate': 'b3507b1085f35eb4',
        'extents': 'd7abcd93a43736fa',
        'drawn': 'e23be6631aa0a0a0',
        'drawn, translate': '31bf33463a544b7a',
        'drawn, extents': '0b4a5cc9d192d451',
        'fewer': '653014f8378a26ba',
        'first': 'a55e5af4fd62bbd2',
        'many': 'ed4fa1991c7b4f55',
        'test': '5ecad57734c84a25',
        'test, first': 'd26007047950ea96',
        'opens': 'a2936a639642d622',
    },
    'square 10, more': {
        'bare': '2cab300c026e3d62',
        'translate': '0e186b483f370f09',
        'extents': 'efaecb1cc376b386',
        'drawn': 'd3e909d55d7a92d6',
        'drawn, translate': 'dd3d34fe472dc57d',
        'drawn, extents': '7e370388a1728314',
        'fewer': 'c5f7789717d0b25a',
        'first': '5e045fde304d6ed1',
        'many': '1c2fd176d325f287',
        'test': '21ca01eb90db26d5',
        'test, first': 'c27810760d8b755d',
        'opens': '8733fe1cd9a90275',
    },
    'square 4, plain': {
        'bare': '445be6c2afb778c9',
        'translate': '8f27ece3afbe64d8',
        'extents': '413b5ee4f33edbe1',
        'drawn': '876afa294b97966e',
        'drawn, translate': '876afa294b97966e',
        'drawn, extents': 'dfe6f3418fb3b7bc',
        'fewer': '51e7d43c0bbac88c',
        'first': '3ed3917a0d71a5b3',
        'many': '597fe388a6641e69',
        'test': '0b84678c027feb92',
        'test, first': '9a229eff3fecc151',
        'opens': '5362ef847d3b1f9f',
    },
    'square 30, ragged': {
        'bare': 'f56124851d9791d9',
        'translate': '9469a44a9bac9bfd',
        'extents': '5007921c94393519',
        'drawn': '45b9b9de4270c038',
        'drawn, translate': '37878a683f08ed6a',
        'drawn, extents': '5478d5e1bfb6561e',
        'fewer': '196a53d3827a0dc2',
        'first': 'ce0727c0e1599df6',
        'many': '24fbe06bed7a2de6',
        'test': '5e003ceb4c26cbde',
        'test, first': '8503a06b5cfca2d4',
        'opens': '4069ceb2dde28e00',
    },
}


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('data', DATA)
def test_a_seed_means_what_it_meant(data, options):
    stream = make_stream(DATA[data](), OPTIONS[options])
    assert hashed([stream.batch(i, rows) for i in (0, 2, 11) for rows in SLICES.values()]) == FIRST[data][options]


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('data', DATA)
def test_laid_out_on_a_device_as_by_hand(data, options, monkeypatch):
    "Whole or in parts that fit the cache."
    stream = make_stream(DATA[data](), OPTIONS[options])
    by_hand = assemble(stream.data, stream.draw(11), stream.extents)
    for at_once in (1, 2**30):
        monkeypatch.setattr(etrm.data.layout, 'CPU_CHUNK', at_once)
        found = stream.tensors(11)
        assert sorted(found) == sorted(by_hand)
        for name, values in by_hand.items(): assert np.array_equal(found[name].numpy(), values), name


def test_tokens_of_a_dataset_that_was_translated_stay_as_they_are():
    "As official datasets have them, a grid anywhere on the canvas; moved, only what lies at the corner is a grid."
    data = make_data(6, [4, 4], 0)
    moved = np.roll(data.inputs.reshape(-1, 6, 6), (1, 2), (1, 2)).reshape(len(data.inputs), -1)
    data = replace(data, inputs=moved)
    stream = Stream(data, 8, num_demos=2)
    drawn = stream.draw(0)
    assert np.array_equal(stream.batch(0)['inputs'], moved[drawn.pairs[:, 0]])
    stream = Stream(data, 8, num_demos=2, translate=True)
    drawn = stream.draw(0)
    by_hand = gather_pairs(data, drawn.pairs, drawn.puzzles, drawn.offsets)[0][:, 0]
    assert np.array_equal(stream.batch(0)['inputs'], by_hand)
