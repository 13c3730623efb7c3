"""Formulas become MathML while the site is built: browsers draw it themselves, without a script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# A function that stands before its argument without a bracket: "log p", not "logp".
FUNCTION = re.compile(r"(<mi>(?:log|exp)</mi>|<msub><mi>log</mi>.*?</msub>)(?!<mo[^>]*>&#x00028;)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', flags=re.DOTALL)


def on_page_content(html_of_page: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page, where arithmatex has marked the formulas."""
    return FORMULA.sub(_mathml, html_of_page)


def _mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match[2]).strip()[2:-2]  # without the delimiters of arithmatex
    display = "block" if match[1] == "div" else "inline"
    return FUNCTION.sub(r'\1<mspace width="0.17em" />', convert(latex, display=display))
