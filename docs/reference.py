"""Reference entries from exported source: signature, docstring and docments, read without importing the library."""
import ast
import html
import io
import os
import re
import tokenize
from dataclasses import dataclass

TORCH, NUMPY, PYTHON = 'https://docs.pytorch.org/docs/stable/', 'https://numpy.org/doc/stable/reference/', 'https://docs.python.org/3/library/'
MATPLOTLIB = 'https://matplotlib.org/stable/api/_as_gen/'
EXTERNAL = {  # written out, not fetched: the build needs no network
    'Tensor': TORCH + 'tensors.html', 'torch.Tensor': TORCH + 'tensors.html', 'nn.Module': TORCH + 'generated/torch.nn.Module.html',
    'torch.nn.Module': TORCH + 'generated/torch.nn.Module.html', 'nn.Linear': TORCH + 'generated/torch.nn.Linear.html',
    'torch.device': TORCH + 'tensor_attributes.html#torch.device', 'torch.dtype': TORCH + 'tensor_attributes.html#torch.dtype',
    'torch.optim.Optimizer': TORCH + 'optim.html#torch.optim.Optimizer', 'torch.Generator': TORCH + 'generated/torch.Generator.html',
    'np.ndarray': NUMPY + 'generated/numpy.ndarray.html', 'np.random.Generator': NUMPY + 'random/generator.html#numpy.random.Generator',
    'Path': PYTHON + 'pathlib.html#pathlib.Path', 'Literal': PYTHON + 'typing.html#typing.Literal',
    'Callable': PYTHON + 'collections.abc.html#collections.abc.Callable', 'Iterator': PYTHON + 'collections.abc.html#collections.abc.Iterator',
    'Iterable': PYTHON + 'collections.abc.html#collections.abc.Iterable', 'ValueError': PYTHON + 'exceptions.html#ValueError',
    'BaseModel': 'https://docs.pydantic.dev/latest/api/base_model/', 'ValidationError': 'https://docs.pydantic.dev/latest/api/pydantic_core/#pydantic_core.ValidationError',
    'Figure': MATPLOTLIB + 'matplotlib.figure.Figure.html', 'plt.Figure': MATPLOTLIB + 'matplotlib.figure.Figure.html',
    'plt.Axes': MATPLOTLIB + 'matplotlib.axes.Axes.html',
}
BOUNDS = dict(ge='≥', gt='>', le='≤', lt='<')  # pydantic's and typer's constraints


@dataclass
class Field:
    "A parameter, or a field of a class."
    name: str
    type: str = ''
    default: str = ''
    text: str = ''

    def __str__(self):
        equals = ' = ' if self.type else '='
        return self.name + (f': {self.type}' if self.type else '') + (equals + self.default if self.default else '')


class Reader:
    "Entries of one module, on a page of `folder`; `known` maps a name to its (page, anchor) on the site."
    def __init__(self, module: str, folder: str, sources: list[str], known: dict):
        self.module, self.folder, self.known = module, folder, known
        self.constants = {t.id: n.value for s in sources for n in ast.parse(s).body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}

    def entries(self, source: str) -> str:
        "MyST for every public function and class of a cell; empty where there is none."
        self.comments, self.source = comments_of(source), source
        return '\n\n'.join(self.entry(n) for n in ast.parse(source).body if is_definition(n) and public(n.name))

    def entry(self, node) -> str: return self.of_class(node) if isinstance(node, ast.ClassDef) else self.of_function(node, 'function', node.name)

    def of_function(self, node, kind, name) -> str:
        fields, returned = self.parameters(node), ast.unparse(node.returns) if node.returns else ''
        marks = [m for m in ('staticmethod', 'classmethod') if m in decorators(node)]
        if 'property' in decorators(node):
            return directive('property', name, [f':type: {returned}'] if returned else [], [self.prose(ast.get_docstring(node))], 3)
        signature = f"{name}({self.joined(node, fields)})" + (f' -> {returned}' if returned else '')
        rows = [f for f in fields if f.text]
        back = self.comments.get(node.returns.end_lineno) if node.returns and node.returns.end_lineno < node.body[0].lineno else None
        table = self.table(fields if rows else [], Field('returns', returned, text=back) if back else None)
        return directive(kind, signature, [f':{m}:' for m in marks], [self.prose(ast.get_docstring(node)), table], 3 if kind == 'method' else 4)

    def of_class(self, node) -> str:
        init = next((n for n in node.body if is_definition(n) and n.name == '__init__'), None)
        fields = self.parameters(init) if init else [self.field(n.target.id, n.annotation, n.value, n) for n in node.body if isinstance(n, ast.AnnAssign)]
        bases = [ast.unparse(b) for b in node.bases if ast.unparse(b) != 'object']
        methods = [n for n in node.body if is_definition(n) and (public(n.name) or n.name == '__call__') and not isinstance(n, ast.ClassDef)]
        body = [self.prose(ast.get_docstring(node)), 'Bases: ' + ', '.join(map(self.type, bases)) if bases else '',
                self.table(fields if any(f.text or not init for f in fields) else [])]
        body += [self.of_function(m, 'method', m.name) for m in methods]
        signature = f"{node.name}({self.joined(init, fields) if init else ', '.join(map(str, fields))})" if fields else node.name
        return directive('class', signature, [], body, 4)

    def parameters(self, node) -> list[Field]:
        "The parameters but for self, with their comments; a comment belongs to the last parameter on its line."
        a = node.args
        positional = [*a.posonlyargs, *a.args]
        pairs = list(zip(positional, [None] * (len(positional) - len(a.defaults)) + a.defaults))
        pairs += [(a.vararg, None)] if a.vararg else []
        pairs += list(zip(a.kwonlyargs, a.kw_defaults)) + ([(a.kwarg, None)] if a.kwarg else [])
        pairs = [(p, d) for p, d in pairs if p.arg not in ('self', 'cls')]
        last = {(d or p).end_lineno: p for p, d in pairs}
        end = node.body[0].lineno
        return [self.field(p.arg, p.annotation, d, p if last[(d or p).end_lineno] is p and (d or p).end_lineno < end else None) for p, d in pairs]

    def field(self, name, annotation, default, at) -> Field:
        line = (default or at).end_lineno if at is not None else None
        text = self.comments.get(line, '') if at is not None else ''
        if at is not None and not text: text = self.comments.get(at.lineno, '')
        call = self.constants.get(default.id) if isinstance(default, ast.Name) else default
        if isinstance(call, ast.Call) and ast.unparse(call.func).split('.')[-1] in ('Field', 'Argument', 'Option', 'field'): default, text = unpack(call, text)
        return Field(name, ast.unparse(annotation) if annotation else '', ast.unparse(default) if default is not None else '', text)

    def joined(self, node, fields) -> str:
        "The parameter list with its stars."
        a, byname, parts = node.args, {f.name: f for f in fields}, []
        parts += [str(byname[p.arg]) for p in a.posonlyargs + a.args if p.arg in byname]
        if a.vararg: parts.append('*' + str(byname[a.vararg.arg]))
        elif a.kwonlyargs: parts.append('*')
        parts += [str(byname[p.arg]) for p in a.kwonlyargs]
        return ', '.join(parts + (['**' + str(byname[a.kwarg.arg])] if a.kwarg else []))

    def table(self, fields, returned=None) -> str:
        if not fields and not returned: return ''
        rows = [(code(f.name), self.type(f.type), code(f.default), self.prose(f.text)) for f in fields]
        if returned: rows.append(('*returns*', self.type(returned.type), '', self.prose(returned.text)))
        heads = ('parameter', 'type', 'default', 'meaning')
        kept = [i for i in range(4) if any(row[i] for row in rows)]
        return '\n'.join('| ' + ' | '.join(row[i] for i in kept) + ' |' for row in [heads, ['---'] * 4, *rows])

    def type(self, text: str) -> str:
        "A type as code, every name that is documented somewhere linked."
        parts = re.split(r'([A-Za-z_][\w.]*)', text)
        return f"<code class=\"type\">{''.join(self.linked(p) for p in parts)}</code>".replace('|', '&#124;') if text else ''

    def linked(self, name: str) -> str:
        page, anchor = self.known.get(name, ('', ''))
        url = f'{os.path.relpath(page, self.folder)}.html#{anchor}' if page else EXTERNAL.get(name)
        return f'<a href="{url}">{html.escape(name)}</a>' if url else html.escape(name)

    def prose(self, text) -> str:
        "A docstring or a comment: plain text but for its backticks."
        parts = re.split(r'(`[^`]+`)', ' '.join((text or '').split()))
        return ''.join(p.replace('|', r'\|') if p.startswith('`') else re.sub(r'([\\`*_<>\[\]$|{}#~])', r'\\\1', p) for p in parts)


def unpack(call, text):
    "The default and the help of a pydantic field or a typer parameter."
    words = {k.arg: k.value for k in call.keywords}
    told = words.get('description') or words.get('help')
    bounds = ', '.join(f'{sign} {ast.unparse(words[key])}' for key, sign in BOUNDS.items() if key in words and 'Field' in ast.unparse(call.func))
    told = told.value if isinstance(told, ast.Constant) else text
    default = call.args[0] if call.args else words.get('default') or (ast.Call(words['default_factory'], [], []) if 'default_factory' in words else None)
    if isinstance(default, ast.Constant) and default.value is Ellipsis: default = None
    return default, ' '.join(filter(None, [told, f'({bounds})' if bounds else '']))


def comments_of(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('# ').strip() for t in tokens if t.type == tokenize.COMMENT}


def directive(kind, argument, options, body, colons) -> str:
    fence = ':' * colons
    return '\n'.join([f'{fence}{{py:{kind}}} {argument}', *options, '', '\n\n'.join(filter(None, body)), fence])


def definitions(source: str):
    "Public names of a cell: functions, classes and, with their class before a dot, methods."
    for node in ast.parse(source).body:
        if not is_definition(node) or not public(node.name): continue
        yield node.name
        if isinstance(node, ast.ClassDef): yield from (f'{node.name}.{m.name}' for m in node.body if is_definition(m) and public(m.name))


def only_imports(source: str) -> bool: return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)


def is_definition(node) -> bool: return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def public(name: str) -> bool: return not name.startswith('_')


def decorators(node) -> set[str]: return {ast.unparse(d).split('.')[-1] for d in node.decorator_list}


def code(text: str) -> str: return f'<code>{html.escape(text)}</code>'.replace('|', '&#124;').replace('*', '&#42;').replace('_', '&#95;').replace('$', '&#36;') if text else ''
