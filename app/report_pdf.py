"""A report as a PDF: the page's words and pictures, and the signed receipt as an attachment.

The same report always gives the same bytes: the date in the file is that of the request's last change, and fonts come
with the package (``fonts/``). What they have no glyph for, such as a label in Chinese, is written as ``\\u4e2d``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fpdf import FPDF, FontFace
from fpdf.enums import Align, TableBordersLayout, VAlign, WrapMode
from fpdf.fonts import TTFFont

from app.charts import WIDTH
from app.report_view import Rows, View, view

_FONTS = Path(__file__).parent / "fonts"
_INK, _SOFT, _RULE, _BAD = (31, 41, 51), (82, 96, 109), (217, 222, 228), (180, 35, 24)
_MARGIN = 18.0  # mm
_PICTURE = 150.0  # mm wide
_HIDDEN = re.compile("<(title|desc)>([^<]*)</(title|desc)>")


class _Document(FPDF):
    """A4 with a footer that names the request and numbers the pages."""

    def __init__(self, name: str) -> None:
        super().__init__(format="A4")
        self._name = name
        for style, file in (("", "DejaVuSans"), ("B", "DejaVuSans-Bold")):
            self.add_font("sans", style, _FONTS / f"{file}.ttf")
        # What both have a glyph for.
        self._known = frozenset[int].intersection(
            *(frozenset(font.cmap) for font in self.fonts.values() if isinstance(font, TTFFont))
        )
        self.add_font("mono", "", _FONTS / "DejaVuSansMono.ttf")
        self.set_margins(_MARGIN, _MARGIN)
        self.set_auto_page_break(True, margin=_MARGIN + 4)

    def drawable(self, text: str) -> str:
        """With nothing in it that has no glyph, and percent signs that stay with their numbers."""
        return "".join(
            c if ord(c) in self._known or c == "\n" else c.encode("ascii", "backslashreplace").decode("ascii")
            for c in text.replace(" %", "\N{NO-BREAK SPACE}%")
        )

    def footer(self) -> None:
        self.set_y(-_MARGIN)
        self.set_font("sans", "", 7.5)
        self.set_text_color(*_SOFT)
        self.cell(self.epw / 2, 6, self._name)
        self.cell(self.epw / 2, 6, f"{self.page_no()} / {{nb}}", align=Align.R)


def render(report: Mapping[str, Any]) -> bytes:
    """The PDF of a report of ``app.report``."""
    shown = view(report)
    as_of = datetime.fromisoformat(report["as_of"])
    pdf = _Document(f"Letheon · {report['request_id']}")
    pdf.set_title(f"{shown.title}: {report['request_id']}")
    pdf.set_creator("Letheon")
    pdf.set_lang("en")
    pdf.set_creation_date(as_of)
    pdf.embed_file(
        bytes=shown.receipt.encode(),
        basename=shown.file_name,
        desc="The signed receipt, for letheon receipt verify",
        mime_type="application/json",
        creation_date=as_of,
        modification_date=as_of,
    )
    pdf.add_page()
    _head(pdf, shown)
    for sentence in shown.summary:
        _paragraph(pdf, sentence)
    _heading(pdf, "What was asked")
    _facts(pdf, shown.asked)
    _heading(pdf, "What was done, and when")
    columns = ("When", "What", "Entry of the audit log")
    _table(pdf, [columns, *shown.history], (54, 48, 72), mono=2)
    _heading(pdf, "How well it works")
    _measured(pdf, shown)
    _heading(pdf, "What this means, and what it does not")
    for sentence in shown.meaning:
        _paragraph(pdf, f"•  {sentence}", indent=4)
    _heading(pdf, "Technical record")
    _facts(pdf, shown.technical)
    _heading(pdf, "Signature")
    _facts(pdf, shown.signature)
    for sentence in shown.verify:
        _paragraph(pdf, sentence)
    _paragraph(pdf, f"In this file the receipt is an attachment, {shown.file_name}.")
    _filed(pdf)
    return bytes(pdf.output())


def _head(pdf: _Document, shown: View) -> None:
    pdf.set_text_color(*_SOFT)
    pdf.set_font("sans", "", 8)
    pdf.cell(0, 5, "LETHEON", new_x="LMARGIN", new_y="NEXT")
    pdf.set_text_color(*_INK)
    pdf.set_font("sans", "B", 19)
    pdf.multi_cell(0, 9, shown.title, align=Align.L, new_x="LMARGIN", new_y="NEXT")
    _paragraph(pdf, shown.subtitle, colour=_SOFT)
    pdf.set_draw_color(*_INK)
    pdf.line(pdf.l_margin, pdf.get_y() + 1, pdf.l_margin + pdf.epw, pdf.get_y() + 1)
    _heading(pdf, "In short")


def _measured(pdf: _Document, shown: View) -> None:
    if not shown.figures:
        _paragraph(pdf, "Nothing was measured: the request never came to its checks.")
        return
    for picture in shown.pictures:
        _picture(pdf, picture)
    for note in shown.notes:
        _paragraph(pdf, note, colour=_BAD)
    rows = [
        (
            f"{row.words}\n{row.name}",
            f"{row.before}\n{row.before_interval}",
            f"{row.after}\n{row.after_interval}",
            row.rows,
            row.limit,
            row.kept,
        )
        for row in shown.figures
    ]
    pdf.ln(2)
    _table(pdf, [("Figure", "Before", "After", "Rows", "Limit", "Kept"), *rows], (54, 34, 34, 18, 22, 12))
    _paragraph(pdf, "Below a rate, and in brackets: its 95 % interval.", colour=_SOFT)
    _facts(pdf, shown.counts)


def _heading(pdf: _Document, text: str) -> None:
    if pdf.will_page_break(30):  # a heading at the foot of a page would stand alone
        pdf.add_page()
    pdf.ln(5)
    pdf.set_text_color(*_INK)
    pdf.set_font("sans", "B", 12)
    pdf.start_section(text)
    pdf.cell(0, 7, text, new_x="LMARGIN", new_y="NEXT")
    pdf.ln(1)


def _paragraph(pdf: _Document, text: str, *, indent: float = 0.0, colour: tuple[int, int, int] = _INK) -> None:
    pdf.set_text_color(*colour)
    pdf.set_font("sans", "", 9)
    pdf.set_x(pdf.l_margin + indent)
    pdf.multi_cell(0, 4.6, pdf.drawable(text.replace("`", "")), align=Align.L, new_x="LMARGIN", new_y="NEXT")
    pdf.ln(1)


def _facts(pdf: _Document, rows: Rows) -> None:
    if rows:
        _table(pdf, rows, (56, 118), heading=False)


def _table(
    pdf: _Document,
    rows: Sequence[Sequence[str]],
    widths: tuple[int, ...],
    *,
    heading: bool = True,
    mono: int | None = None,
) -> None:
    pdf.set_font("sans", "", 8)
    pdf.set_text_color(*_INK)
    pdf.set_draw_color(*_RULE)
    with pdf.table(
        col_widths=widths,
        borders_layout=TableBordersLayout.HORIZONTAL_LINES,
        first_row_as_headings=heading,
        headings_style=FontFace(emphasis="BOLD"),
        line_height=4.2,
        padding=(0.7, 1, 0.7, 0),
        text_align=Align.L,
        v_align=VAlign.T,
        wrapmode=WrapMode.WORD,
    ) as table:
        for number, cells in enumerate(rows):
            row = table.row()
            for column, cell in enumerate(cells):
                small = column == mono and not (heading and number == 0)
                style = FontFace(family="mono", size_pt=6.5) if small else None
                row.cell(pdf.drawable(cell.strip()), style=style)
    pdf.ln(1)


def _picture(pdf: _Document, svg: str) -> None:
    root = ElementTree.fromstring(svg)  # noqa: S314  # our own
    height = _PICTURE * float(root.get("height", "0")) / WIDTH
    if pdf.will_page_break(height + 4):
        pdf.add_page()
    words = _HIDDEN.findall(svg)
    drawn = _HIDDEN.sub("", svg).replace('font-family="sans-serif"', 'font-family="sans"')
    source = io.BytesIO(pdf.drawable(drawn).encode())
    pdf.image(source, w=_PICTURE, h=height, alt_text=pdf.drawable(" ".join(text for _, text, _ in words)))
    pdf.ln(4)


def _filed(pdf: _Document) -> None:
    if pdf.will_page_break(62):
        pdf.add_page()
    _heading(pdf, "Filed")
    pdf.set_draw_color(*_INK)
    for name in ("Case or reference", "Reviewed by", "Date", "Signature"):
        pdf.ln(6)
        pdf.set_text_color(*_SOFT)
        pdf.set_font("sans", "", 9)
        pdf.cell(34, 6, name)
        pdf.line(pdf.get_x(), pdf.get_y() + 6, pdf.l_margin + pdf.epw, pdf.get_y() + 6)
        pdf.ln(6)
