"""WikiText's rows, which are lines, put together by article."""

import itertools
import re
from collections.abc import Iterable, Iterator

from larimar_jax.data.corpus import Document

# Rows that are looked at to recognise it: an article is shorter than this many lines.
ENOUGH = 1000
# An article begins under a heading between single equals signs, and its sections under more.
_ARTICLE = re.compile(r"\s*= (?!=)(.*\S) =\s*")
_SECTION = re.compile(r"\s*= =.*= =\s*")


def recognise(lines: Iterable[str]) -> bool:
    """Whether one of these lines begins an article."""
    return any(title for title, _ in _titled(lines))


def articles(lines: Iterable[str]) -> Iterator[Document]:
    """An article a document, without its headings.

    Of an article that began before the first line, as in a slice of a split, the text stands in for
    the title.
    """
    title, body = "", []

    def document() -> Iterator[Document]:
        text = "\n".join(body)
        if text:
            yield Document(title or text, text)

    for found, line in _titled(lines):
        if found:
            yield from document()
            title, body = found, []
        elif line.strip() and not _SECTION.fullmatch(line):
            body.append(line.strip())
    yield from document()


def _titled(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(the title that a line gives, or "", and the line). A title stands between blank lines: one
    that does not is a formula or a table's row."""
    three = itertools.chain([""], lines, [""])
    before, line = next(three), next(three)
    for after in three:
        heading = _ARTICLE.fullmatch(line) if not before.strip() and not after.strip() else None
        yield heading[1] if heading else "", line
        before, line = line, after
