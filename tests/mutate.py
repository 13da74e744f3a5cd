"""Change one operator or constant of a module at a time, run its notebook, and list the changes that nothing noticed.

    python tests/mutate.py grids contexts --number 40 --seed 0
    python tests/mutate.py votes --number 20 --pytest tests/test_official_evaluator.py

A mutant runs in a fork of the process that has executed the cells before its own, up to the first cell that fails. What
survives the notebook is tried on the pytest files named, in a copy of the package. `mutants_equivalent.md` lists
changes that change no result; they are not counted.
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
both_ways = lambda pairs: {old: new for pair in pairs for old, new in (pair, pair[::-1])}
OPERATORS = both_ways([(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn), (ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr)])
OPERATORS |= {ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.USub: ast.UAdd}
NAMES = both_ways(pair.split() for pair in ('min max', 'any all', 'argmin argmax', 'amin amax', 'zeros ones',
    'mean sum', 'zeros_like ones_like', 'index_add_ index_copy_', 'floor ceil', 'append extend', 'argsort sort',
    'minimum maximum'))
NAMES |= dict(cumsum='asarray', sorted='list', sign='abs', detach='clone', std='mean', var='mean', sqrt='abs')
COSMETIC = ('trange', 'tqdm', 'print', 'warn', 'echo')


def changes(node):
    "Single changes of one node: field, place in it (None: all of it), new value."
    operator = OPERATORS.get(type(getattr(node, 'op', None)))
    if operator and not isinstance(getattr(node, 'operand', None), ast.Constant): yield 'op', None, operator()
    if isinstance(getattr(node, 'op', None), (ast.Not, ast.Invert)):
        yield 'operand', None, ast.UnaryOp(node.op, node.operand)
    if isinstance(node, (ast.If, ast.IfExp, ast.While)): yield 'test', None, ast.UnaryOp(ast.Not(), node.test)
    for i, test in enumerate(getattr(node, 'ifs', ())): yield 'ifs', i, ast.UnaryOp(ast.Not(), test)
    for i, op in enumerate(getattr(node, 'ops', ())):
        if type(op) in OPERATORS: yield 'ops', i, OPERATORS[type(op)]()
    for field in ('attr', 'id'):
        if getattr(node, field, None) in NAMES: yield field, None, NAMES[getattr(node, field)]
    value = node.value if isinstance(node, ast.Constant) else None
    if type(value) is bool: yield 'value', None, not value
    if type(value) is int: yield 'value', None, value + 1
    if type(value) is float: yield 'value', None, 2 * value or 1.


def nodes(tree):
    "The nodes worth a change, in a fixed order: no annotation, message, decorator, figure or progress bar."
    function = getattr(tree, 'func', None)
    name, called = getattr(tree, 'name', None) or '', getattr(function, 'id', getattr(function, 'attr', ''))
    if isinstance(tree, (ast.JoinedStr, ast.Raise)) or re.fullmatch('__(repr|str)__|draw_.*', name): return
    yield tree
    if called in COSMETIC: return
    for field, value in ast.iter_fields(tree):
        if field in ('annotation', 'returns', 'decorator_list') or (called == 'Field' and field == 'keywords'): continue
        for child in value if isinstance(value, list) else [value]:
            any_negative = called == 'reshape' and isinstance(child, ast.UnaryOp)  # -1 and -2 are the same there
            if isinstance(child, ast.AST) and not any_negative: yield from nodes(child)


def mutants(module):
    "Every mutant of a module: its line, and the top-level statement before and after."
    for statement in ast.parse((ROOT/'etrm'/f"{module.replace('.', '/')}.py").read_text()).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)) or ast.unparse(statement).startswith('__all__'): continue
        line, name = statement.lineno, getattr(statement, 'name', '')
        for i, node in enumerate(nodes(statement)):
            line = getattr(node, 'lineno', line)
            for field, place, value in changes(node):
                changed = copy.deepcopy(statement)
                at = list(nodes(changed))[i]
                if place is None: setattr(at, field, value)
                else: getattr(at, field)[place] = value
                before, after = map(ast.unparse, (statement, changed))
                yield dict(module=module, line=line, name=name, before=before, after=after)


def shown(mutant):
    "The change with some characters around it."
    before, after = (re.sub(r'\s+', ' ', mutant[k]) for k in ('before', 'after'))
    start = len(os.path.commonprefix([before, after]))
    end = len(os.path.commonprefix([x[start:][::-1] for x in (before, after)]))
    return tuple(x[max(0, start - 28):len(x) - max(0, end - 20)].replace('|', '\\|') for x in (before, after))


SKIPPED = re.compile(r'(#\|.*\n)*#\| *(slow|cuda|eval: *false)')


def cells(module):
    "The path of a module's notebook, and the code that its tests run."
    for path in ROOT.glob('nbs/**/*.ipynb'):
        code = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
        if not code or code[0].split('\n')[0] != f'#| default_exp {module}': continue
        return path, [c.replace('nbdev.nbdev_export()', '') for c in code if not SKIPPED.match(c)]
    raise SystemExit(f'no notebook exports {module}')


def execute(code, namespace, name):
    "Run a cell as IPython does, so that its source can be looked up."
    execute.last = name
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    exec(compile(code, name, 'exec'), namespace)


def mutated(code, mutant):
    "Code with the mutant's statement in place of its own, or None where it is not there."
    tree = ast.parse(code)
    at = [i for i, s in enumerate(tree.body) if ast.unparse(s) == mutant['before']]
    if not at: return None
    tree.body[at[0]] = ast.parse(mutant['after']).body[0]
    return ast.unparse(tree)


def forked(run, seconds):
    "What `run` died of in a fork of this process: '' if it did not."
    with tempfile.TemporaryFile('w+') as out:
        if not (child := os.fork()):
            os.setsid()
            try: run()
            except BaseException as error: out.write(f'{execute.last}, {type(error).__name__}')
            out.flush()
            os._exit(0)
        end = time.time() + seconds
        while not (done := os.waitpid(child, os.WNOHANG))[0] and time.time() < end: time.sleep(.01)
        try: os.killpg(child, signal.SIGKILL)  # and what it started
        except ProcessLookupError: pass
        if done[0]: return out.seek(0) or out.read() or (f'exit {done[1]}' if done[1] else '')
        os.waitpid(child, 0)
        return f'{seconds:.0f} s'


def replace_folder(old, new):
    shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(new, old, symlinks=True)


def run_notebook(module, chosen, report, folder):
    "Execute a notebook; before each exported cell try its mutants, which find temporary files as they were left."
    path, code = cells(module)
    temporary, kept = (Path(folder)/module/name for name in ('temporary', 'kept'))
    temporary.mkdir(parents=True)
    tempfile.tempdir = os.environ['TMPDIR'] = str(temporary)
    os.chdir(path.parent)
    os.environ |= dict(IN_TEST='1', MPLBACKEND='agg', WANDB_MODE='disabled')
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    def go_on(cell, at):
        for i, c in enumerate([cell, *code[at + 1:]], at): execute(c, main.__dict__, f'{path.stem}[{i}]')
    start = time.time()
    if reason := forked(lambda: go_on(code[0], 0), 1800): raise SystemExit(f'{path.name} fails unchanged: {reason}')
    seconds = 20 + 3 * (time.time() - start)
    for at, cell in enumerate(code):
        replace_folder(kept, temporary)
        for mutant in list(chosen):
            if (changed := mutated(cell, mutant)) is None: continue
            chosen.remove(mutant)
            reason = forked(lambda: go_on(changed, at), seconds)
            replace_folder(temporary, kept)
            report(mutant, reason)
        execute(cell, main.__dict__, f'{path.stem}[{at}]')
    if chosen: raise SystemExit(f'{path.name} has no cell with {chosen[0]["before"][:80]!r}: export first')


def run_pytest(mutant, files):
    "Which of the pytest files notices a mutant, in a copy of the package."
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT/'etrm', Path(folder)/'etrm')
        file = Path(folder)/'etrm'/f"{mutant['module'].replace('.', '/')}.py"
        file.write_text(mutated(file.read_text(), mutant))
        env = os.environ | dict(PYTHONPATH=folder, PYTHONSAFEPATH='1')
        command = [sys.executable, '-m', 'pytest', '-qx', '-p', 'no:cacheprovider']
        run = lambda test: subprocess.run([*command, str(ROOT/test)], cwd=folder, env=env, capture_output=True)
        return next((test for test in files if run(test).returncode), '')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('modules', nargs='+')
    parser.add_argument('--number', type=int, default=200, help='mutants in all, as many of each module; 0: every one')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--pytest', nargs='*', default=[], metavar='FILE', help='tried on what survives the notebook')
    args = parser.parse_args()
    out, folder = os.fdopen(os.dup(1), 'w'), tempfile.TemporaryDirectory()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1); os.dup2(1, 2)  # what cells print
    say = lambda text: print(text, file=out, flush=True)
    known, each, shares = EQUIVALENT.read_text(), -(-args.number // len(args.modules)), []
    say('| mutant | before | after | killed by |\n|---|---|---|---|')
    for module in args.modules:
        possible, results = list(mutants(module)), []
        number = min(each or len(possible), len(possible))
        def report(mutant, reason):
            before, after = shown(mutant)
            same = f'| {module} | `{before}` | `{after}` |' in known
            results.append(reason or ('equivalent' if same else run_pytest(mutant, args.pytest) or '**survived**'))
            say(f"| {module}:{mutant['line']} {mutant['name']} | `{before}` | `{after}` | {results[-1]} |")
        try:
            run_notebook(module, random.Random(f'{args.seed} {module}').sample(possible, number), report, folder.name)
        except BaseException as error:  # the standard error is the cells'
            say(f'\n{module} stopped in {execute.last}: {type(error).__name__}: {error}')
            raise
        alive, same = (results.count(what) for what in ('**survived**', 'equivalent'))
        shares.append((module, number - same - alive, number - same, same, len(possible)))
    say('\n| module | killed | of | equivalent | possible |\n|---|---|---|---|---|')
    total = [sum(column) for column in list(zip(*shares))[1:]]
    for row in [*shares, ('all', *total)]: say('| ' + ' | '.join(map(str, row)) + ' |')
    say(f'\n{total[0] / max(1, total[1]):.1%} killed')


if __name__ == '__main__': main()
