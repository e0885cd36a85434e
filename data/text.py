"""
Text files as people have them, read in one way by every tool: UTF-8, or UTF-16 and UTF-32 that begin with their mark, compressed or
not. Nothing is guessed: what is no such text is refused with its file, the place and the way out. Needs neither torch nor numpy.
"""
import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib

COMPRESSED = ".gz", ".zst", ".bz2", ".xz"
WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
JSON_TYPES = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "an array", tuple: "an object",
              type(None): "null"}

def read_lines(raw, path):
    """Lines [str] with their ends, without marks, of a file that `raw` has open for bytes; ValueError names `path` and the place."""
    f, errors = _decompressed(raw, path)
    try:
        encoding = next((name for mark, name in WIDE.items() if f.peek(4).startswith(mark)), None)
        yield from _wide_lines(f, path, encoding) if encoding else _utf8_lines(f, path)
    except (EOFError, *errors) as e:
        if isinstance(e, OSError) and e.errno:  # the disk's, not the format's
            raise
        raise ValueError(f"{path}: damaged or cut off ({' '.join(str(e).split())[:120]}); fetch or compress it again") from e

def read_text(path):
    """A whole file's text [str]. ValueError names path and place; OSError."""
    with open(path, "rb") as raw:
        return "".join(read_lines(raw, path))

def _decompressed(raw, path):
    """A buffered file of raw's content, unpacked as its first bytes say, and what it raises where that fails."""
    head = raw.peek(10)
    if head.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw)), (gzip.BadGzipFile, zlib.error)
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return io.BufferedReader(bz2.BZ2File(raw)), (OSError,)
    if head.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(lzma.LZMAFile(raw)), (lzma.LZMAError,)
    if head.startswith(b"\x28\xb5\x2f\xfd") or head[1:4] == b"\x2a\x4d\x18":  # a frame of text, or one to skip
        from backports import zstd  # not at the top: who has no .zst needs none
        options = {zstd.DecompressionParameter.window_log_max: 31}  # as zstd --long=31 makes them
        return io.BufferedReader(zstd.ZstdFile(raw, options=options)), (zstd.ZstdError,)
    if str(path).lower().endswith(COMPRESSED):
        raise ValueError(f"{path}: not compressed, as its name says: fetch it again, or rename it if it is unpacked already")
    return raw, ()

def _utf8_lines(f, path):
    place = 0
    for number, line in enumerate(f, 1):
        if b"\0" in line:
            i = line.index(b"\0")
            width, order = 32 if line[i:i + 3] == b"\0\0\0" else 16, "LE" if (place + i) % 2 else "BE"
            cause = "damaged, or no text" if line[i:i + 4] == b"\0\0\0\0" else (
                f"UTF-{width} without its mark? convert it (iconv -f UTF-{width}{order} -t UTF-8 FILE > NEW); if not, it is damaged")
            raise ValueError(f"{path}:{number}: byte {place + i} is NUL, which text has not: {cause}")
        try:
            text = line.decode()
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}:{number}: byte {place + e.start}, {line[e.start]:#04x}, is not UTF-8; if it is Windows' or Latin-1, "
                             "convert it (iconv -f CP1252 -t UTF-8 FILE > NEW)") from e
        yield text.lstrip("\ufeff")  # at any line: files with a mark may have been put together
        place += len(line)

def _wide_lines(f, path, encoding):
    text, number = io.TextIOWrapper(f, encoding, newline="\n"), 0
    try:
        for number, line in enumerate(text, 1):
            if "\0" in line:
                raise ValueError(f"{path}:{number}: a NUL, which text has not: damaged, or no text")
            yield line.lstrip("\ufeff")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not {encoding} after line {number}, although its mark says so ({e.reason}): damaged or cut off") from e
    finally:
        text.detach()  # otherwise it would close f, which its reader still asks where it is

def parse_row(line, where, *keys):
    """The object that a line of JSON is. ValueError names `where` and what is wrong; one of keys that is there twice is wrong, too."""
    try:
        pairs = json.loads(line.strip(), object_pairs_hook=tuple)
    except RecursionError as e:
        what = str(e).partition("decoding ")[2].partition(" from ")[0] or "JSON"
        raise ValueError(f"{where}: {what} nested too deep to read; flatten or delete the line") from e
    except ValueError as e:
        raise ValueError(f"{where}: not JSON ({str(e).replace('line 1 ', '')}); mend or delete the line") from e
    if type(pairs) is not tuple:
        raise ValueError(f"{where}: {JSON_TYPES[type(pairs)]}, not an object; one object a line (jq -c '.[]' takes an array apart)")
    row = dict(pairs)
    if len(row) < len(pairs):
        for key in keys:
            if sum(name == key for name, _ in pairs) > 1:
                raise ValueError(f"{where}: '{key}' is there twice; mend or delete the line")
    return row
