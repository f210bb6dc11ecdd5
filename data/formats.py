"""Records of a file, whatever its format: JSON lines, JSON, or a table in one of its dialects.

    read_records("my.csv")      ("line 2", {"question": "...", "answer": "..."}), ("line 3", ValueError("...")), ...

What a record means is up to files.py.  One that cannot be read is a ValueError in its place, and can be left out alone.
"""

import codecs
import csv
import json
import os
import re
from collections.abc import Iterator

from plumbing.files import no_duplicate_keys, refuse_lfs_pointer

LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}  # and the separator, where the first line does not show another one
READABLE = (*LINES, ".json", *TABLES)
READABLE_TEXT = f"{', '.join(READABLE[:-1])} or {READABLE[-1]}"
SEPARATORS = ",;\t|"
LONGEST_CELL = 131_072  # characters.  A longer cell of a table is a quote that was never closed

UNPACK = "unpack it first"
CONVERT = "convert it first, with pandas for example"
BINARY = {  # how files begin that hold data, but no text
    b"PAR1": ("a Parquet file", CONVERT),
    b"ARROW1": ("an Arrow file", CONVERT),
    b"\xff\xff\xff\xff": ("an Arrow stream", CONVERT),
    b"\x89HDF": ("an HDF5 file", CONVERT),
    b"SQLite": ("an SQLite file", CONVERT),
    b"\xd0\xcf\x11\xe0": ("an Excel file", "save it as CSV"),
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it, or save it as CSV"),
    b"\x1f\x8b": ("compressed by gzip", UNPACK),
    b"BZh": ("compressed by bzip2", UNPACK),
    b"\xfd7zXZ": ("compressed by xz", UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", UNPACK),
}


Records = Iterator[tuple[str, object]]  # one at a time: those of a large file, all together, are larger than it


def read_records(path: str, known: set[str] = frozenset(), ignored: set[str] | None = None) -> Records:
    """(place, record) of each record, in order.  A record is a dict, anything else that JSON can hold, or a ValueError.

    known       names of columns.  They help to tell a table's separator, and a row from an object that holds rows
    ignored     receives the names of what stands beside the rows of a JSON object

    Raises ValueError, with the file's name, for a file that is none of rows.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # its name tells no format; to read it could take for ever
        raise ValueError(f"{path} is a pipe or a device: save what it says in a file, such as my.jsonl, and name that")
    refuse_lfs_pointer(path)
    with open(path, "rb") as f:
        content = f.read()
    for start, (kind, advice) in BINARY.items():
        if content.startswith(start):
            raise ValueError(f"{path} is {kind}: {advice}. We read {READABLE_TEXT}")
    extension = os.path.splitext(path)[1].lower()
    if extension not in READABLE:
        raise ValueError(f"{path} has no name that tells its format. We read {READABLE_TEXT}")
    try:
        text = decode(content)
        del content
        if extension in TABLES:
            yield from read_table(text, TABLES[extension], known)
        else:
            yield from read_json_records(text, extension in LINES, known, set() if ignored is None else ignored)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None


def decode(content: bytes) -> str:
    """Text from UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    A byte that is no UTF-8 becomes a lone surrogate, for which a row is refused later.
    """
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
            raise  # without a mark, UTF-16 was a guess
        return content.decode("utf-8-sig", "surrogateescape")


def lines_of(text: str) -> Iterator[str]:
    """The lines of a text, with their ends.  io.StringIO would first take four bytes for each character."""
    return (line[0] for line in re.finditer(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+", text))


def undecoded(text: str) -> ValueError | None:
    """A ValueError for text with a byte that is no UTF-8; else None."""
    if text.isascii() or not re.search("[\udc80-\udcff]", text):
        return None
    return ValueError(f"it is not UTF-8: {ascii(text)[:60]}. Save it in that encoding")


# -- JSON --------------------------------------------------------------------------------------------------------------


def read_json_records(text: str, is_lines: bool, known: set[str], ignored: set[str]) -> Records:
    """Records of a list, of an object that holds a list of rows, or of lines."""
    if not text or text.isspace():
        return
    content = parse_json(text)
    if isinstance(content, ValueError):
        if not is_lines and isinstance(parse_json(first_line(text)), ValueError):
            raise content
        for i, line in enumerate(lines_of(text), 1):
            if line := line.strip():
                yield f"line {i}", undecoded(line) or parse_json(line)
        return
    if isinstance(content, dict):
        content = rows_within(content, known, ignored)
    if not isinstance(content, list):
        raise ValueError(f"it is {str(content)[:40]!r}, and should be a list of rows")
    yield from ((f"{'line' if is_lines else 'row'} {i}", record) for i, record in enumerate(content, 1))


def parse_json(text: str) -> object:
    """The value of a JSON text, or the ValueError that it raises."""
    try:
        return json.loads(text, object_pairs_hook=no_duplicate_keys)
    except (ValueError, RecursionError) as e:
        return ValueError(str(e))


def rows_within(content: dict, known: set[str], ignored: set[str]) -> list[dict]:
    """The rows of an object such as {"version": 1, "data": [row, ...]}, or the object itself, if it is a row."""
    if any(str(key).strip().casefold() in known for key in content):
        return [content]
    lists = [key for key, x in content.items() if isinstance(x, list) and x and all(isinstance(y, dict) for y in x)]
    if len(lists) > 1:
        raise ValueError(f"it holds several lists, {', '.join(lists)[:80]}: put each into a file of its own")
    if not lists:
        return [content]
    ignored.update(key for key in content if key != lists[0])
    return content[lists[0]]


# -- Tables ------------------------------------------------------------------------------------------------------------


def read_table(text: str, separator: str, known: set[str]) -> Records:
    """Records of a table whose first line names its columns, in the dialect that the table itself shows."""
    if declared := re.match(r"sep=(.)(\r\n|\n|\r)", text):  # as spreadsheets write it
        separator, text = declared[1], text[declared.end() :]
    else:
        separator = find_separator(text, separator, known)
    quoting = csv.QUOTE_NONE if separator == "\t" and not is_quoted(text) else csv.QUOTE_MINIMAL
    lines = parse_table(text, 1 if declared else 0, delimiter=separator, quoting=quoting)
    lines = ((place, cells) for place, cells in lines if isinstance(cells, ValueError) or "".join(cells).strip())
    for _, head in lines:
        names = name_columns(head)
        yield from ((place, as_record(names, cells)) for place, cells in lines)


def parse_table(text: str, lines_before: int, **dialect) -> Iterator[tuple[str, list[str] | ValueError]]:
    """(place, cells) of each line of a table, or of each group of lines that belong together."""
    head = next(csv.reader([first_line(text)], **dialect), [])
    spaces = any(cell.startswith(" ") for cell in head[1:])  # "a, b": spaces behind the separators, in all lines
    reader = csv.reader(lines_of(text), strict=True, skipinitialspace=spaces, **dialect)
    limit = csv.field_size_limit(len(text) + 1)  # as_record has its own, where a cell does not end at the limit
    try:
        while True:
            start = lines_before + reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as e:
                cells = ValueError(str(e))
            if cells is None:
                return
            end = lines_before + reader.line_num
            yield f"line {start}" if start == end else f"lines {start} to {end}", cells
    finally:
        csv.field_size_limit(limit)


def as_record(names: list[str], cells: list[str] | ValueError) -> dict | ValueError:
    """{name of a column: cell}.  A cell that a line lacks is None."""
    if isinstance(cells, ValueError):
        return cells
    if any(cells[len(names) :]):
        return ValueError(f"it has more columns than the first line: {cells[len(names) :]}"[:100])
    if len(max(cells, key=len)) > LONGEST_CELL:
        return ValueError(f"a field larger than {LONGEST_CELL:,} characters")
    return undecoded("".join(cells)) or dict(zip(names, cells + [None] * (len(names) - len(cells))))


def name_columns(cells: list[str] | ValueError) -> list[str]:
    """The names of a table's columns.  One without a name is called by its number."""
    if isinstance(cells, ValueError):
        raise ValueError(f"its first line cannot be read ({cells})")
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, 1)]
    while not cells[-1].strip():  # separators at the end of every line
        cells = cells[:-1]
    names = names[: len(cells)]
    folded = [name.casefold() for name in names]
    for name, other in zip(names, folded):
        if folded.count(other) > 1:
            raise ValueError(f"its first line names the column {name!r} twice")
    return names


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line for line in lines_of(text) if line.strip()), "")


def find_separator(text: str, default: str, known: set[str]) -> str:
    """The character that separates the columns: the one that yields the most known names, then the most columns."""

    def count(separator):
        cells = next(csv.reader([first_line(text)], delimiter=separator), [])
        return sum(cell.strip().casefold() in known for cell in cells), len(cells)

    return max(default + SEPARATORS, key=count)


def is_quoted(text: str) -> bool:
    r"""Whether the quotes of a table with tabs are those of a CSV writer, and not part of its text.

    Such a writer puts every cell that holds a quote into quotes, and doubles those within.  So a cell like `it "was 3`
    shows that quotes are text.  Where a table has cells of both kinds, the more frequent kind decides.
    """
    quoted = re.findall(r'(?:^|(?<=[\t\n\r]))"((?:[^"]|"")*)"(?=[\t\r\n]|$)', text)
    quoted = [cell for cell in quoted if not ("\t" in cell and "\n" in cell)]  # those are two bare quotes, lines apart
    bare = text.count('"') - sum(cell.count('"') + 2 for cell in quoted)
    return bare == 0 or sum('""' in cell for cell in quoted) > bare
