"""What looks like a secret: in a name, or in a value. Scripts and logs are read by others."""

from __future__ import annotations

import re

_WORDS = {
    *("token", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "pass", "pat", "credential"),
    *("credentials", "creds", "auth", "key", "apikey", "cookie", "bearer"),
}
_ENDS = ("token", "secret", "secrets", "password", "passwd", "passphrase", "apikey", "credentials")
_PLACES = {"file", "path", "dir", "folder", "sock", "url", "uri"}
_SWITCHES = {"", "0", "1", "true", "false", "yes", "no", "on", "off"}
_VALUE = re.compile(
    r"""
      ^hf_\w+$ | ^sk-\S{6,}$                                            # Hugging Face, OpenAI and others: alone
    | (?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{30,} | sk-(?:ant-|proj-|[A-Za-z0-9]{20,})        # or among other words
      | gh[pousr]_[A-Za-z0-9]{3,} | github_pat_\w{3,} | glpat-[\w-]{6,} # GitHub, GitLab
      | xox[abeprs]-[\w-]{6,} | A[KS]IA[0-9A-Z]{12,} | AIza[\w-]{30,}   # Slack, Amazon, Google
      | eyJ[\w-]{4,}\.eyJ[\w-]{4,} )                                    # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | ://[^/@\s]*:[^/@\s]+@                                             # a password in an address
    """,
    re.VERBOSE,
)


def is_secret(name: str, value: str) -> bool:
    """Whether a variable or an option of this name (empty: none) has a value that nobody else should read.

    By its name: API_KEY, MYTOKEN, DB_PWD; HF_TOKEN_PATH names a place, TOKENIZERS_PARALLELISM and MAX_TOKENS no token,
    and a switch is none. Or by the value: a token of a known service, a private key, an address with a password.
    """
    by_name = _names_a_secret(name) and value.lower() not in _SWITCHES
    return by_name or _VALUE.search(value) is not None


def _names_a_secret(name: str) -> bool:
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    if not words or words == ["pwd"] or words[-1] in _PLACES:
        return False
    return any(word in _WORDS or word.endswith(_ENDS) for word in words)
