"""Formulas become MathML while the site is built: browsers draw it themselves, without a script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# The converter leaves out spaces that TeX sets. A function before an argument without a bracket: "log p", not "logp".
FUNCTION = re.compile(r"(<mi>(?:log|exp)</mi>|<msub><mi>log</mi>.*?</msub>)(?!<mo[^>]*>&#x00028;)")
# A function after a factor: "p log p" and "s tanh(x)".
FACTOR = re.compile(r"(</(?:mi|mn|msub|msup|msubsup)>)(?=(?:<msub>)?<mi>(?:log|exp|tanh)</mi>)")
# A sign after a bracket, a comma or an equals sign is no subtraction, which would have spaces around it.
SIGN = re.compile(r"(<mo[^>]*>(?:&#x0003D;|&#x00028;|&#x0002C;|&#x02308;|\[)</mo>)<mo>&#x02212;</mo>")
SPACE = r'<mspace width="0.17em" />'
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', flags=re.DOTALL)


def on_page_content(html_of_page: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page, where arithmatex has marked the formulas."""
    return FORMULA.sub(_mathml, html_of_page)


def _mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match[2]).strip()[2:-2]  # without the delimiters of arithmatex
    display = "block" if match[1] == "div" else "inline"
    mathml = FUNCTION.sub(rf"\1{SPACE}", convert(latex, display=display))
    mathml = FACTOR.sub(rf"\1{SPACE}", mathml)
    mathml = SIGN.sub(r'\1<mo form="prefix">&#x02212;</mo>', mathml)
    return mathml.replace(r"\_", "_")
