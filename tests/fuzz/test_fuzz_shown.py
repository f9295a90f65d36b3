"""Secrets are hidden in any context and encoding, and no text moves the cursor."""

import base64
import html
import io
import json
import re
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from rich.panel import Panel
from rich.text import Text

from rlhf_pl.rewards.json_schema import make_schema_validator
from rlhf_pl.utils import secrets
from rlhf_pl.utils.console import SafeConsole
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redact, register_secret
from rlhf_pl.utils.terminal import escape

FUZZ = settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(exclude_categories=[]), max_size=30)  # half surrogates and controls too
SECRETS = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x17F, exclude_characters="\x7f"), min_size=8, max_size=40
)
ENCODINGS = [
    str,
    json.dumps,
    repr,
    html.escape,
    quote,
    quote_plus,
    lambda s: quote(s, safe=""),
    lambda s: json.dumps(s, ensure_ascii=False).replace("/", "\\/"),
    lambda s: str(s.encode()),
    lambda s: base64.b64encode(s.encode()).decode(),
    lambda s: base64.urlsafe_b64encode(b"me:" + s.encode()).decode(),
    lambda s: s.encode().hex(),
]


@FUZZ
@given(SECRETS, TEXT, TEXT, st.sampled_from(ENCODINGS))
@example("p\"a\\s/s'w <ö&d>", "\\", "\\", json.dumps)
def test_secrets_are_not_shown(secret: str, before: str, after: str, encode: object) -> None:
    secret = secret.strip()
    assume(len(secret) >= 8 and not secret.isalpha() and not secret.isdigit() and len(set(secret)) > 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "_known", set())
        register_secret(secret)
        encoded = encode(secret)  # type: ignore[operator]
        shown = redact(f"{before}[{encoded}]{after}")
        assert encoded[1:-1] not in shown
        assert secret not in shown
        assert redact(shown) == shown


@FUZZ
@given(TEXT)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assume("@" not in text and "=" not in text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "_known", set())
        register_secret("sk-live_0123456789abcdefXYZ")
        assert redact(text) == text


@FUZZ
@given(st.lists(TEXT | st.sampled_from(["[/b]", "[red]", "\x1b[2J", "\x1b]0;x\x07", "\x9b", "\u202e", "\n", "["])))
def test_no_text_moves_the_cursor_or_is_markup(parts: list[str]) -> None:
    text = "".join(parts)
    console = SafeConsole()
    console.file, console.width = io.StringIO(), 40
    console.print(text)
    console.print(Panel(Text(text), title=Text(text)))
    for shown in (escape(text), console.file.getvalue()):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
        shown.encode()


SCHEMAS = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT | st.sampled_from(["http://127.0.0.1:9/x", "file:///etc/passwd"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["$ref", "$id", "$schema", "$defs", "$dynamicRef", "$anchor", "properties", "items", "type", "not"]
            )
            | TEXT,
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@FUZZ
@given(SCHEMAS)
def test_any_schema_is_accepted_or_refused(schema: object) -> None:
    try:
        validator = make_schema_validator(schema)
    except InputError:
        return
    assert validator.is_valid({"a": [1]}) in (True, False)
