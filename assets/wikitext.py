"""Wikipedia's markup to plain prose: a small cleaner of regular expressions, not a parser.

It is made for one dump and one use, running text to feed a language model: what is not a sentence (tables,
references, formulas, galleries, closing lists of links) is dropped rather than rendered.
"""

import bz2
import html
import re
from collections.abc import Callable
from pathlib import Path

MIN_CHARACTERS = 2000  # shorter articles are stubs or lists of links

_PAGE = re.compile(r"<page>(.*?)</page>", re.DOTALL)
_TITLE = re.compile(r"<title>(.*?)</title>")
_TEXT = re.compile(r"<text[^>]*>(.*?)</text>", re.DOTALL)

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_EMPTY_REF = re.compile(r"<ref\b[^<>]*/>", re.IGNORECASE)
_DROPPED_TAG = re.compile(
    r"<(ref|math|gallery|timeline|table|source|syntaxhighlight|code|pre|score|imagemap|hiero)\b[^<>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_BRACES = re.compile(r"(?<!\{)\{[^{}|]*\}(?!\})")
_TABLE = re.compile(r"^[ :*]*\{\|(?:(?!\{\|).)*?^\s*\|\}", re.DOTALL | re.MULTILINE)
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+([^\[\]]*)\]")
_BARE_URL = re.compile(r"\b(?:https?|ftp)://\S+")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NOT_PROSE_LINK = re.compile(r"(?:file|image|category|media|[a-z]{2,3}|simple|zh-[a-z-]+)\s*:", re.IGNORECASE)
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*=+\s*$", re.MULTILINE)
_QUOTES = re.compile(r"'{2,}")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_RESIDUE = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|\|thumb\b")

_CLOSING_SECTIONS = frozenset(
    (
        "bibliography", "citations", "discography", "external links", "filmography", "footnotes", "further reading",
        "gallery", "literature", "notes", "notes and references", "references", "references and notes", "see also",
        "selected bibliography", "sources", "works cited",
    )
)  # fmt: skip
# Templates whose last unnamed argument is a piece of the sentence; most others are dropped.
_TEXT_TEMPLATES = frozenset(
    (
        "abbr", "angbr", "bigmath", "blockquote", "cquote", "lang", "linktext", "math", "mvar", "nobr", "nowrap",
        "quote", "small", "smallcaps", "transl", "unicode", "visible anchor", "w",
    )
)  # fmt: skip


def articles(dump: Path) -> list[str]:
    """Cleaned articles of a dump in its own order, title first; redirects, other pages and stubs are left out."""
    found = []
    for page in _PAGE.findall(bz2.decompress(dump.read_bytes()).decode("utf-8")):
        title, text = _TITLE.search(page), _TEXT.search(page)
        if "<ns>0</ns>" not in page or "<redirect" in page or title is None or text is None:
            continue
        prose = clean(html.unescape(text[1]))
        if len(prose) >= MIN_CHARACTERS:
            found.append(f"{html.unescape(title[1])}\n{prose}")
    return found


def clean(markup: str) -> str:
    """Prose of one article, one paragraph per line, no blank lines."""
    text = _COMMENT.sub("", markup)
    text = _DROPPED_TAG.sub("", _EMPTY_REF.sub("", text))
    text = html.unescape(text).replace("\xa0", " ")
    text = _until_stable(_TEMPLATE, _expand_template, _BRACES.sub("", text))
    text = _until_stable(_TABLE, lambda match: "", text)
    text = _EXTERNAL_LINK.sub(lambda match: match[1].strip(), text)
    text = _until_stable(_LINK, _expand_link, text)
    text = _drop_closing_sections(text)
    text = _TAG.sub("", _BREAK.sub(" ", _QUOTES.sub("", text)))
    text = _MAGIC_WORD.sub("", _BARE_URL.sub("", text))
    paragraphs = (_tidy(line) for line in text.split("\n") if _is_prose(line))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _until_stable(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace innermost matches until none is left, which undoes any depth of nesting."""
    count = 1
    while count:
        text, count = pattern.subn(replace, text)
    return text


def _expand_template(match: re.Match[str]) -> str:
    name, *arguments = (part.strip() for part in match[1].split("|"))
    name = name.lower()
    unnamed = [argument for argument in arguments if not re.match(r"[\w -]+=", argument)]
    if name in ("convert", "cvt") and len(unnamed) >= 2:
        return " ".join(unnamed[:2])
    if name in ("ndash", "spaced ndash", "snd", "snds"):
        return " – "
    if name in ("mdash", "mdashb"):
        return "—"
    if name in ("nbsp", "space"):
        return " "
    if name == "as of" and unnamed:
        return f"As of {unnamed[0]}"
    if name.startswith("formatnum:"):
        return name.removeprefix("formatnum:")
    if unnamed and (name in _TEXT_TEMPLATES or name.startswith("lang-")):
        return re.sub(r"^(?:text|1)\s*=", "", unnamed[-1])
    return ""


def _expand_link(match: re.Match[str]) -> str:
    target, *rest = match[1].split("|")
    if _NOT_PROSE_LINK.match(target.strip()):
        return ""
    label = rest[-1] if rest else target
    return (label or re.sub(r"\s*\(.*\)$", "", target)).strip().lstrip(":")


def _drop_closing_sections(text: str) -> str:
    """Leave out headings, and the sections that only list references, links or works."""
    kept, dropping, position = [], 0, 0  # dropping: level of the section being left out, 0 for none
    for heading in [*_HEADING.finditer(text), None]:
        if not dropping:
            kept.append(text[position : heading.start() if heading else len(text)])
        if heading:
            level, position = len(heading[1]), heading.end()
            if not dropping or level <= dropping:
                dropping = level if heading[2].lower() in _CLOSING_SECTIONS else 0
    return "".join(kept)


def _is_prose(line: str) -> bool:
    """A paragraph; or an entry of a list, if it is a sentence. Not a line whose markup was unbalanced."""
    line = line.strip()
    if line.startswith(("|", "!", "{", "}")) or _RESIDUE.search(line):
        return False
    if len(line) < 40 and not line.endswith((".", "!", "?")):
        return False
    if line.startswith(("*", "#", ":", ";")):
        return len(line) >= 80 and line.endswith((".", "!", "?", '"', "”"))
    return True


def _tidy(line: str) -> str:
    line = re.sub(r"\s+", " ", line.strip().lstrip("*#:; "))
    line = re.sub(r"\(\s+|\(\s*(?:[,;:]\s*)+", "(", line)  # "(; born 1950)": a pronunciation template stood first
    line = re.sub(r"\s*\(\s*[,;:/–\s]*\)|\[\s*\]", "", line)
    line = re.sub(r"\s+([,.;:!?)])(?=\s|$)", r"\1", line)
    return re.sub(r"([,;])(?:\s*[,;])+", r"\1", line).strip()
