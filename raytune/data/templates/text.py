"""The Jinja text behind `data.template`: the tokenizer's own, one that ships with raytune, or a file."""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raytune.data.templates.tokenizers import adds_bos
from raytune.errors import DataError

TEMPLATES_FOLDER = Path(__file__).parent
SHIPPED = tuple(sorted(path.stem for path in TEMPLATES_FOLDER.glob("*.jinja")))

_MAX_TEMPLATE_BYTES = 1 << 20


def resolve_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text behind `data.template`: "auto" (the tokenizer's own), the name of a shipped one, or a file.

    A shipped template begins with the beginning-of-text token exactly if the tokenizer itself begins texts with one.

    Raises:
        DataError: if the tokenizer has none, there is no such file, or the template needs a token that the tokenizer lacks.
    """
    if template == "auto":
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer '{tokenizer.name_or_path}' has no chat template, and data.template is 'auto'. "
                f"Set data.template to the one that the model was trained with ({', '.join(SHIPPED)}) or to a Jinja file; "
                f"if the rows are plain documents, give their source format: text."
            )
        text = tokenizer.get_chat_template()
    elif template in SHIPPED:
        text = (TEMPLATES_FOLDER / f"{template}.jinja").read_text()
        if adds_bos(tokenizer):
            text = "{{- bos_token }}" + text
    else:
        path = Path(template).expanduser()
        if not path.is_file():
            raise DataError(f"data.template is '{template}', which is neither a file nor one of {', '.join(SHIPPED)}.")
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise DataError(f"data.template: {path} has {path.stat().st_size} bytes, which is no chat template.")
        try:
            text = path.read_text(encoding="utf-8-sig")  # a BOM is not part of the template
        except UnicodeDecodeError as error:
            raise DataError(f"data.template: {path} is not UTF-8: {error}.") from error
    if re.search(r"\beos_token\b", text) and tokenizer.eos_token is None:
        raise DataError(
            f"The chat template ends turns with eos_token, but the tokenizer '{tokenizer.name_or_path}' has none, so a model "
            f"would never learn to stop. Set eos_token in its tokenizer_config.json, or choose another data.template."
        )
    return text


def name_of(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What to call a template in messages."""
    for name in SHIPPED:
        if text.endswith((TEMPLATES_FOLDER / f"{name}.jinja").read_text()):
            return f"the shipped chat template '{name}'"
    own = tokenizer.chat_template
    return "the tokenizer's own chat template" if isinstance(own, str) and text.endswith(own) else "the chat template"
