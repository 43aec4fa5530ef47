"""A Sphinx extension: formulas as MathML, which browsers draw themselves. No script, no font, no network."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

# What docutils does not know, and what it does. MathML's brackets grow by themselves, so that \\big is not missed.
KNOWN = (
    (re.compile(r"\\dots(?![a-z])"), r"\\ldots"),
    (re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])"), ""),
    (re.compile("½"), r"\\frac{1}{2}"),
    (re.compile("¼"), r"\\frac{1}{4}"),
    (re.compile("¾"), r"\\frac{3}{4}"),
)


def mathml(formula: str, block: bool = False) -> str:
    """A LaTeX formula as MathML. docutils raises MathError on a command that it does not know."""
    for unknown, known in KNOWN:
        formula = unknown.sub(known, formula)
    return tex2mathml(formula, as_block=block)


def visit_inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
