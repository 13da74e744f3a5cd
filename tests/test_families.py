"The procedural tasks: the same in every process, with splits that share nothing."
import hashlib, json, os, subprocess, sys
import numpy as np
import pytest
from etrm.tasks.families import FAMILIES, HELD_OUT_FAMILIES, KNOWN_FAMILIES, all_rules
from etrm.tasks.augmentations import Augmentation
from etrm.tasks.rules import (POOLS, RULE_SPLITS, FamilyError, Rule, hash_grids, make_task, make_tasks, rule_split,
                        sample_rules, split_rules)
from etrm.tasks.task import Pair, Task
from etrm.tasks.leakage import LeakageError, check_leakage

def digest(tasks):
    content = [(t.name, t.rule, [[p.input.tolist(), p.output.tolist()] for p in t.pairs]) for t in tasks]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

DIGEST = """
import sys; sys.path.insert(0, 'tests')
from test_families import digest, RULE_SPLITS, sample_rules, make_tasks
print(digest([t for split in RULE_SPLITS for t in make_tasks(sample_rules(split, 8, seed=3), split, seed=5)]))
"""

def test_same_in_every_process():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, 'PYTHONHASHSEED': '12345'}  # this process hashes texts by another
    there = subprocess.run([sys.executable, '-c', DIGEST], cwd=root, env=env, capture_output=True, text=True, check=True).stdout.strip()
    here = digest([t for split in RULE_SPLITS for t in make_tasks(sample_rules(split, 8, seed=3), split, seed=5)])
    assert there == here

def test_seeds_differ():
    rules = sample_rules('train', 20)
    assert sample_rules('train', 20, seed=1) != rules
    assert digest(make_tasks(rules, 'train')) != digest(make_tasks(rules, 'train', seed=1))

def pools_of(tasks, canvas=6): return set((hash_grids([pair for task in tasks for pair in task.pairs], canvas) % np.uint64(16)).tolist())

@pytest.mark.parametrize('canvas', [5, 6])
def test_splits_share_no_pair(canvas):
    rules = {split: sample_rules(split, 40, canvas=canvas) for split in RULE_SPLITS}
    tasks = {split: make_tasks(rules[split], split, canvas=canvas) for split in RULE_SPLITS} | {'fresh': make_tasks(rules['train'], 'fresh', canvas=canvas)}
    check_leakage(tasks)
    for pool, made in tasks.items(): assert pools_of(made, canvas) <= set(POOLS[pool])

def test_one_rule_in_all_pools_shares_no_pair():
    rules = [Rule(name, all_rules(name)[0]) for name in FAMILIES]
    tasks = {pool: make_tasks(rules, pool, 16, 4) for pool in POOLS}
    check_leakage(tasks)
    for pool, made in tasks.items(): assert pools_of(made) <= set(POOLS[pool])

def test_the_leakage_check_sees_an_augmented_pair():
    task = make_task(sample_rules('train', 1)[0], 'train')
    change = Augmentation.random(np.random.default_rng(0))
    copy = Task('copy', tuple(Pair(*map(change, pair)) for pair in task.pairs[:1]), task.pairs[1:2])
    with pytest.raises(LeakageError): check_leakage({'train': [task], 'families': [copy]})

def test_splits_share_no_rule_and_no_combination():
    seen = {split: sample_rules(split, 150, seed=seed) for split in RULE_SPLITS for seed in (0,)}
    keys = [rule.key for rules in seen.values() for rule in rules]
    assert len(set(keys)) == len(keys)
    families = {split: {rule.family for rule in rules} for split, rules in seen.items()}
    assert not families['compositions'] & (families['train'] | families['validation'])
    assert families['families'] == set(HELD_OUT_FAMILIES)
    assert not any(name in HELD_OUT_FAMILIES for split in ('train', 'validation', 'variants', 'compositions')
                   for family in families[split] for name in family.split('+'))
    parts = {part.key for rule in seen['compositions'] for part in rule.parts}
    assert {rule_split(part) for rule in seen['compositions'] for part in rule.parts} == {'train'} and len(parts) > 100

def test_enough_parameterisations():
    assert len(FAMILIES) >= 12 and len(HELD_OUT_FAMILIES) >= 4 and not set(KNOWN_FAMILIES) & set(HELD_OUT_FAMILIES)
    for name in FAMILIES:
        rules = [Rule(name, params) for params in all_rules(name)]
        assert len(set(rules)) == len(rules) >= 64
        assert Rule(name, json.loads(json.dumps(rules[-1].params))) == rules[-1]
    for split in ('train', 'validation', 'variants'): assert all(len(rules) >= 5 for rules in split_rules(split).values())

@pytest.mark.parametrize('name', FAMILIES)
def test_slots(name):
    "Rules work on a grid of any shape, leave it as it was, and answer in colours."
    family, rng = FAMILIES[name], np.random.default_rng(0)
    for shape in ((1, 1), (1, 4), (5, 2), (3, 3), (6, 6)):
        for _ in range(20):
            params, grid = family.sample_rule(rng), rng.integers(0, 10, shape).astype(np.uint8)
            before, after = grid.copy(), family.apply(grid, json.loads(json.dumps(params)))
            assert (grid == before).all()
            assert after.dtype == np.uint8 and after.ndim == 2 and after.size and after.max() <= 9

@pytest.mark.parametrize('canvas', [5, 6, 9])
def test_inputs_fit_and_every_pair_says_something(canvas):
    for task in make_tasks(sample_rules('train', 80, canvas=canvas) + sample_rules('families', 20), 'train', canvas=canvas):
        for pair in task.pairs:
            assert max(pair.input.shape + pair.output.shape) <= canvas
            assert pair.input.shape != pair.output.shape or (pair.input != pair.output).any()

def test_256_distinct_pairs_in_the_smallest_pool():
    canvas = 5  # the smallest has the fewest
    for name in FAMILIES:
        task = make_task(Rule(name, all_rules(name)[-1]), 'fresh', 255, 1, canvas=canvas)
        assert len(set(hash_grids(task.pairs, canvas).tolist())) == 256

def test_a_task_does_not_depend_on_its_company():
    rules = sample_rules('train', 12)
    assert digest(make_tasks(rules, 'train')) == digest([make_task(rule, 'train') for rule in rules])
    assert digest(make_tasks(rules, 'train')[::-1]) == digest(make_tasks(rules[::-1], 'train'))

@pytest.mark.parametrize('split', RULE_SPLITS)
def test_a_longer_list_starts_with_the_shorter(split):
    rules = sample_rules(split, 200, seed=7)
    assert rules[:100] == sample_rules(split, 100, seed=7) and len(set(rules)) == 200

def test_errors_name_what_is_wrong():
    with pytest.raises(FamilyError, match="unknown family 'melt'"): Rule('melt', {})
    with pytest.raises(FamilyError, match="unknown split 'test'"): make_tasks([], 'test')
    with pytest.raises(FamilyError, match='canvas 3 is too small'): make_tasks([], 'train', canvas=3)
    nothing = Rule('recolour', {'sources': [1, 2], 'targets': [1, 2]})
    with pytest.raises(FamilyError, match=r'recolour\{"sources":\[1,2\].*no informative pair'): make_task(nothing, 'train')
