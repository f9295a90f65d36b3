"""Recognizes options, environment variables, headers and query parameters with secrets by their names."""

import os
import re

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ALWAYS = {
    *("password", "passwd", "passphrase", "pwd", "pass", "secret", "credential", "authorization", "cookie", "bearer"),
    *("apikey", "accesskey", "secretkey", "privatekey", "authtoken", "accesstoken", "apitoken"),
}
_IN_QUERIES = {"sig", "signature"}  # options with these names are not secrets
_KEYS_OF = {
    *("api", "access", "secret", "private", "auth", "account", "service", "signing", "encryption", "license"),
    *("admin", "master", "subscription", "client", "ssh", "server"),
}
# words before `token` in options about text and limits
_TOKENS_OF = {
    *("pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "start", "begin", "end", "image", "audio", "video"),
    *("think", "special", "max", "min", "num", "per", "new", "first", "last", "next", "user", "system", "assistant"),
}
_ENVIRONMENT_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


def is_secret(name: str, value: str, any_key: bool = False) -> bool:
    """Whether the value under a name is a secret.

    Args:
        name: Name of an option (full, or its last part), an environment variable, a header or a query parameter.
        value: Its value.
        any_key: Whether every name that ends with `key` is a secret's; otherwise `key` alone is the name of a column or
            an index unless the value looks random.
    """
    words = [word.lower() for word in _WORDS.findall(name.rpartition(".")[2])]
    if not words or not value:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last == "env" and len(words) > 2:  # the key itself instead of the variable's name
        named = _ENVIRONMENT_NAME.fullmatch(value) or value in os.environ
        return not named and is_secret(name.rpartition("_")[0], value)
    single = last.removesuffix("s")
    if last == "token":
        named = before not in _TOKENS_OF and not re.search(r"[<>|\[\]\s]", value)
    elif single == "key":
        named = any_key or before in _KEYS_OF or (before != "experiment" and _looks_random(value))
    elif last == "auth":
        named = not value.isalpha()  # `basic`, and the user in [user, password]
    else:
        named = last in _ALWAYS or single in _ALWAYS or (any_key and last in _IN_QUERIES)
    return named and not ("/" in value and os.path.exists(value[:1000]))  # the path of a file is not a secret


def _looks_random(value: str) -> bool:
    return len(value) >= 16 and bool(re.search(r"\d", value) and re.search(r"[A-Za-z]", value)) and " " not in value
