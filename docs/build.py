"""Build the site: notebooks as nbdev shows them, with a reference in place of exported code, to HTML by Sphinx. Nothing is executed."""
import base64
import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

from execnb.nbio import read_nb
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_line, rm_header_dash, strip_ansi, strip_hidden_metadata
from sphinx.cmd.build import main as sphinx_build

import parts
import reference

ROOT = Path(__file__).resolve().parent.parent
NBS, SOURCE, HTML = ROOT / 'nbs', ROOT / 'docs/_build/source', ROOT / 'docs/_build/html'
LAB = 'http://localhost:8888/lab/tree/'  # where `make lab` answers; it serves nbs/
HIDDEN = {'hide', 'default_exp', 'exporti'}
WRITTEN = ('docs/howto.md', 'docs/glossary.md', 'checkpoints/README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')  # no notebooks
LONGEST = 12  # lines of a chapter's code that are shown unasked
LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)')
NAME = re.compile(r'(?<![`\[\w}])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])')


def main() -> int:
    shutil.rmtree(SOURCE, ignore_errors=True)
    names = [f.relative_to(NBS) for f in sorted(NBS.rglob('*.ipynb')) if not any(p[0] in '._' for p in f.relative_to(NBS).parts)]
    known, files = known_names(names), {name: ROOT / name for name in WRITTEN}
    pages = [Page(name, known, files) for name in names]
    notebooks = {page.name: page.notebook() for page in pages}
    for name, text in parts.listed(pages).items(): write(SOURCE / name, text)
    for name, tree in parts.trees(pages).items():
        notebooks[name]['cells'].append(dict(cell_type='markdown', metadata={}, source=tree))
    for name, notebook in notebooks.items(): write(SOURCE / name, json.dumps(notebook, indent=1))
    write_files(files, known)
    build = ['-W', '--keep-going', '-q', '-E', '-b', 'html', '-c', str(ROOT / 'docs'), '-d', str(ROOT / 'docs/_build/doctrees')]
    return sphinx_build([*build, str(SOURCE), str(HTML)])


class Page:
    "One notebook on its way to the site."
    def __init__(self, name: Path, known: dict, files: dict):
        self.name, self.known, self.files = name, known, files
        self.nb = NBProcessor(NBS / name, [strip_ansi, hide_line, rm_header_dash, clean_magics, strip_hidden_metadata], process=True).nb
        sources = [c.source for c in self.nb.cells if 'export' in directives(c)]
        self.module = next((f'etrm.{d["default_exp"][0]}' for d in map(directives, self.nb.cells) if 'default_exp' in d), None)
        self.reader = reference.Reader(self.module, name.parent.as_posix(), sources, known)
        self.heading, self.sentence = '', ''
        self.title, self.summary, self.answer, self.tables = '', '', '', []

    def notebook(self) -> dict:
        cells = [c for cell in self.nb.cells if not HIDDEN & directives(cell).keys() for c in self.cells(cell)]
        return dict(nbformat=4, nbformat_minor=4, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'),
                    language_info=dict(name='python', pygments_lexer='python')), cells=cells)

    def cells(self, cell):
        if cell.cell_type == 'markdown': yield self.markdown(cell.source)
        elif cell.cell_type == 'code' and directives(cell).keys() & {'export', 'exports'}: yield from self.exported(cell)
        elif cell.cell_type == 'code': yield from self.shown(cell)

    def markdown(self, text: str) -> dict:
        self.remember(text)
        text = linked_names(self.links(text), self.known)
        if not self.title and (title := re.search(r'^# (.*)$', text, re.M)):
            self.title = title[1]
            self.summary = ' '.join(re.findall(r'^> ?(.*)$', text, re.M))
            text = text[:title.end()] + '\n\n' + self.opening() + text[title.end():]
        if self.heading == 'The answer' and not self.answer: self.answer = text.partition('## The answer')[2].strip()
        return dict(cell_type='markdown', metadata={}, source=text)

    def opening(self) -> str:
        "What stands under a title: the module for the reference, and the way to the live notebook."
        if self.name == Path('index.ipynb'): return ''
        how = os.path.relpath('files/docs/howto.md', self.name.parent) + '#open-a-chapter-in-jupyterlab'
        link = f'[Open in JupyterLab]({LAB}{self.name.as_posix()}), after [`make lab`]({how})'
        return (f':::{{py:module}} {self.module}\n:::\n\n' if self.module else '') + f'{{.live}}\n`nbs/{self.name.as_posix()}` · {link}'

    def exported(self, cell):
        if not cell.source.strip() or reference.only_imports(cell.source): return
        if self.name.stem == '00_index': return
        if entries := self.reader.entries(cell.source): yield dict(cell_type='markdown', metadata={}, source=entries)
        hidden = any(map(reference.is_definition, reference.ast.parse(cell.source).body)) and 'exports' not in directives(cell)
        metadata = dict(tags=['hide-input'], mystnb=dict(code_prompt_show='Source', code_prompt_hide='Source')) if hidden else {}
        yield code_cell(cell.source, [], metadata)

    def shown(self, cell):
        "A code cell, then its outputs: Markdown as Markdown, each image with its own alternative text."
        options, outputs = directives(cell), list(cell.get('outputs', []))
        if option(options, 'include') == 'false': return
        if option(options, 'output') == 'false': outputs = []
        source = '\n'.join(line for line in cell.source.splitlines() if not line.startswith('#|')).strip()
        alt = ' '.join(options.get('fig-alt:', [])).strip('"\'') or self.alternative()
        tags = ['remove-input'] if not source or option(options, 'echo') == 'false' else ['hide-input'] if self.folded(source, options) else []
        images, seen = sum(map(is_image, outputs)), 0
        for group in grouped(outputs, 'remove-input' not in tags):
            if group and is_markdown(group[0]): yield self.told(''.join(group[0]['data']['text/markdown']))
            else:
                seen += any(map(is_image, group))
                image = dict(alt=alt + (f' ({seen} of {images})' if images > 1 else ''))
                metadata = dict(tags=tags + shapes(group), mystnb=dict(image=image))
                yield code_cell(source or '#', group, metadata)  # myst-nb drops a cell without source
                tags = ['remove-input']

    def folded(self, source: str, options: dict) -> bool:
        "Imports are, and the long code of a chapter, so that its text, tables and figures stand together."
        if option(options, 'code-fold') == 'true' or reference.only_imports(source): return True
        return not self.module and len(source.splitlines()) > LONGEST

    def told(self, text: str) -> dict:
        "Markdown that a cell put out; tables and the answer stand on the page of results as well."
        cell = self.markdown(text)
        if self.heading == 'The answer' and not self.answer: self.answer = cell['source']
        if '|---' in text and '<details' not in text: self.tables.append((self.heading, cell['source']))
        return cell

    def remember(self, text: str):
        "The last heading and the last sentence before a figure describe it."
        prose = re.sub(r'^(```.*?^```|\$\$.*?\$\$|[|>:].*?$|    .*?$|!\[.*?$)', '', text, flags=re.S | re.M)
        for line in filter(None, map(str.strip, prose.splitlines())):
            if line.startswith('#'): self.heading, self.sentence = plain(line.lstrip('# ')), ''
            else: self.sentence = plain(re.split(r'(?<=[.?!:])\s', line)[0])

    def alternative(self) -> str: return ': '.join(filter(None, [self.heading, self.sentence])).rstrip('.: ') or str(self.name)

    def links(self, text: str) -> str:
        return LINK.sub(lambda m: linked(m, NBS / self.name, self.name.parent, self.files, self.alternative()), text)


def linked(match, source: Path, folder: Path, files: dict, alternative: str = '') -> str:
    """A link in the text of `source`, for its page in a folder of the site.

    Pages stay, images and Markdown files come along, any other file is named by its path."""
    bang, label, target = match.groups()
    if re.match(r'[a-z]+:|#', target): return match.group()
    target, _, anchor = target.partition('#')
    path = Path(os.path.normpath(source.parent / target))
    if not path.exists() or ROOT not in path.parents:
        raise SystemExit(f'docs/build.py: {source.relative_to(ROOT)}: dead link to {target}')
    page = inside = path.relative_to(ROOT).as_posix()
    if path.suffix == '.ipynb' and not bang: page = path.relative_to(NBS).as_posix()
    elif bang or path.suffix == '.md': page, files[inside] = f'files/{inside}', path
    else: return f'{label} (`{inside}`)' if inside not in label else label
    wide = '{.wide}' if bang and is_wide(path.read_bytes()) else ''
    return f"{bang}[{label or alternative}]({os.path.relpath(page, folder)}{anchor and '#' + anchor}){wide}"


def known_names(names) -> dict[str, tuple[str, str]]:
    "Where the reference of each exported name is; a name of two modules only as module.name, and a command's name is a word first."
    found = {}
    for name in names:
        cells = NBProcessor(NBS / name).nb.cells
        module = next((d['default_exp'][0] for d in map(directives, cells) if 'default_exp' in d), None)
        for cell in cells:
            if 'export' not in directives(cell) or str(module).endswith('_commands'): continue
            for symbol in reference.definitions(cell.source): found.setdefault(symbol, []).append((name.with_suffix('').as_posix(), f'etrm.{module}.{symbol}'))
    return {symbol: places[0] for symbol, places in found.items() if len(places) == 1}


def linked_names(text: str, known: dict) -> str:
    "Names in backticks lead to the reference, but in headings and code blocks."
    def role(match):
        target = known.get(match[1])
        return f'{{py:obj}}`{match[1]}{match[2] or ""} <{target[1]}>`' if target else match.group()
    blocks = re.split(r'(^```.*?^```[^\n]*$)', text, flags=re.S | re.M)
    lines = lambda block: '\n'.join(line if re.match(r'#|    ', line) else NAME.sub(role, line) for line in block.split('\n'))
    return ''.join(block if block.startswith('```') else lines(block) for block in blocks)


def write_files(files: dict, known: dict):
    "Copy what pages show of the repository; a Markdown file becomes a page, and brings what it links to."
    written = set()
    while left := files.keys() - written:
        for inside in left:
            target = SOURCE / 'files' / inside
            if target.suffix == '.md': write(target, written_page(inside, files, known))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(files[inside], target)
        written |= left


def written_page(inside: str, files: dict, known: dict) -> str:
    text = files[inside].read_text()
    text = LINK.sub(lambda m: linked(m, files[inside], Path('files', inside).parent, files), text)
    known = {name: place for name, place in known.items() if re.search('[A-Z_.]', name)}  # no plain words
    return linked_names(text, known) + (parts.HOWTO if inside == 'docs/howto.md' else '')


def code_cell(source, outputs, metadata) -> dict:
    return dict(cell_type='code', execution_count=None, metadata=metadata, source=source, outputs=[dict(o, **({'execution_count': None} if o['output_type'] == 'execute_result' else {})) for o in outputs])


def grouped(outputs, with_input: bool) -> list[list]:
    "Outputs that one cell can show: Markdown stands alone, and no two images share an alternative text. Progress bars and warnings go."
    groups = [[]] if with_input else []
    for output in outputs:
        if output['output_type'] == 'stream' and output['name'] == 'stderr' or is_repr(output): continue
        alone = not groups or is_markdown(output) or any(map(is_markdown, groups[-1])) or (is_image(output) and any(map(is_image, groups[-1])))
        if alone: groups.append([output])
        else: groups[-1].append(output)
    return groups


def plain(text: str) -> str: return re.sub(r'[*`$\\\[\]]|\]\([^)]*\)', '', re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text)).strip()


def directives(cell) -> dict: return getattr(cell, 'directives_', None) or {}


def option(options: dict, name: str) -> str: return ' '.join(options.get(f'{name}:', [])).lower()


def is_image(output) -> bool: return any(k.startswith('image/') for k in output.get('data', {}))


def is_markdown(output) -> bool: return 'text/markdown' in output.get('data', {})


def is_repr(output) -> bool:
    "What a plotting function returned, in words."
    data = output.get('data', {})
    return data.keys() == {'text/plain'} and ''.join(data['text/plain']).lstrip('[').startswith('<matplotlib.')


def shapes(outputs: list) -> list[str]:
    "Tags for what must not be squeezed on a phone: columns of text, and figures of several panels."
    texts = [''.join(o.get('text') or o.get('data', {}).get('text/plain', '')) for o in outputs if not is_image(o)]
    images = [base64.b64decode(''.join(o['data']['image/png'])) for o in outputs if 'image/png' in o.get('data', {})]
    return ['aligned'] * any(map(is_aligned, texts)) + ['wide'] * any(map(is_wide, images))


def is_aligned(text: str) -> bool: return sum(bool(re.search(r'\S   +\S|^\|.*\|$', line)) for line in text.splitlines()) > 1


def is_wide(png: bytes) -> bool:
    "A figure of several panels; none of them is read where all have to fit a phone."
    if not png.startswith(b'\x89PNG'): return False
    width, height = struct.unpack('>II', png[16:24])
    return width > 800 or width > 400 and width > 2.2 * height


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == '__main__':
    os.chdir(ROOT)  # nbdev looks for settings.ini
    sys.exit(main())
