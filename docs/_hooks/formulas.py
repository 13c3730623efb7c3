"""Formulas become MathML while the site is built: browsers draw it themselves, without a script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', flags=re.DOTALL)


def on_page_content(html_of_page: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page, where arithmatex has marked the formulas."""
    return FORMULA.sub(_mathml, html_of_page)


def _mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match[2]).strip()[2:-2]  # without the delimiters of arithmatex
    display = "block" if match[1] == "div" else "inline"
    return convert(latex, display=display)
