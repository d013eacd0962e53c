"""Keeps secrets out of everything that leaves: known token shapes, credentials in URLs, values of secret variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "[removed]"
# Shapes the providers document. Plain hexadecimal is not among them: commit and file hashes look the same.
TOKEN_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}"
    r"|api_org_[A-Za-z0-9]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|sk-[A-Za-z0-9_-]{16,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|AKIA[0-9A-Z]{16}"
    r"|AIza[0-9A-Za-z_-]{30,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/-]{8,}=*"
)
URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)")
URL_SECRET_PARAMETER = re.compile(
    r"(?i)(?<=[?&])((?:access_?)?token|key|api_?key|sig|signature|password|x-amz-[a-z-]+)=[^&\s\"']+"
)
SECRET_KEY = re.compile(
    r"(?i)(^|[_-])(password|passwd|secret|credentials?|authorization|api_?key|access_?key|private_?key)$|^token$|(hf|hub|auth|access|api|bearer|refresh|wandb)[_-]?token$"
)
SECRET_VARIABLE = re.compile(r"(?i)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL)")
SHORTEST_SECRET = 8  # a shorter value of a secret variable would blank ordinary words


class Redactor:
    """Removes secrets from text and JSON values. Made once per export: it remembers the environment's secret values."""

    def __init__(self, environment: Mapping[str, str] | None = None, home: str | None = None) -> None:
        environment = os.environ if environment is None else environment
        values = {value for name, value in environment.items() if SECRET_VARIABLE.search(name) and _is_secret_value(value)}
        self._secrets = sorted(values, key=len, reverse=True)
        home = str(Path.home()) if home is None else home
        self._home = home if len(home) > 1 else None

    def text(self, text: str) -> str:
        """The text with every secret masked and the user's home folder written `~`."""
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        text = URL_CREDENTIALS.sub(MASK, TOKEN_SHAPES.sub(MASK, text))
        text = URL_SECRET_PARAMETER.sub(rf"\1={MASK}", text)
        if self._home:
            text = re.sub(rf"{re.escape(self._home)}(?=/|$|[\s\"'])", "~", text)
        return text

    def value(self, value: Any) -> Any:
        """A JSON value with its strings cleaned; what stands under a secret key is masked whatever it looks like."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._under(str(key), inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(inner) for inner in value]
        return value

    def _under(self, key: str, value: Any) -> Any:
        if SECRET_KEY.search(key) and isinstance(value, str) and value:
            return MASK
        return self.value(value)


def _is_secret_value(value: str) -> bool:
    """Switches and paths (`TOKENIZERS_PARALLELISM=false`, `HF_TOKEN_PATH=/…`) are named like secrets and are none."""
    return len(value) >= SHORTEST_SECRET and not value.startswith(("/", "~", "."))
