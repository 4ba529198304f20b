"""A self-contained web page of titles, sentences, tables and pictures."""

import base64
import io
from dataclasses import dataclass, field
from html import escape

from matplotlib.figure import Figure
from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; color: #222; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
nav ul { columns: 16rem; padding-left: 1.2rem; } a { color: #0059a0; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 20rem; max-width: 36rem; }
figure img { width: 100%; height: auto; } figcaption { font-size: .85rem; color: #555; }
.scroll { overflow-x: auto; max-width: 100%; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } thead th { vertical-align: bottom; border-bottom: 2px solid #888; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; }
.cards figure { border: 1px solid #ddd; padding: .5rem; } .cards img { width: 6rem; image-rendering: pixelated; }
@media print { body { font-size: 10pt; max-width: none; } nav { display: none; }
 figure, tr, .cards figure { break-inside: avoid; } h2, section > p { break-after: avoid; }
 figure { flex-basis: 45%; } }
"""


@dataclass
class Section:
    """A part of the page: what it shows, in one or two sentences, then its tables, pictures and cards."""

    title: str
    text: str
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)  # head, rows
    pictures: list[tuple[Figure, str]] = field(default_factory=list)  # and caption
    cards: list[tuple[Image.Image, str]] = field(default_factory=list)  # and lines of text

    def html(self, anchor: str) -> str:
        """Return its HTML, which the list of contents refers to by `anchor`."""
        parts = [f'<section><h2 id="{anchor}">{escape(self.title)}</h2><p>{escape(self.text)}</p>']
        shown = [table(*content) for content in self.tables] + [picture(*content) for content in self.pictures]
        for name, blocks in (("row", shown), ("cards", [picture(*content) for content in self.cards])):
            if blocks:
                parts.append(f'<div class="{name}">{"".join(blocks)}</div>')
        return "\n".join([*parts, "</section>"])


def picture(content: Figure | Image.Image, caption: str) -> str:
    """Return the HTML of a picture and its caption, which also describes it to those who cannot see it."""
    file, lines = io.BytesIO(), escape(caption).replace("\n", "<br>")
    if isinstance(content, Figure):
        content.savefig(file, format="png", dpi=160, bbox_inches="tight")
    else:
        content.save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return f'<figure><img src="{uri}" alt="{escape(caption)}"><figcaption>{lines}</figcaption></figure>'


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return the HTML of a table, which scrolls sideways where it is too wide."""
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'


def page(title: str, text: str, sections: list[Section]) -> str:
    """Return the HTML of the whole page."""
    named = [(f"s{number}", part) for number, part in enumerate(sections)]
    contents = "".join(f'<li><a href="#{anchor}">{escape(part.title)}</a></li>' for anchor, part in named)
    body = "\n".join(part.html(anchor) for anchor, part in named)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1><p>{escape(text)}</p><nav><ul>{contents}</ul></nav>
{body}
</body></html>
"""
