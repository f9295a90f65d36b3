"""Recognition of secrets, and redaction of all their spellings."""

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from rlhf_pl.rewards import Failure
from rlhf_pl.store.files import write_checked
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils import secrets
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import describe
from rlhf_pl.utils.secret_names import is_secret
from rlhf_pl.utils.secrets import (
    HIDDEN,
    redact,
    redacted,
    register_arguments,
    register_secret,
    register_text,
    register_url,
)

KEY = "sk-live_0123456789abcdefXYZ"
PASSWORD = "p\"a\\s/s'w <ö&d>+=1 2%"


SECRET_NAMES = (
    *("api_key", "rollout.reward.init_args.apiKey", "X-Api-Key", "OPENAI_API_KEY", "api_keys", "apikey", "aws_secret"),
    *("token", "hf_token", "password", "db_passwd", "client_secret", "Authorization", "HUGGING_FACE_HUB_TOKEN"),
)
OTHER_NAMES = (
    *("max_prompt_tokens", "prompt_key", "key", "keyboard", "tokenizer", "monkey", "pad_token", "eos_token"),
    *("secretary", "stop_token", "parse_dialogues", "logger.experiment_key"),
)


@pytest.fixture(autouse=True)
def forget_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setattr(secrets, "_environment", {})


SPELLINGS = {
    "plain": str,
    "upper": str.upper,
    "json": json.dumps,
    "json in json": lambda s: json.dumps(json.dumps(s)),
    "json of others": lambda s: json.dumps(s, ensure_ascii=False).replace("/", "\\/"),
    "repr": repr,
    "repr of repr": lambda s: repr(repr(s)),
    "bytes": lambda s: str(s.encode()),
    "url": lambda s: quote(s, safe=""),
    "url in lower case": lambda s: quote(s).replace("%3A", "%3a").replace("%2B", "%2b"),
    "form": quote_plus,
    "html": html.escape,
    "html of json": lambda s: html.escape(json.dumps(s)),
    "hex": lambda s: s.encode().hex(),
}


@pytest.mark.parametrize("secret", [KEY, PASSWORD])
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_a_secret_is_hidden_in_every_spelling(secret: str, spell: Callable[[str], str]) -> None:
    spelled = spell(secret)
    assert redact(f"[before {spelled} after]") == f"[before {spelled} after]"  # not registered yet
    register_secret(secret)
    shown = redact(f"[before {spelled} after]")
    assert HIDDEN in shown
    assert len(shown) <= len(f"[before {HIDDEN} after]") + 12  # only quotes around it are left
    assert shown.startswith("[before ")
    assert shown.endswith(" after]")


@pytest.mark.parametrize("before", ["", "u:", "me:", "api:"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_secret_is_hidden_in_base64_at_any_offset(before: str, encode: Callable[[bytes], bytes]) -> None:
    register_secret(KEY)
    shown = redact(encode(f"{before}{KEY}".encode()).decode())
    assert HIDDEN in shown
    assert len(shown) < len(HIDDEN) + 10


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:pw@host:80/v1", "http://<secret>@host:80/v1"),
        ("got 'https://tok@host.org'.", "got 'https://<secret>@host.org'."),
        ("http://u:p@w@[::1]:80/x", "http://<secret>@[::1]:80/x"),
        ("http://u:p/w@host/", "http://<secret>@host/"),
        ("http:\\/\\/u:pw@host", "http:\\/\\/<secret>@host"),
        ("http://u:pw@host/a?mail=a@b.org", "http://<secret>@host/a?mail=a@b.org"),
        ("http://host:8000/v1 and a@b.org", "http://host:8000/v1 and a@b.org"),
        ("(http://h/x?api_key=12&n=3)", "(http://h/x?api_key=<secret>&n=3)"),
        ("(http://h/x?n=3&token=12)", "(http://h/x?n=3&token=<secret>)"),
        ("Authorization: Bearer abcdefgh!", "Authorization: Bearer <secret>"),
    ],
)
def test_urls_and_headers_are_shown_without_their_secrets(url: str, shown: str) -> None:
    assert redact(url) == shown
    assert redact(shown) == shown


def test_the_parts_of_a_url_are_hidden_elsewhere() -> None:
    register_url("http://alice:hunter2%21x@host/score")
    sent = base64.b64encode(b"alice:hunter2!x").decode()
    assert redact(f"hunter2!x hunter2%21x Basic {sent} alice") == f"{HIDDEN} {HIDDEN} Basic {HIDDEN} alice"


@pytest.mark.parametrize("weak", ["abc", "12345", "reward", "123456", "password", "EMPTY", "none"])
def test_short_secrets_and_words_do_not_mangle_texts(weak: str) -> None:
    register_secret(weak)
    text = f"{weak} of the reward 123456, password required, none of it EMPTY, abcdef"
    assert redact(text) == text
    assert redact(f"http://u:{weak}@host") == "http://<secret>@host"
    assert redacted({"api_key": weak}) == {"api_key": HIDDEN}


def test_a_longer_word_is_hidden_as_a_word() -> None:
    register_secret("response")
    assert redact("key 'response' in responses") == f"key '{HIDDEN}' in responses"
    assert redact(repr("\nresponse")) == f"'\\n{HIDDEN}'"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *((name, "abc", True) for name in SECRET_NAMES),
        *((name, "abc", False) for name in OTHER_NAMES),
        ("think_open_token", "<think>", False),
        ("judge_key", "a1b2c3d4e5f6a7b8", True),
        ("api_key_env", "MY_KEY", False),
        ("api_key_env", "sk-0123", True),
        ("ssh_key", "/etc/hostname", False),
        ("token", "", False),
        ("auth", "hunter2", True),
        ("auth", "basic", False),
    ],
)
def test_secrets_are_recognized_by_name(name: str, value: str, expected: bool) -> None:
    assert is_secret(name, value) == expected


@pytest.mark.parametrize(
    "config",
    [
        f"rollout:\n  reward:\n    api_key: {KEY}  # mine\n",
        f'{{"reward": {{"api_key": "{KEY}", "url": "x"}}}}',
        f"reward: {{api_key: {KEY}, url: x}}\n",
        f"headers: {{Authorization: Bearer {KEY}}}\n",
        f"url: http://user:{KEY}@host\n",
        f"url: http://host/?access_token={KEY}&n=1\n",
        f"api_key: '{KEY}'\nbroken: [\n",
    ],
)
def test_secrets_of_configs_are_known_before_they_are_parsed(config: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(config)
    register_arguments(["fit", "--config", str(file)])
    assert KEY not in redact(f"expected a number, got {KEY}")


@pytest.mark.parametrize("arguments", [["--x.api_key", KEY], [f"--x.api_key={KEY}"], [f'--x={{"token": "{KEY}"}}']])
def test_secrets_of_command_lines_are_known(arguments: list[str]) -> None:
    register_arguments(arguments)
    assert redact(KEY) == HIDDEN


def test_secrets_of_the_environment_are_known_also_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact(f"{KEY} {PASSWORD}") == f"{KEY} {PASSWORD}"
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("https_proxy", f"http://me:{quote(PASSWORD, safe='')}@proxy:3128")
    assert redact(f"{KEY} {PASSWORD}") == f"{HIDDEN} {HIDDEN}"


def test_prose_in_a_config_names_no_secrets() -> None:
    register_text("rubric: |\n  The secret: be kind to the reader\nmax_tokens: 123456789\n")
    assert redact("be kind to 123456789") == "be kind to 123456789"


def test_errors_failures_and_descriptions_have_no_secrets() -> None:
    register_secret(KEY)
    assert str(InputError(f"got {KEY}")) == f"got {HIDDEN}"
    failure = Failure("exception", f"{'x' * 950}{KEY * 100}")
    assert len(failure.detail) <= 1000
    assert KEY[:8] not in failure.detail
    assert Failure(failure.kind, failure.detail) == failure  # as read from a journal

    class Thing:
        def __init__(self) -> None:
            self.api_key, self.urls, self.eta = "abc", ["http://u:p@h"], 1.0

    assert describe(Thing()).endswith("Thing(api_key='<secret>', eta=1.0, urls=['http://<secret>@h'])")


def test_secrets_in_manifests_of_earlier_versions_are_not_changes(tmp_path: Path) -> None:
    """Earlier manifests may hold the run's password. Without it the settings are equal."""
    stored = RoundStore(tmp_path).round(0)
    settings = {"rewards": {"reward": f"HTTPReward(http://me:{KEY}@host)"}, "responses": {"sampler": f"S(key='{KEY}')"}}
    content = {"schema_version": 2, "stages": {}, "settings": settings}
    write_checked(stored.path / "manifest.json", content)
    register_secret(KEY)
    assert stored.manifest["settings"] == stored.as_stored(settings)
    stored.update(settings=settings, warnings={"x": KEY})
    assert KEY not in (stored.path / "manifest.json").read_text()
    assert stored.find_damage() == []
