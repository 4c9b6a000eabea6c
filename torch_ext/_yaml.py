"""The part of YAML 1.1 in which configs are written: nested mappings and lists, by indentation or
in brackets, of plain and quoted words. No anchors, tags, multi-line texts or several documents.
As in YAML 1.2, ``1e-3`` is a number."""

import json
import re
from typing import Any

_NUMBER = re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.\d+([eE][-+]?\d+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False, "yes": True, "no": False}
_WORDS |= {"on": True, "off": False, ".inf": float("inf"), "-.inf": -float("inf")}
_WORDS |= {".nan": float("nan")}
_KEY = re.compile(
    r"""(?P<key>"[^"]*"|'[^']*'|[^\s"'\[\]{},#&*!|>%@`-][^#]*?|-[^\s#][^#]*?)\s*:(\s|$)"""
)


def read_yaml(text: str) -> Any:
    """What ``text`` says. ValueError, with the line, where it says more than is read here."""
    try:
        return json.loads(text)  # which YAML includes
    except ValueError:
        pass
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = _without_comment(line).rstrip()
        if stripped and not (stripped in ("---", "...") or stripped.startswith("%YAML")):
            if "\t" in stripped[: len(stripped) - len(stripped.lstrip())]:
                raise ValueError(f"line {number} is indented by a tab")
            if lines and _open_brackets(lines[-1][2]):
                lines[-1] = (*lines[-1][:2], f"{lines[-1][2]} {stripped.lstrip()}")
            else:
                lines.append((number, len(stripped) - len(stripped.lstrip()), stripped.lstrip()))
    if not lines:
        return None
    value, end = _block(lines, 0, lines[0][1])
    if end < len(lines):
        raise ValueError(f"line {lines[end][0]} is indented by less than those before")
    return value


def write_yaml(config: dict[str, Any]) -> str:
    """A line for each entry, as every version of YAML reads it."""
    lines = []
    for key, value in config.items():
        text = json.dumps(value)
        if isinstance(value, float) and "e" in text and "." not in text:
            text = text.replace("e", ".0e")  # without a dot it is a word in YAML 1.1
        lines.append(f"{key}: {text}\n")
    return "".join(lines)


def _without_comment(line: str) -> str:
    quote = ""
    for at, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and (at == 0 or line[at - 1] in " [{,:"):
            quote = character
        elif character == "#" and (at == 0 or line[at - 1].isspace()):
            return line[:at]
    return line


def _open_brackets(line: str) -> bool:
    bare = re.sub(r"""(?<=[\s\[{,:])("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')""", "", line)
    bare = re.sub(r"^(- +)*([^\[{][^:]*: +)?", "", bare)  # a plain word may have any in it
    return bare[:1] in ("[", "{") and sum(map(bare.count, "[{")) > sum(map(bare.count, "]}"))


def _block(lines: list[tuple[int, int, str]], at: int, indent: int) -> tuple[Any, int]:
    """The value that begins in ``lines[at]``, and the line after it."""
    number, _, text = lines[at]
    if text == "-" or text.startswith("- "):
        return _sequence(lines, at, indent)
    if _KEY.match(text):
        return _mapping(lines, at, indent)
    if at + 1 < len(lines) and lines[at + 1][1] >= indent:
        raise ValueError(f"line {number} is a text of several lines")
    return _scalar(text, number), at + 1


def _sequence(lines: list[tuple[int, int, str]], at: int, indent: int) -> tuple[list[Any], int]:
    values = []
    while at < len(lines) and lines[at][1] == indent and lines[at][2][:2] in ("-", "- "):
        number, _, text = lines[at]
        rest = text[1:].lstrip()
        if rest:
            inner = indent + len(text) - len(rest)
            lines[at] = (number, inner, rest)
            value, at = _block(lines, at, inner)
        else:
            value, at = _below(lines, at + 1, indent)
        values.append(value)
    return values, at


def _mapping(lines: list[tuple[int, int, str]], at: int, indent: int) -> tuple[dict, int]:
    values: dict[Any, Any] = {}
    while at < len(lines) and lines[at][1] == indent:
        number, _, text = lines[at]
        match = _KEY.match(text)
        if match is None:
            break
        key, rest = _scalar(match["key"], number), text[match.end() :].strip()
        if rest:
            values[key], at = _scalar(rest, number), at + 1
        else:
            # A list may stand as far to the left as its key.
            listed = at + 1 < len(lines) and lines[at + 1][2][:2] in ("-", "- ")
            values[key], at = _below(lines, at + 1, indent - 1 if listed else indent)
    if at < len(lines) and lines[at][1] > indent:
        raise ValueError(f"line {lines[at][0]} is indented by more than those before")
    return values, at


def _below(lines: list[tuple[int, int, str]], at: int, indent: int) -> tuple[Any, int]:
    """What is indented by more than ``indent``; None if nothing is."""
    if at < len(lines) and lines[at][1] > indent:
        return _block(lines, at, lines[at][1])
    return None, at


def _scalar(text: str, number: int) -> Any:
    if text[:1] in ("[", "{"):
        value, rest = _flow(text, number)
        if rest:
            raise ValueError(f"line {number} has {rest!r} after its brackets")
        return value
    if text[:1] in ("&", "*", "!", "|", ">", "%", "@", "`"):
        raise ValueError(f"line {number} has {text!r}, of a kind that is not read here")
    if text[:1] in ('"', "'"):
        if len(text) < 2 or text[-1] != text[0]:
            raise ValueError(f"line {number} has {text!r} with one quote")
        if text[0] == '"':
            return json.loads(text)
        return text[1:-1].replace("''", "'")
    lower = text.lower()
    if lower in _WORDS:
        return _WORDS[lower]
    if _NUMBER.fullmatch(text):
        plain = text.replace("_", "")
        return int(plain) if re.fullmatch(r"[-+]?\d+", plain) else float(plain)
    return text


def _flow(text: str, number: int) -> tuple[Any, str]:
    """A list or mapping in brackets, and what follows it."""
    opened, text = text[0], text[1:].lstrip()
    values: list[Any] = []
    pairs: dict[Any, Any] = {}
    while not text.startswith("]" if opened == "[" else "}"):
        word, text = _flow_word(text, number)
        if opened == "{":
            if not text.startswith(":"):
                raise ValueError(f"line {number} has no colon after {word!r}")
            pairs[word], text = _flow_word(text[1:].lstrip(), number)
        else:
            values.append(word)
        if text.startswith(","):
            text = text[1:].lstrip()
        elif not text.startswith(("]", "}")):
            raise ValueError(f"line {number} has brackets that are not closed in it")
    return (values if opened == "[" else pairs), text[1:].lstrip()


def _flow_word(text: str, number: int) -> tuple[Any, str]:
    if text[:1] in ("[", "{"):
        return _flow(text, number)
    match = re.match(
        r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^\[\]{},:]*(?::[^\s\[\]{},]+)*)""", text
    )
    return _scalar(match[1].strip(), number), text[match.end() :].lstrip()
