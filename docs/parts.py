"The parts of the site: pages that list other pages, made of their titles, sentences, answers and tables, and the side bar."
from pathlib import Path

COMPARISONS, FULL_SCALE = '14_comparisons', '12_full_scale'


def tree(pages: list[str]) -> str: return '\n\n:::{toctree}\n:hidden:\n\n' + '\n'.join(pages) + '\n:::\n'


HOWTO = tree([f'Full size, on a GPU </{FULL_SCALE}>', 'Change the code </files/CONTRIBUTING>'])
SITE = tree(['chapters', 'How-to <files/docs/howto>', 'reference', 'results', f'Comparisons <{COMPARISONS}>', 'Glossary <files/docs/glossary>',
             'Log of records <files/checkpoints/README>', 'Changelog <files/CHANGELOG>', 'All names <genindex>'])


def listed(pages: list) -> dict[str, str]:
    "The pages that are made here, by file."
    return {'chapters.md': chapters(chapters_of(pages)), 'results.md': results(chapters_of(pages)), 'reference.md': reference(folders_of(pages))}


def trees(pages: list) -> dict[Path, str]:
    "What is below a page in the side bar."
    below = {page.name: tree([p.name.stem for p in pages if p.name.parent == page.name.parent and p != page]) for page in folders_of(pages)}
    return below | {Path('index.ipynb'): SITE}


def chapters_of(pages: list) -> list:
    "Findings, in order; the page of comparisons and the guide to full size stand elsewhere."
    return [p for p in pages if len(p.name.parts) == 1 and p.name.stem not in ('index', COMPARISONS, FULL_SCALE)]


def folders_of(pages: list) -> list: return [p for p in pages if p.name.stem == '00_index']


def number(page) -> str: return page.name.stem.partition('_')[0]


def chapters(pages: list) -> str:
    rows = [f'| {number(p)} | [{p.title}]({p.name}) | {p.summary} |' for p in pages]
    entries = [f'{number(p)} · {p.title} <{p.name.stem}>' for p in pages]
    opening = ('Each is one question, with the figure and the record that answer it. They build on each other. '
               f'12 is [the guide to full size]({FULL_SCALE}.ipynb); 13 and 14 may be skipped.')
    return '\n'.join(['# Chapters', '', opening, '', '| | question | in one sentence |', '|---|---|---|', *rows]) + tree(entries)


def reference(pages: list) -> str:
    rows = [f'| [{p.title}]({p.name}) | {p.summary} |' for p in pages]
    return '\n'.join(['# Reference', '', 'The library in reading order: a module imports only from those before it.', '',
                      '| part of `etrm` | what it is for |', '|---|---|', *rows]) + tree([p.name.with_suffix('').as_posix() for p in pages])


def results(pages: list) -> str:
    "Every chapter's answer and its tables."
    opening = ('Every table of the chapters, with its intervals, below the answer that it supports. '
               'Intervals are 95%; what each is of, its chapter says.')
    return '\n\n'.join(['# Results', opening, *map(results_of, pages)])


def counted(tables: list) -> str: return f'{len(tables)} table' + 's' * (len(tables) > 1)


def results_of(page) -> str:
    answer = page.answer.partition('**What it does not show')[0].strip()
    tables = [f'**{heading}**\n\n{table}' for heading, table in page.tables]
    if tables: tables = [f'<details><summary>{counted(tables)}</summary>', *tables, '</details>']
    return '\n\n'.join([f'## {number(page)} · [{page.title}]({page.name})', answer, *tables])
