"""Collects secrets and removes them from all texts that a run shows or stores.

Secrets are recognized by their place: options and environment variables named for keys, tokens or passwords,
environment variables that options name, and URLs between `://` and `@`.
"""

import argparse
import base64
import html
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from rlhf_pl.utils.secret_names import is_secret

HIDDEN = "<secret>"
MIN_LENGTH = 6  # of secrets that are hidden everywhere; shorter ones are hidden in URLs and under their names
_MIN_WORD = 8  # the same for secrets of letters only, or of digits only
_LONG = 16  # longer than words and numbers in ordinary texts
_MAX_FILE_BYTES = 2**20  # of a config file
_PLACEHOLDERS = {"password", "passwords", "changeme", "undefined", "disabled", "anonymous", "placeholder"}

_known: set[str] = set()
_environment: dict[object, object] = {}  # at the last check

_SCHEMES = re.compile(r"(?i:bearer|basic|token)\s+")  # of authorization
_SCHEME = r":\\?/\\?/"
_HOST = r"(?=(?:[\w.-]+|\[[\da-fA-F:.]+\])(?::\d+)?(?![\w:@-]))"
_PLAIN, _WITH_SLASH = r"[^\s/?#\"'<>]*", r"[^\s/?#\"'<>:@\[]+:(?!\d{1,5}(?:[/?#\s\"']|$))[^\s\"'<>]{0,300}"
_USERINFO = re.compile(rf"({_SCHEME})(?:{_PLAIN}@{_HOST}|{_WITH_SLASH}@{_HOST}|{_PLAIN}@)")
_QUERY = re.compile(r"([?&;]([\w.-]+)=)([^&;\s\"'<>#]*[^&;\s\"'<>#)\]}.,])")
_HEADER = re.compile(r"(authorization\W{1,8}(?:bearer|basic|token)\s+)[^\s\"'<>,;&\\]{4,}", re.IGNORECASE)
# `name: value` of YAML and JSON, `name=value` of flags; the next match may start after the name
_NAMED = re.compile(
    r"([A-Za-z][\w.-]*)[\"']?\s*[:=]\s*(?=(?:\"((?:[^\"\\]|\\.){0,4096})\"|'([^']{0,4096})'|([^\n]{0,4096})))"
)


def register_secret(secret: object) -> None:
    """Hide a secret from now on. Placeholders and short texts are not hidden."""
    text = str(secret).strip()
    if scheme := _SCHEMES.match(text):
        register_secret(text[scheme.end() :])
    minimum = _MIN_WORD if text.isalpha() or text.isdigit() else MIN_LENGTH
    if len(text) >= minimum and text.lower() not in _PLACEHOLDERS and HIDDEN not in text:
        _known.add(text)


def register_url(url: str) -> None:
    """Hide the user and password in a URL, with or without a scheme."""
    if "@" not in url:
        return
    info = url.partition("://")[2] or url
    found = _USERINFO.search(f"://{info}")
    user, _, password = (found[0][3:-1] if found else info.rpartition("@")[0]).partition(":")
    for part in (str, unquote):
        if password:
            register_secret(part(password))
            register_secret(base64.b64encode(f"{part(user)}:{part(password)}".encode()).decode())
        if len(user) >= _LONG or not password:
            register_secret(part(user))


def environment_key(name: str | None) -> str:
    """The key in the environment variable `name`, which is hidden from now on; empty if there is none."""
    key = os.environ.get(name or "", "").strip()
    register_secret(key)
    return key


def check_environment_key(option: str, name: str | None) -> None:
    """Raise InputError if an option names an environment variable that holds no key which can be sent."""
    from rlhf_pl.utils.errors import InputError

    if name is None:
        return
    if is_secret(option, name):
        raise InputError(f"`{option}` holds a key, it seems. Put that into an environment variable, and name it here.")
    key = environment_key(name)
    if not key:
        raise InputError(
            f"`{option}`: the environment variable {name} is not set. Set it to your key; null sends none."
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"`{option}`: the key in {name} has characters that no HTTP header may have.")


def register_text(text: str) -> None:
    """Hide the secrets in the text of a config or a command-line argument."""
    register_urls(text)
    for found in _NAMED.finditer(text):
        quoted = found[2] or found[3]
        value = quoted if quoted is not None else (found[4] or "").strip()
        if is_secret(found[1], value):
            if quoted is None:  # the rest of the line may not belong to the value
                value = re.split(r"[,}\]&\s]", _SCHEMES.sub("", value, count=1))[0]
            register_secret(value)


def register_urls(text: str) -> None:
    """Hide the secrets in a text's URLs."""
    for found in _USERINFO.finditer(text):
        register_url(found[0])
    for found in _QUERY.finditer(text):
        if is_secret(found[2], found[3], any_key=True):
            register_secret(found[3])
            register_secret(unquote(found[3]))


def register_options(options: Any) -> None:
    """Hide the secrets among parsed options, recognized by name."""

    def visit(name: str, value: str) -> None:
        register_urls(value)
        if is_secret(name, value):
            register_secret(value)

    _visit_values(options, "", visit)


def register_arguments(arguments: Sequence[str]) -> None:
    """Hide the secrets of a command line and of its config files, before any message can contain them."""
    register_environment()
    for argument, following in pairwise([*arguments, ""]):
        register_text(argument)
        if argument.startswith("-") and "=" not in argument and is_secret(argument, following):
            register_secret(following)
        named = following if argument in ("--config", "-c") else argument.rpartition("=")[2]
        is_config = argument.startswith(("--config", "-c")) or Path(named).suffix in (".yaml", ".yml")
        if is_config and os.path.isfile(named) and os.path.getsize(named) < _MAX_FILE_BYTES:
            register_text(Path(named).read_text(encoding="utf-8", errors="replace"))


def register_environment() -> None:
    """Hide the secrets of the environment. Fast if it has not changed."""
    current = dict(getattr(os.environ, "_data", os.environ))  # undecoded: 100 times faster
    if _environment == current:
        return
    _environment.clear()
    _environment.update(current)
    for name, value in os.environ.items():
        if "://" in value:
            register_text(value)
        if is_secret(name, value, any_key=True):
            register_secret(value)


def redact(text: object) -> str:
    """A text without secrets, in any encoding."""
    register_environment()
    return redact_known(str(text))


def redact_known(text: str) -> str:
    """`redact` without a check of the environment, for texts that are printed many times per second."""
    if "@" in text:
        text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    if "=" in text:
        text = _QUERY.sub(lambda found: found[1] + HIDDEN if is_secret(found[2], found[3], True) else found[0], text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    for part, pattern in _secret_patterns(tuple(sorted(_known))):
        if part in text:
            text = pattern.sub(HIDDEN, text)
    return text


def redacted(value: Any, name: str = "") -> Any:
    """A copy of options, settings or JSON without secrets: neither under names of secrets, nor in texts."""
    if isinstance(value, argparse.Namespace):
        copy = type(value)()
        for key, inner in vars(value).items():
            setattr(copy, key, redacted(inner, key))
        return copy
    if isinstance(value, dict):
        return {redact(key) if isinstance(key, str) else key: redacted(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [redacted(inner, name) for inner in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, str) and is_secret(name, value):
        return HIDDEN
    if isinstance(value, int) and value >= 1000 and is_secret(name, str(value)):  # not a count
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def hidden_options(options: Any) -> list[str]:
    """Names of the options whose secrets were replaced when the config was stored."""
    found: list[str] = []
    _visit_values(options, "", lambda option, value: found.append(option) if HIDDEN in value else None)
    return found


def _visit_values(value: Any, name: str, visit: Callable[[str, str], object]) -> None:
    """Call `visit` with the full name and the value of every text and number in nested options."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            _visit_values(inner, f"{name}.{key}" if name else str(key), visit)
    elif isinstance(value, list | tuple):
        for inner in value:
            _visit_values(inner, name, visit)
    elif isinstance(value, str | int) and not isinstance(value, bool):
        visit(name, str(value))


@lru_cache(maxsize=2)
def _secret_patterns(secrets: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    """For each form of each secret, a substring that all encodings contain, and a pattern of the whole."""
    found: dict[str, re.Pattern[str]] = {}
    for secret in sorted(secrets, key=len, reverse=True):
        is_word = (secret.isalpha() or secret.isdigit()) and len(secret) < _LONG
        for form in (secret, secret.lower(), secret.upper()):
            spelled = "".join(map(_spelling_pattern, form))
            whole = rf"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])){spelled}(?![A-Za-z0-9])" if is_word else spelled
            found[form] = re.compile(whole)
        found |= {
            form: re.compile("".join(map(_spelling_pattern, form)))
            for form in _encode_secret(secret.encode("utf-8", "replace"))
        }
    return [(max(re.findall("[A-Za-z0-9]*", form), key=len), pattern) for form, pattern in found.items()]


_ESCAPES = r"\\{0,8}"  # of JSON in JSON, `repr` of `repr`


def _spelling_pattern(character: str) -> str:
    """Pattern of a character as it is, and as URLs, JSON, HTML and Python's `repr` write it."""
    if character.isascii() and character.isalnum():
        return character
    number = ord(character)
    escaped = repr(character)[1:-1].lstrip("\\")
    spellings = {
        rf"{_ESCAPES}{re.escape(character)}",
        rf"\\{_ESCAPES}{re.escape(escaped)}",
        f"(?i:{re.escape(quote(character.encode('utf-8', 'replace'), safe=''))}|%{number:02x})",
        rf"(?i:\\{_ESCAPES}u{number:04x}|&#x0*{number:x};|&#0*{number};)",
        rf"{_ESCAPES}{re.escape(html.escape(character))}",
        re.escape(repr(character.encode("utf-8", "replace"))[2:-1]),
        *([r"\+"] if character == " " else []),
    }
    return f"(?:{'|'.join(sorted(spellings))})"


def _encode_secret(secret: bytes) -> list[str]:
    """A secret in hexadecimal, and in base64 at any offset of the encoded text."""
    found = [secret.hex(), secret.hex().upper()]
    for before in range(3):
        text = base64.b64encode(b"\0" * before + secret).decode().rstrip("=")
        whole = text[(0, 2, 3)[before] : None if (before + len(secret)) % 3 == 0 else -1]
        found += [whole, whole.replace("+", "-").replace("/", "_")]
    return [form for form in found if len(form) >= _MIN_WORD]
