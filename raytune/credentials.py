"""What tokens, keys and passwords look like, wherever they stand: in a config, on a command line, in a file for a job.

The rules are ours because `check` has 0.3 CPU-seconds: detect-secrets 1.5 takes 0.12 of them to import three of its detectors
(with requests), and knows neither the tokens of Hugging Face, Google, Anthropic and W&B nor the signatures of Azure. A rule is
tried only where one of its fixed words is in the text, and is compiled then: about 10 MB of rows are searched in a second.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

_NOT_WITHIN = r"(?<![A-Za-z0-9_])"
_ENDS = r"(?![A-Za-z0-9_])"


@dataclass(frozen=True, slots=True)
class _Rule:
    kind: str
    """What it is, with its article."""
    words: tuple[str, ...]
    """One of these is in every text that the pattern matches. Lower case: in any case."""
    pattern: str
    """Its first group, where it has one, may be shown."""
    needs_chance: bool = False
    """Whether the last group must look like drawn at random: the pattern alone fits ordinary text, too."""
    may_be_a_sample: bool = False
    """Whether texts that only speak of such things hold it too, as documentation and answers about code do."""


@dataclass(frozen=True, slots=True)
class Secret:
    kind: str
    shown: str
    """As much of it as may be said; may be empty."""
    start: int
    stop: int
    is_certain: bool = False
    """Whether it has a form that a service gives its own, and no sample has: letters as if drawn at random behind it."""

    def __str__(self) -> str:
        return f"{self.kind} ({self.shown}...)" if self.shown else self.kind


def _prefixed(kind: str, prefixes: str, letters: str, least: int, *, needs_chance: bool = False) -> _Rule:
    """Tokens that begin with one of some words, behind which come at least so many of some letters."""
    words = prefixes.split()
    alternatives = "|".join(map(re.escape, words))
    return _Rule(kind, tuple(words), f"{_NOT_WITHIN}({alternatives})([{letters}]{{{least},}})", needs_chance)


_ALNUM, _WORD, _HEX = "A-Za-z0-9", "A-Za-z0-9_-", "0-9a-f"
_NO_PLACEHOLDER = r"[^\s/@:\"'<>{}$`,;|\\]"
_ASSIGNED = r"[:=,]>?\s*\\*[\"']?([A-Za-z0-9+/=_.~-]{16,})"
_QUOTED_KEY = r"(?<=[\"'])[A-Za-z0-9/+]{40}(?=[\"'\\])"
_NAME = r"([A-Za-z0-9_.-]+)\\*[\"']?\s*$"
_WORDS = r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+"
_SECRET_WORDS = (
    r"[a-z]*(?:password|secret|token)|secrets|passwd|passphrase|pwd|credentials?|(?:api|access|private|secret|auth|account)key"
)
_SECRET_KEYS = {"api", "access", "private", "secret", "auth", "account", "encryption", "ssh", "wandb"}
"""What a key is one of, so that it is secret."""
_OF_FILES_AND_COUNTS = {"path", "file", "dir", "folder", "ids", "count", "limit", "type", "length", "name", "mode"}
"""Last words of names whose value is not the secret itself."""
_LONGEST_NAME = 48
_PARAMETERS = (
    r"(?:access_?key(?:_?id)?|secret(?:_?(?:access_?)?key)?|api_?key|(?:access_|auth_|id_|session_)?token|password|passwd|pwd|sig"
    r"|x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|client_secret)"
)

_RULES = (
    # A name such as hf_baseline is no token; in a path, only what is as long as one.
    _Rule(
        "a Hugging Face token", ("hf_",), rf"{_NOT_WITHIN}(hf_)(?:[{_ALNUM}]{{30,}}|(?<!/hf_)[{_ALNUM}]{{16,}}(?![\w/-]|\.\w))"
    ),
    _prefixed("a Hugging Face token", "api_org_", _ALNUM, 20),
    _prefixed("a GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_", _ALNUM, 20),
    _prefixed("a GitHub token", "github_pat_", "A-Za-z0-9_", 20),
    _prefixed("a GitLab token", "glpat- gldt- glft- glsoat- glrt- glcbt- glimt- glptt- glagent- gloas-", _WORD, 20),
    _Rule(
        "an AWS access key",
        ("AKIA", "ASIA", "ABIA", "ACCA"),
        rf"(?<![{_ALNUM}])(AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{{16}}(?![{_ALNUM}])",
    ),
    _prefixed("a Google API key", "AIza", _WORD, 30),
    _prefixed("a Google token", "ya29. GOCSPX-", _WORD, 20),
    _prefixed("a Slack token", "xoxa- xoxb- xoxe- xoxo- xoxp- xoxr- xoxs- xapp-", "A-Za-z0-9-", 10),
    _Rule(
        "a webhook",
        ("hooks.slack.com/services/", "/api/webhooks/"),
        r"(?:hooks\.slack\.com/services|/api/webhooks)/\w+/[\w/-]{8,}",
        may_be_a_sample=True,
    ),
    _Rule(
        "an API key",  # of OpenAI, Anthropic, OpenRouter; a bare sk- may be Slovak
        ("sk-",),
        rf"{_NOT_WITHIN}(?<!-)(sk-(?:(?:ant|proj|svcacct|admin|or|lf)-(?=[{_WORD}]{{16}}))?)(?:(?<=sk-)[{_ALNUM}]{{20,}}|(?<!sk-)[{_WORD}]{{16,}})",
    ),
    _prefixed("a W&B API key", "wandb_v1_ wandb_", _ALNUM, 20, needs_chance=True),
    _Rule("a W&B API key", ("wandb",), rf"(wandb)\.login\([^)]*[\"'][{_HEX}]{{40}}"),
    _Rule(
        "a JSON web token",
        ("eyJ",),
        rf"(?<![{_WORD}])(eyJ)[{_WORD}]{{10,}}\.eyJ[{_WORD}]{{10,}}\.[{_WORD}]{{5,}}",
        may_be_a_sample=True,
    ),
    _prefixed("a Neptune token", "eyJhcGlf", "A-Za-z0-9+/=", 20),
    _prefixed("an npm token", "npm_", _ALNUM, 30),
    _Rule("an npm token", (":_authToken", ":_password", "_auth"), r"(_authToken|_auth|_password)\s*=\s*[^\s${}]{8,}"),
    _prefixed("a PyPI token", "pypi-", _WORD, 50),
    _prefixed("a Docker token", "dckr_pat_ dckr_oat_", _WORD, 20),
    _prefixed("a Databricks token", "dapi dose", _HEX, 32),
    _prefixed("a DigitalOcean token", "dop_v1_ doo_v1_ dor_v1_", _HEX, 40),
    _prefixed("a Replicate token", "r8_", _ALNUM, 30),
    _prefixed(
        "an API key",
        "gsk_ xai- pplx- nvapi- tgp_v1_ ntn_ lin_api_ NRAK- PMAK- shpat_ sbp_ figd_ glsa_ glc_ tskey-",
        _WORD,
        30,
        needs_chance=True,
    ),
    _prefixed("a Vault token", "hvs. hvb. s.atlasv1.", _WORD, 20),
    _prefixed("an Atlassian token", "ATATT3x ATCTT3x", "A-Za-z0-9_=-", 30),
    _prefixed("a Stripe key", "sk_live_ rk_live_ sk_test_ whsec_", _ALNUM, 20),
    _prefixed("a Square token", "sq0csp- sq0atp- EAAA", _WORD, 40),
    _Rule("a SendGrid key", ("SG.",), rf"{_NOT_WITHIN}(SG\.)[{_WORD}]{{16,}}\.[{_WORD}]{{30,}}"),
    _Rule("a Twilio key", ("SK",), rf"{_NOT_WITHIN}(SK)[{_HEX}]{{32}}{_ENDS}"),
    _Rule("a Mailchimp key", ("-us",), rf"{_NOT_WITHIN}[{_HEX}]{{32}}-us\d{{1,2}}{_ENDS}"),
    _Rule("a Telegram token", (":AA",), rf"{_NOT_WITHIN}\d{{8,10}}:AA[{_WORD}]{{33}}(?![{_WORD}])"),
    _prefixed("an age key", "AGE-SECRET-KEY-1", "A-Z0-9", 30),
    _Rule("a private key", ("PRIVATE KEY",), r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----(?=\s|\\+[nr]|$)"),
    _Rule("a private key", ("PuTTY-User-Key-File-",), r"PuTTY-User-Key-File-\d"),
    _Rule(
        "an account of Google Cloud",
        ("service_account", "authorized_user", "external_account"),
        r"\"type\"\s*:\s*\\*\"(?:service_account|authorized_user|external_account)\\*\"",
        may_be_a_sample=True,
    ),
    _Rule("an Azure key", ("AccountKey=", "SharedAccessKey="), r"((?:Account|SharedAccess)Key=)[A-Za-z0-9+/%]{20,}"),
    _Rule("an Azure account key", ("==",), r"(?<![A-Za-z0-9+/=-])[A-Za-z0-9+/]{86}==(?![A-Za-z0-9+/=])"),
    # An AWS key may have slashes; what has a number and a slash behind its colon is a host with a port.
    _Rule(
        "a URL with a password",
        ("://",),
        rf"([a-zA-Z][a-zA-Z0-9+.-]*://){_NO_PLACEHOLDER}*:(?!\d{{1,5}}(?:/|$|\s)){_NO_PLACEHOLDER}[^\s@:\"'<>{{}}$`,|\\]*@",
        may_be_a_sample=True,
    ),
    _Rule(
        "a URL with a user", ("://",), rf"((?:https?|s3[an]?|gs|gcs|ftps?)://)(?!git@){_NO_PLACEHOLDER}+@", may_be_a_sample=True
    ),
    _Rule("a URL with a credential", ("?", "&"), rf"(?i)[?&]({_PARAMETERS}=)[^&\s\"'{{}}$<>`]{{6,}}", may_be_a_sample=True),
    _Rule(
        "a login",
        ("bearer ", "basic "),
        r"(?i)\b(bearer|basic) ([A-Za-z0-9+/=_.~-]{16,})",
        needs_chance=True,
        may_be_a_sample=True,
    ),
    _Rule("a password", ("machine ",), r"(machine)\s+\S+\s+login\s+\S+\s+password\s+\S+", may_be_a_sample=True),
)


_TRIED = tuple((word, word == word.lower(), rule) for rule in _RULES for word in rule.words)
"""Which rule a word calls, and whether it does so in any case."""


def find_secret(text: str) -> Secret | None:
    """The first thing in a text, by place, that looks like a credential."""
    return min(_all_in(text), key=lambda found: found.start, default=None)


def find_secrets(text: str) -> list[Secret]:
    """Everything in a text that looks like a credential, by place."""
    return sorted(_all_in(text), key=lambda found: found.start)


def find_secret_value(name: str, value: str) -> Secret | None:
    """What looks like a credential in a value that belongs to a name, or in the name; also where only the name tells that it is.

    Args:
        name: a config's key or an environment variable.
    """
    found = find_secret(value) or find_secret(name)
    if found or not value:
        return found
    if _is_cloud_key(value):
        return Secret("the secret key of a cloud", "", 0, len(value))
    in_context = find_secret(f"{name}={value}")
    return Secret(in_context.kind, in_context.shown, 0, len(value)) if in_context else None


def is_secret_name(name: str) -> bool:
    """Whether what has this name is a secret: HF_TOKEN, apiKey, AWS_SECRET_ACCESS_KEY, PGPASSWORD, client-key-data, but neither
    TOKENIZERS_PARALLELISM nor token_count, nor HF_TOKEN_PATH, which names a file."""
    words = [word.lower() for word in _compiled(_WORDS).findall(name)]
    if not words or words[-1] in _OF_FILES_AND_COUNTS or words[-2:] == ["token", "id"]:
        return False
    return (
        any(_compiled(_SECRET_WORDS).fullmatch(word) for word in words)
        or any(kind in _SECRET_KEYS and key == "key" for kind, key in pairwise(words))
        or words[-1] in ("auth", "authtoken")
        or words[-3:] == ["client", "key", "data"]
    )


def redacted(text: str) -> str:
    """A text without what looks like a credential."""
    pieces, at = [], 0
    for found in sorted(_all_in(text), key=lambda found: (found.start, -found.stop)):
        if found.stop > at:
            pieces += [text[at : max(at, found.start)], f"{found.shown}..."]
            at = found.stop
    return "".join([*pieces, text[at:]])


def _all_in(text: str) -> Iterator[Secret]:
    folded = text.lower()
    # One flat pass: configs have many short texts, for which this is all that is done.
    called = [rule for word, in_any_case, rule in _TRIED if word in (folded if in_any_case else text)]
    for rule in dict.fromkeys(called):
        for match in _compiled(rule.pattern).finditer(text):
            groups = match.groups()
            if not rule.needs_chance or looks_drawn(groups[-1]):
                is_certain = not rule.may_be_a_sample and _is_no_sample(text, match)
                yield Secret(rule.kind, groups[0] if groups else "", match.start(), match.end(), is_certain)
    for match in _compiled(_ASSIGNED).finditer(text):
        before = max(0, match.start() - _LONGEST_NAME), match.start()
        name = _compiled(_NAME).search(text, *before)
        if name and is_secret_name(name[1]) and _is_drawn_value(match[1]):
            yield Secret("a secret", "", match.start(1), match.end())
    for match in _compiled(_QUOTED_KEY).finditer(text):
        if _is_cloud_key(match[0]):
            yield Secret("the secret key of a cloud", "", match.start(), match.end(), _is_no_sample(text, match))


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _is_no_sample(text: str, match: re.Match[str]) -> bool:
    """Whether what was found, or the key that begins behind it, is as nobody writes it by hand."""
    if match[0].startswith("-----BEGIN"):
        key = _compiled(r"(?:\s|\\+[nr])*([A-Za-z0-9+/=]{40,})").match(text, match.end())
        return key is not None and looks_drawn(key[1])
    shown = next(iter(match.groups()), "") or ""
    own = match[0].removeprefix(shown)
    # Some services draw letters alone.
    is_drawn = looks_drawn(own) or _num_turns(own) >= len(own) / 6
    return is_drawn and not _compiled(r"(?i)example|sample|dummy|your|xxxx|1234567|abcdef").search(own)


def _is_drawn_value(text: str) -> bool:
    """Whether what belongs to a secret name looks drawn; of a path (an ssh_key is one) each of its parts, not all together."""
    parts = [part for part in text.split("/") if len(part) >= 16] if text.startswith(("/", "~/", "./", "../")) else [text]
    return any(map(looks_drawn, parts))


def looks_drawn(text: str) -> bool:
    """Whether letters and digits stand as if drawn at random, not as in words, names, numbers and paths."""
    if re.fullmatch(r"[0-9a-f]{32,}", text):
        return len(set(text)) >= 8
    return bool(re.search(r"\d", text)) and bool(re.search("[A-Za-z]", text)) and _num_turns(text) >= len(text) / 6


def _is_cloud_key(text: str) -> bool:
    """Whether a value is forty letters as AWS draws its secret keys: no name, no path and no hash has such a mixture."""
    return (
        re.fullmatch(r"[A-Za-z0-9/+]{40}", text) is not None
        and all(re.search(kind, text) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
        and _num_turns(text) >= 9
    )


def _num_turns(text: str) -> int:
    """Places where another kind of letter follows, other than at the first letter of a word."""
    return len(re.findall(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])|(?<=[A-Z]{2})(?=[a-z])", text))
