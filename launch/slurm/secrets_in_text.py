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
_ALONE = re.compile(r"hf_\w+|sk-\S{6,}|gh[pousr]_[A-Za-z0-9]{3,}")
"""The whole value of a variable or an option: Hugging Face, OpenAI and others, GitHub. Places and groups may be called
so: a partition hf_gpu, a folder /data/ghs_lab."""
_VALUE = re.compile(
    r"""
      (?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{30,} | sk-(?:ant-|proj-|[A-Za-z0-9]{20,})        # the same among other words, by their length
      | gh[pousr]_[A-Za-z0-9]{30,}
      | github_pat_\w{3,} | glpat-[\w-]{6,}                             # GitHub, GitLab
      | xox[abeprs]-[\w-]{6,} | A[KS]IA[0-9A-Z]{12,} | AIza[\w-]{30,}   # Slack, Amazon, Google
      | eyJ[\w-]{4,}\.eyJ[\w-]{4,} )                                    # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | ://[^/@\s]*:[^/@\s]+@(?!sha256:)                                  # a password in an address; not IMAGE:TAG@DIGEST
    """,
    re.VERBOSE,
)


def is_secret(name: str, value: str) -> bool:
    """Whether a variable or an option of this name (empty: none) has a value that nobody else should read.

    By its name: API_KEY, MYTOKEN, DB_PWD; HF_TOKEN_PATH names a place, TOKENIZERS_PARALLELISM and MAX_TOKENS no token,
    and a switch is none. Or by the value: a token of a known service, a private key, an address with a password.
    """
    by_name = _names_a_secret(name) and value.lower() not in _SWITCHES
    alone = name != "" and _ALONE.fullmatch(value) is not None
    return by_name or alone or _VALUE.search(value) is not None


def _names_a_secret(name: str) -> bool:
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    if not words or words == ["pwd"] or words[-1] in _PLACES:
        return False
    return any(word in _WORDS or word.endswith(_ENDS) for word in words)
