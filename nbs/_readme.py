"""Make README.md from nbs/index.ipynb; nbdev_readme does the same but needs Quarto."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def main():
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
