"""Files that hold secrets: by their names, by the folders in which they lie, and by what stands in them."""

import re
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

from raytune.credentials import find_secrets
from raytune.units import KIB, MIB

SECRET_FILES = (
    ".env", ".env.*", ".envrc", ".envrc.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx",
    "*.ppk", "*.asc", "*.gpg", "*.age", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "auth_token", "*_token", "token",
    "tokens.json", "*credentials*", "secrets.*", "*.secret", "kubeconfig", ".netrc", "_netrc", ".pypirc", ".npmrc", ".yarnrc",
    ".git-credentials", ".gitconfig", ".htpasswd", ".pgpass", ".boto", ".s3cfg", ".rclone.conf", "rclone.conf", "kaggle.json",
    ".dockercfg", ".vault-token", ".bash_history", ".zsh_history", ".python_history", "*service-account*.json",
    "*service_account*.json", "client_secret*.json", "terraform.tfstate*", "*.tfvars",
)  # fmt: skip
"""Names of files that hold nothing but secrets, or mostly."""
SECRET_FOLDERS = (".ssh", ".aws", ".azure", ".gcloud", ".kube", ".docker", ".gnupg", ".huggingface", ".kaggle", ".password-store")
"""Names of folders of which every file is one."""

_A_SECRET_FILE = re.compile("|".join(map(translate, SECRET_FILES)))
_PIECE, _OVERLAP = 4 * MIB, 8 * KIB


def looks_secret(name: str) -> bool:
    """Whether a file is called as files with secrets are. Programs may be about them: what is in these tells."""
    return not name.endswith(".py") and _A_SECRET_FILE.fullmatch(name.lower()) is not None


@dataclass(frozen=True, slots=True)
class HeldSecret:
    """A secret that a file holds, or what looks like one."""

    line: int
    kind: str
    is_certain: bool

    @property
    def reason(self) -> str:
        return f"line {self.line} holds what looks like {self.kind}"

    def __str__(self) -> str:
        return f":{self.line} holds what looks like {self.kind}"


def secret_in(path: Path, *, may_show_samples: bool = False) -> HeldSecret | None:
    """The first secret that a text holds; None if it holds none, or is no text.

    Args:
        may_show_samples: of a text that may, the first that is no sample counts, and the first of all only where there is none.
    """
    number, before, sample = 1, "", None
    with path.open("rb") as stream:
        start = stream.read(_PIECE)
        encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
        if encoding == "utf-8" and b"\0" in start[: 8 * KIB]:
            return None
        while start:
            text = before + start.decode(encoding, errors="replace")
            for found in find_secrets(text):
                if sample and not found.is_certain:
                    continue
                held = HeldSecret(number + text.count("\n", 0, found.start), str(found), found.is_certain)
                if found.is_certain or not may_show_samples:
                    return held
                sample = sample or held
            before = text[-_OVERLAP:]
            number += text.count("\n", 0, len(text) - len(before))
            start = stream.read(_PIECE)
    return sample
