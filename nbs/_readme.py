"""Make README.md from nbs/index.ipynb (nbdev_readme does so too, but needs Quarto), and the list in checkpoints/README.md."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from etrm.basics.listing import listing

ROOT = Path(__file__).resolve().parent.parent


BEGIN, END = '<!-- from here on made by nbs/_readme.py -->', '<!-- to here -->'


def list_records():
    "The part of checkpoints/README.md that the provenance beside the records says."
    file = ROOT / 'checkpoints' / 'README.md'
    before, begin, rest = file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    if not begin or not after: raise SystemExit(f'{file} has no line {BEGIN} with a line {END} behind it: put them where the list belongs')
    file.write_text(f'{before}{BEGIN}\n{listing(ROOT / "checkpoints")}\n{END}{after}')


def main():
    list_records()
    notebook = nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4)
    shows = lambda c: any('text/markdown' in o.get('data', {}) for o in c.get('outputs', ()))
    notebook.cells = [c for c in notebook.cells if not c.source.startswith('#| hide') and (shows(c) or not c.source.startswith('#| echo: false'))]
    for cell in notebook.cells:
        cell.source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
        if cell.cell_type == 'code' and shows(cell): cell.cell_type, cell.source = 'markdown', cell.outputs[0].data['text/markdown']
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    body = re.sub(r'\]\((?!https?:|#|\.\./)', '](nbs/', body).replace('](../', '](')  # links are relative to nbs/ there, to the root here
    (ROOT / 'README.md').write_text(re.sub(r'\n{3,}', '\n\n', body).strip() + '\n')


if __name__ == '__main__': main()
