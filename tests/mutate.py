"""Change one operator or constant of a module at a time, run its notebook, and say which changes nothing noticed.

    python tests/mutate.py grids contexts --number 40 --seed 0
    python tests/mutate.py votes --number 20 --pytest tests/test_official_evaluator.py

A mutant runs in a fork of the process that has executed the cells before it, and stops at the first cell that fails. What survives the
notebook is tried on the pytest files named, in a copy of the package. `mutants_equivalent.md` lists changes that change no result.
"""
import argparse
import ast
import copy
import json
import linecache
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = Path(__file__).with_name('mutants_equivalent.md')
OPERATORS = {old: new for pair in (
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or),
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr)) for old, new in (pair, pair[::-1])} | {
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.USub: ast.UAdd, ast.MatMult: ast.Mult}
NAMES = {old: new for pair in (
    'min max', 'any all', 'argmin argmax', 'amin amax', 'zeros ones', 'zeros_like ones_like', 'zero_ fill_', 'index_add_ index_copy_',
    'mean sum', 'floor ceil', 'append extend', 'argsort sort', 'minimum maximum') for old, new in (pair.split(), pair.split()[::-1])}
NAMES |= {'cumsum': 'asarray', 'sorted': 'list', 'sign': 'abs', 'detach': 'clone', 'std': 'mean', 'var': 'mean', 'sqrt': 'abs'}
COSMETIC = ('trange', 'tqdm', 'print', 'warn', 'echo', 'Field')  # of a Field only the default counts


def changes(node):
    "Single changes of one node, each a function that makes it in place."
    def put(field, value, at=None):
        def make(n): setattr(n, field, value) if at is None else getattr(n, field).__setitem__(at, value)
        return make
    if isinstance(node, ast.Compare): yield from (put('ops', OPERATORS[type(o)](), i) for i, o in enumerate(node.ops) if type(o) in OPERATORS)
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign, ast.UnaryOp)) and type(node.op) in OPERATORS and not isinstance(getattr(node, 'operand', None), ast.Constant): yield put('op', OPERATORS[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)): yield put('operand', ast.UnaryOp(node.op, node.operand))
    if isinstance(node, (ast.If, ast.IfExp, ast.While)): yield put('test', ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.comprehension): yield from (put('ifs', ast.UnaryOp(ast.Not(), t), i) for i, t in enumerate(node.ifs))
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool): yield put('value', not node.value)
        elif isinstance(node.value, int): yield put('value', node.value + 1)
        elif isinstance(node.value, float): yield put('value', 2 * node.value or 1.)
    if isinstance(node, ast.Attribute) and node.attr in NAMES: yield put('attr', NAMES[node.attr])
    if isinstance(node, ast.Name) and node.id in NAMES: yield put('id', NAMES[node.id])


def nodes(tree):
    "The nodes worth a change, in a fixed order: no annotation, message, decorator or progress bar."
    if isinstance(tree, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)) or re.fullmatch('__(repr|str)__|draw_.*', getattr(tree, 'name', '') or ''): return
    yield tree
    called = getattr(getattr(tree, 'func', None), 'id', getattr(getattr(tree, 'func', None), 'attr', ''))
    for field, value in ast.iter_fields(tree):
        if field in ('annotation', 'returns', 'decorator_list') or called in COSMETIC and field == 'keywords': continue
        if called == 'reshape' and isinstance(value, list): value = [v for v in value if not isinstance(v, ast.UnaryOp)]  # any negative size is the rest
        for child in value[:1] if called == 'Field' and field == 'args' else value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not (called in COSMETIC[:-1]): yield from nodes(child)


def mutants(module):
    "Every mutant of a module: its line, the statement before, the statement after."
    for statement in ast.parse((ROOT/'etrm'/f'{module}.py').read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], 'id', '') == '__all__': continue
        for i, node in enumerate(nodes(statement)):
            for make in changes(node):
                changed = copy.deepcopy(statement)
                make(list(nodes(changed))[i])
                yield dict(module=module, line=node.lineno if hasattr(node, 'lineno') else node.target.lineno, of=getattr(statement, 'name', ''),
                           before=ast.unparse(statement), after=ast.unparse(changed))


def shown(mutant):
    "The change with some characters around it."
    before, after = (re.sub(r'\s+', ' ', mutant[k]) for k in ('before', 'after'))
    start = len(os.path.commonprefix([before, after]))
    end = min(len(os.path.commonprefix([before[:start - 1:-1], after[:start - 1:-1]])), *(len(x) - start for x in (before, after)))
    return tuple(x[max(0, start - 28):len(x) - max(0, end - 20)] for x in (before, after))


def cells(module):
    "The path of a module's notebook, and the code that its tests run."
    for path in ROOT.glob('nbs/**/*.ipynb'):
        code = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
        if code and code[0].split('\n')[0] == f'#| default_exp {module}':
            return path, [c for c in code if 'nbdev_export()' not in c and not re.match(r'(#\|.*\n)*#\| *(slow|cuda|eval: *false)', c)]
    raise SystemExit(f'no notebook exports {module}')


def execute(code, namespace, name):
    "Run a cell as IPython does, so that its source can be looked up."
    execute.last = name
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    exec(compile(code, name, 'exec'), namespace)


def mutated(cell, mutant):
    "The cell with the mutant's statement in place of its own, or None where it is not there."
    tree = ast.parse(cell)
    at = [i for i, s in enumerate(tree.body) if ast.unparse(s) == mutant['before']]
    if not at: return None
    tree.body[at[0]] = ast.parse(mutant['after']).body[0]
    return ast.unparse(tree)


def forked(run, seconds):
    "What `run` died of in a fork of this process: '' if it did not."
    with tempfile.NamedTemporaryFile('r') as out:
        if not (child := os.fork()):
            os.setsid()
            try: run()
            except BaseException as error: Path(out.name).write_text(f'{execute.last}, {type(error).__name__}')
            os._exit(0)
        end = time.time() + seconds
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.time() < end: time.sleep(.01)
        try: os.killpg(child, signal.SIGKILL)  # with what it started
        except ProcessLookupError: pass
        if done[0] == 0: os.waitpid(child, 0)
        return 'timeout' if done[0] == 0 else out.read() or ('' if done[1] == 0 else f'exit {done[1]}')


def run_notebook(module, chosen, report):
    "Execute a notebook; at each exported cell try the cell's mutants."
    path, code = cells(module)
    os.chdir(path.parent)
    os.environ |= dict(IN_TEST='1', MPLBACKEND='agg', WANDB_MODE='disabled')
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    def rest(cell, at):
        for i, c in enumerate([cell, *code[at + 1:]], at): execute(c, main.__dict__, f'{path.stem}[{i}]')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1); os.dup2(1, 2)  # what cells print
    start = time.time()
    if reason := forked(lambda: rest(code[0], 0), 900): raise SystemExit(f'{path.name} fails unchanged: {reason}')
    seconds = 10 + 3 * (time.time() - start)
    for at, cell in enumerate(code):
        for mutant in list(chosen):
            if (changed := mutated(cell, mutant)) is None: continue
            chosen.remove(mutant)
            report(mutant, forked(lambda: rest(changed, at), seconds))
        execute(cell, main.__dict__, f'{path.stem}[{at}]')
    if chosen: raise SystemExit(f'{path.name} has no cell with {chosen[0]["before"][:80]!r}')


def run_pytest(mutant, files, seconds=600):
    "Which of the pytest files notices a mutant, in a copy of the package."
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT/'etrm', Path(folder)/'etrm')
        file = Path(folder)/'etrm'/f"{mutant['module']}.py"
        file.write_text(mutated(file.read_text(), mutant))
        for test in files:
            command = [sys.executable, '-m', 'pytest', '-qx', '-p', 'no:cacheprovider', str(ROOT/test)]
            if subprocess.run(command, cwd=folder, env=os.environ | dict(PYTHONPATH=folder), capture_output=True, timeout=seconds).returncode: return test
    return ''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('modules', nargs='+')
    parser.add_argument('--number', type=int, default=200, help='mutants in all, as many for each module; 0 takes every one')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--pytest', nargs='*', default=[], metavar='FILE', help='tried on what survives the notebook')
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), 'w')  # what is written to the standard output itself is the cells'
    say = lambda text: print(text, file=out, flush=True)
    say('| mutant | before | after | killed by |\n|---|---|---|---|')
    known, each, share = EQUIVALENT.read_text() if EQUIVALENT.exists() else '', -(-args.number // len(args.modules)), {}
    for module in args.modules:
        everything, results = list(mutants(module)), []
        chosen = random.Random(f'{args.seed} {module}').sample(everything, min(each or len(everything), len(everything)))
        def report(mutant, reason):
            before, after = (x.replace('|', '\\|') for x in shown(mutant))
            same = f'| {module} | `{before}` | `{after}` |' in known
            reason = reason or ('equivalent' if same else run_pytest(mutant, args.pytest) or '**survived**')
            results.append(reason)
            say(f"| {module}:{mutant['line']} {mutant['of']} | `{before}` | `{after}` | {reason} |")
        run_notebook(module, chosen, report)
        counted = [r for r in results if r != 'equivalent']
        share[module] = (sum(r != '**survived**' for r in counted), len(counted), len(everything))
    say('\n| module | killed | of | possible |\n|---|---|---|---|')
    for module, (killed, n, possible) in share.items(): say(f'| {module} | {killed} | {n} | {possible} |')
    killed, n = (sum(s[i] for s in share.values()) for i in (0, 1))
    say(f'| all | {killed} ({killed / max(1, n):.0%}) | {n} | {sum(s[2] for s in share.values())} |')


if __name__ == '__main__': main()
