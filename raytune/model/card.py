"""The README.md of a saved model, as text: whether it is still what raytune wrote, and how the model is loaded.

The page about it is `report.model_card`'s. What is here is what other floors have to know of it: a push says under which name the
model is loaded, and a merge carries the card of an adapter on to the whole model.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from raytune.run_folder import MODEL_CARD

HERE = "."
"""Where a model is whose code lies in the folder itself."""
_SIGNED = re.compile(r"^<!-- Written by raytune \([0-9a-f]{16}\)\. .* -->\n", re.MULTILINE)
_PLACE = re.compile(r'^MODEL = ".*"  # .*$', re.MULTILINE)
_BASE = re.compile(r'^BASE = ".*"  # .*$', re.MULTILINE)
_LOADING = re.compile(r"(?<=^## How to load it\n\n).*?(?=\n^## )", re.MULTILINE | re.DOTALL)
_FRONT = re.compile(r"\A---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)


def signed(text: str) -> str:
    """A card with the line that tells whether somebody has edited it, behind its front matter."""
    front, body = _parts(text)
    digest = hashlib.sha256((front + body).encode()).hexdigest()[:16]
    said = "raytune may write it again until somebody edits it; then it stays as it is."
    return f"{front}<!-- Written by raytune ({digest}). {said} -->\n{body}"


def is_ours(text: str) -> bool:
    """Whether a README.md is a card of raytune's that nobody has edited."""
    return _SIGNED.search(text) is not None and signed(_SIGNED.sub("", text, count=1)) == text


def placed(text: str, place: str, base: str | None = None) -> str:
    """A card whose code loads the model from another place, such as an id on a hub; an edited one as it is.

    Args:
        base: what its base is called there; None: as it is here.
    """
    if not is_ours(text):
        return text
    text = _PLACE.sub(lambda _: _place_line(place), _SIGNED.sub("", text, count=1), count=1)
    if base is not None:
        text = _BASE.sub(lambda _: _base_line(base), text, count=1)
        if not text.startswith("---\nbase_model:"):
            text = text.replace("---\n", f"---\nbase_model: {json.dumps(base)}\nbase_model_relation: adapter\n", 1)
    return signed(text)


def save_merged_card(adapter: Path, merged: Path) -> None:
    """Carry the card of an adapter on to the whole model that it was merged into; one that somebody has edited is not."""
    path = adapter / MODEL_CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not is_ours(text):
        return
    front, body = _parts(_SIGNED.sub("", text, count=1))
    front = front.replace("base_model_relation: adapter\n", "base_model_relation: merge\n")
    front = front.replace("library_name: peft\n", "library_name: transformers\n")
    has_code, has_template = any(merged.glob("*.py")), (merged / "chat_template.jinja").is_file()
    code = Loading(is_whole=True, has_template=has_template, trust_remote_code=has_code).markdown
    body = _LOADING.sub(lambda _: code, body, count=1)
    heading, _, rest = body.lstrip("\n").partition("\n\n")
    note = "**Merged:** the adapter that is described here lies in its base; what follows is the card of the adapter."
    (merged / MODEL_CARD).write_text(signed(f"{front}\n{heading}\n\n{note}\n\n{rest}"), encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Code that loads a saved model with transformers and PEFT alone, and lets it write."""

    is_whole: bool
    has_template: bool
    """Whether the tokenizer has a chat template."""
    trust_remote_code: bool = False
    place: str = HERE
    base: str = ""
    """Of an adapter: hub id, or the name of a folder."""
    revision: str | None = None
    num_embeddings: int | None = None
    """Rows that the base needs; None: those it has."""
    rope: dict[str, str | bool | int | float] = field(default_factory=dict)
    """Rotary positions that the base needs, by transformers' names; empty: its own."""
    max_positions: int | None = None
    quantization: dict[str, object] = field(default_factory=dict)
    """Of the base, as bitsandbytes was asked for it; empty: none."""
    needs_raytune: bool = False
    """Whether PEFT has no such adapter, and learns it from raytune."""

    @property
    def markdown(self) -> str:
        more = "`raytune merge` makes one whole model of base and adapter, where the method allows that.\n"
        return f"```python\n{self.code}```\n" + f"\n{more}" * (not self.is_whole)

    @property
    def code(self) -> str:
        """Python, that runs in the folder of the model."""
        lines = [*self._imports, "", _place_line(self.place)]
        trust = ", trust_remote_code=True" * self.trust_remote_code
        if self.is_whole:
            lines += [
                f"tokenizer = AutoTokenizer.from_pretrained(MODEL{trust})",
                f'model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto"{trust})',
                "settings = model.generation_config",
            ]
        else:
            lines += self._over_base(trust)
        return "\n".join([*lines, "", *self._writing, ""])

    @property
    def _imports(self) -> list[str]:
        names = ["AutoModelForCausalLM", "AutoTokenizer"]
        names += ["AutoConfig"] * bool(self.rope) + ["BitsAndBytesConfig"] * bool(self.quantization)
        names += ["GenerationConfig"] * (not self.is_whole)
        lines = ["from peft import PeftModel"] * (not self.is_whole) + [f"from transformers import {', '.join(sorted(names))}"]
        if self.needs_raytune:
            lines.append("import raytune.model.adapters  # PEFT has no such adapter, and learns it here")
        return lines

    def _over_base(self, trust: str) -> list[str]:
        asked = f"{f', revision={self.revision!r}' if self.revision else ''}{trust}"
        lines = [_base_line(self.base)]
        asked_for = 'dtype="auto"'
        if self.rope:
            lines += [
                f"config = AutoConfig.from_pretrained(BASE{asked})",
                'kept = {name: config.rope_parameters[name] for name in ("rope_theta", "partial_rotary_factor")',
                "        if name in config.rope_parameters}",
                f"config.rope_parameters = kept | {self.rope!r}",
                f"config.max_position_embeddings = {self.max_positions}",
            ]
            asked_for += ", config=config"
        if self.quantization:
            options = ", ".join(f"{name}={value!r}" for name, value in self.quantization.items())
            lines.append(f"quantization = BitsAndBytesConfig({options})")
            asked_for += ", quantization_config=quantization"
        lines.append(f"base = AutoModelForCausalLM.from_pretrained(BASE, {asked_for}{asked})")
        if self.num_embeddings is not None:
            lines.append(f"base.resize_token_embeddings({self.num_embeddings})")
        return [
            *lines,
            "tokenizer = AutoTokenizer.from_pretrained(MODEL)",
            "model = PeftModel.from_pretrained(base, MODEL)",
            "settings = GenerationConfig.from_pretrained(MODEL)  # where answers end; PEFT takes the base's",
        ]

    @property
    def _writing(self) -> list[str]:
        if self.has_template:
            made = [
                'chat = [{"role": "user", "content": "Hello"}]',
                'prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
            ]
        else:
            made = ['prompt = tokenizer("Once", return_tensors="pt")']
        return [
            *made,
            "settings.max_new_tokens = 64",
            "written = model.generate(**prompt.to(model.device), generation_config=settings)",
            'print(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]


def _place_line(place: str) -> str:
    return f"MODEL = {_literal(place)}  # this folder, or its id on a hub"


def _base_line(base: str) -> str:
    return f"BASE = {_literal(base)}  # its id on a hub, or its folder"


def _literal(text: str) -> str:
    """A text between double quotes, as Python reads it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _parts(text: str) -> tuple[str, str]:
    """Front matter and body."""
    match = _FRONT.match(text)
    return (match[0], text[match.end() :]) if match else ("", text)
