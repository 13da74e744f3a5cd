"""Sphinx: notebooks with the outputs they were committed with; no network at build time, none in the browser."""
import html
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent))
from reference import EXTERNAL

LONG_WORD = 20  # characters of inline code
logger = logging.getLogger(__name__)
settings = ConfigParser()
settings.read(Path(__file__).parent.parent / 'settings.ini')
project, release = settings['DEFAULT']['lib_name'], settings['DEFAULT']['version']
copyright, author = settings['DEFAULT']['copyright'], settings['DEFAULT']['author']

extensions = ['myst_nb']
root_doc = 'index'
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
nb_code_prompt_show, nb_code_prompt_hide = 'Code', 'Code'
myst_enable_extensions = ['dollarmath', 'colon_fence', 'attrs_block', 'attrs_inline']
myst_heading_anchors = 3
suppress_warnings = ['myst.header']  # a notebook's output may start at a deeper heading

add_module_names = False
python_maximum_signature_line_length = 76
toc_object_entries_show_parents = 'hide'
smartquotes = False  # quotes in code stay as they are
highlight_language = 'python'
html_theme = 'sphinx_book_theme'
html_title = project
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
html_show_sourcelink = False
html_copy_source = False
html_context = dict(default_mode='auto')  # light or dark as the reader's system
html_math_renderer = 'mathml'  # drawn by the browser: no script from elsewhere
html_theme_options = dict(use_download_button=False, use_fullscreen_button=False, home_page_in_toc=True, show_toc_level=2, navbar_persistent=[])


def breakable(app, pagename, templatename, context, doctree):
    "Long words of inline code may break, behind a slash, an underscore and the like; short ones never do."
    def word(match): return f'<span class="pre long">{re.sub(r"(?<=[/_=,.])(?=[^/_=,.])", "<wbr>", match[1])}</span>'
    if 'body' in context: context['body'] = re.sub(rf'<span class="pre">([^<]{{{LONG_WORD},}})</span>', word, context['body'])


def mathml(node, block) -> str:
    source = re.sub(r'\\([Bb]igg?)(?![A-Za-z])', r'\\\1l', node.astext())  # docutils knows \Bigl, not \Big
    try: return tex2mathml(source, as_block=block)
    except MathError as error: logger.warning('equation: %s', error, location=node)
    return html.escape(source)


def inline_math(writer, node):
    writer.body.append(mathml(node, False))
    raise nodes.SkipNode


def block_math(writer, node):
    writer.body.append(f'<div class="math">{mathml(node, True)}</div>')
    raise nodes.SkipNode


def resolve(app, env, node, contnode):
    "Names of a signature: of another module here, or of torch, numpy and the like by their written addresses."
    name = node.get('reftarget', '')
    if node.get('refdomain') != 'py': return None
    if name in EXTERNAL: return nodes.reference('', '', contnode, internal=False, refuri=EXTERNAL[name])
    found = [(full, entry) for full, entry in env.domains['py'].objects.items() if full.endswith('.' + name) and entry.objtype != 'module']
    if len(found) != 1: return None
    full, entry = found[0]
    return make_refnode(app.builder, node['refdoc'], entry.docname, entry.node_id, contnode, full)


def setup(app):
    app.add_html_math_renderer('mathml', inline_renderers=(inline_math, None), block_renderers=(block_math, None))
    app.connect('missing-reference', resolve)
    app.connect('html-page-context', breakable)
