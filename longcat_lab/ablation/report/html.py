"""Parts as HTML, whole pages as one file each that asks nothing of the network, and what a written page shows, read back from it."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from longcat_lab.ablation.report.parts import NONE, Cell, Lines, Part

HERE = Path(__file__).parent
FACTS = "lab-facts"  # id of the element that holds the page's numbers as JSON
# A browser then fetches nothing for this page, whatever an output of a notebook asks for.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; font-src data:"
QUIET = {"script", "style", "title", "metadata"}  # elements whose text nobody reads on the page; a picture's metadata is one
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def of_part(name: str, part: Part, classes: tuple[str, ...] = ()) -> str:
    """One part; `classes` are those of its lines, where they differ. An empty part is empty."""
    esc, start = html.escape, f'data-part="{html.escape(name)}"'
    if not isinstance(part, Lines):
        if not part.rows:
            return ""
        mark = {i: ' class="lab-text"' for i in range(1, len(part.columns)) if _is_text([row[i] for row in part.rows])}
        mark |= {i: ' class="lab-chosen"' for i, column in enumerate(part.columns) if column in part.marked}
        head = "".join(f'<th scope="col"{mark.get(i, "")}>{esc(column)}</th>' for i, column in enumerate(part.columns))
        body = "".join(
            "<tr>" + "".join(f"<td{mark.get(i, '')}>{_cell(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in part.rows
        )
        return f'<div class="lab-wide"><table class="lab" {start}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if not part.lines:
        return ""
    if part.kind == "pre":
        return f"<details><summary>{esc(part.title)}</summary><pre {start}>{esc(part.lines[0])}</pre></details>"
    if part.kind == "h1":
        return f"<h1 {start}>{esc(part.lines[0])}</h1>"
    tag = "li" if part.kind == "ul" else "p"
    lines = []
    for i, line in enumerate(part.lines):
        first, rest, more = line.partition("\n")  # a line of two has its first as a title
        text = f"<b>{esc(first)}</b><br>{esc(more)}" if rest else esc(line)
        lines.append(f'<{tag} class="{classes[i]}">{text}</{tag}>' if i < len(classes) else f"<{tag}>{text}</{tag}>")
    return f"<{'ul' if tag == 'li' else 'div'} {start}>{''.join(lines)}</{'ul' if tag == 'li' else 'div'}>"


def _is_text(column: list[Cell]) -> bool:
    """Words, which stand on the left; numbers, and a column in which all are missing, stand on the right."""
    return all(cell.value is None for cell in column) and any(cell.text != NONE for cell in column)


def _cell(cell: Cell) -> str:
    if cell.links:
        return " · ".join(f'<a href="{html.escape(address)}">{html.escape(words)}</a>' for words, address in cell.links)
    return html.escape(cell.text)


def of_facts(facts: dict[str, Any]) -> str:
    """The element that holds the page's numbers."""
    text = json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{FACTS}">{text}</script>'


def page(title: str, body: str, *, script: bool = False, style: str = "", meta: dict[str, str] | None = None) -> str:
    """A whole file around `body`: the house's style, light or dark as the reader has it, and where asked for the script of the figures."""
    before, after = shell(title, script=script, style=style, meta=meta)
    return before + body + after


def shell(title: str, *, script: bool = False, style: str = "", meta: dict[str, str] | None = None) -> tuple[str, str]:
    """What stands before and after the body of such a file."""
    noted = "".join(f'<meta name="{html.escape(name)}" content="{html.escape(value)}">' for name, value in (meta or {}).items())
    look = (HERE / "page.css").read_text(encoding="utf-8") + style
    run = f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>" if script else ""
    before = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">{noted}\n'
        f"<title>{html.escape(title)}</title>\n<style>{look}</style></head>\n<body><main>\n"
    )
    return before, f"\n</main>{run}</body></html>\n"


# ---- reading a page


@dataclass
class Shown:
    """What a page shows.

    Attributes:
        texts: part -> its whole text, without white space; a part that is there twice has both.
        tables: part -> rows of cells' texts, the head's row first.
        rest: text outside the parts and outside what a notebook's author wrote, that of pictures and folded titles included.
        authored: what a notebook's author wrote, without white space.
        links: addresses.
        facts: the text of the JSON element.
        meta: name -> content.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    authored: str = ""
    links: list[str] = field(default_factory=list)
    facts: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    all_text: str = ""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.shown, self.text, self.open = Shown(), [], []
        self.part: str | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attributes}
        if tag == "meta" and "name" in given:
            self.shown.meta[given["name"]] = given.get("content", "")
        if tag == "a" and "href" in given:
            self.shown.links.append(given["href"])
        if tag in VOID:
            return
        kind = "facts" if given.get("id") == FACTS else "quiet" if tag in QUIET else ""
        if "data-part" in given:
            kind, self.part = "part", given["data-part"]
            self.shown.texts.setdefault(self.part, []).append("")
            if tag == "table":
                self.shown.tables[self.part] = []
        elif "text_cell_render" in given.get("class", "").split():
            kind = "authored"
        if self.part in self.shown.tables:
            if tag == "tr":
                self.shown.tables[self.part].append([])
            elif tag in ("td", "th") and self.shown.tables[self.part]:
                self.shown.tables[self.part][-1].append("")
        self.open.append((tag, kind))

    def handle_endtag(self, tag: str) -> None:
        if not any(tag == each for each, _ in self.open):  # a void element, or one that nobody opened
            return
        while self.open:
            closed, kind = self.open.pop()
            if kind == "part":
                self.part = None
            if closed == tag:
                return

    def handle_data(self, data: str) -> None:
        kinds = {kind for _, kind in self.open}
        if "facts" in kinds:
            self.shown.facts += data
        if "quiet" in kinds or "facts" in kinds:
            return
        self.text.append(data)
        if self.part is not None:
            self.shown.texts[self.part][-1] += squeezed(data)
            rows = self.shown.tables.get(self.part)
            if rows and rows[-1]:
                rows[-1][-1] += data
        elif "authored" in kinds:
            self.shown.authored += squeezed(data)
        elif data.strip():
            self.shown.rest.append(data.strip())


class _Tokens(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = " ".join(f"{key}={squeezed(value or '')!r}" for key, value in sorted(attributes, key=lambda each: each[0]))
        self.found.append(f"<{tag} {given}>")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.found.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.found.append(squeezed(data))


def tokens(text: str) -> str:
    """HTML without what its writer is free in: white space, the order of attributes, how characters and empty elements are written."""
    reader = _Tokens()
    reader.feed(text)
    reader.close()
    return "".join(reader.found)


def squeezed(text: str) -> str:
    """The text without white space, which HTML does not keep."""
    return "".join(text.split())


def shown(text: str) -> Shown:
    """What a page of this text shows."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    reader.shown.all_text = squeezed("".join(reader.text))
    return reader.shown
