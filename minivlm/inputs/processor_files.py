"""What a checkpoint's files say about its processor: the image token, the chat template, the image settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from minivlm.errors import UserError
from minivlm.files import exists, read_bytes
from minivlm.inputs.images import ImageSettings
from minivlm.inputs.token_settings import NamedToken, Text
from minivlm.model.config import VLMConfig
from minivlm.schema import read_json, read_optional_json


class _NamedTemplate(Struct):
    name: str
    template: str


# One template, or several, of which the one named `default` is meant.
_Templates = str | Annotated[list[_NamedTemplate], Meta(max_length=256)] | dict[str, str]


class ProcessorFile(Struct, kw_only=True):
    """`processor_config.json`."""

    image_token: Text | NamedToken | None = None
    chat_template: _Templates | None = None
    image_processor: dict[str, Any] | None = None  # in new checkpoints; `preprocessor_config.json` in old ones

    @classmethod
    def from_folder(cls, folder: Path) -> ProcessorFile:
        return read_optional_json(folder / "processor_config.json", cls)

    @property
    def image_token_text(self) -> str | None:
        return self.image_token.content if isinstance(self.image_token, NamedToken) else self.image_token


class _TemplateFile(Struct):
    """`chat_template.json`."""

    chat_template: _Templates


class _TokenizerConfig(Struct):
    """`tokenizer_config.json`, as far as it is about templates."""

    chat_template: _Templates | None = None


def template_source(folder: Path, file: ProcessorFile) -> tuple[str | None, str]:
    """(source, file name) of the checkpoint's chat template; the source is None if there is none.

    The files are searched in the order in which transformers searches them. Raises `UserError` for
    one that is malformed.
    """
    if file.chat_template is not None:
        return _default(file.chat_template, folder / "processor_config.json")
    path = folder / "chat_template.json"
    if exists(path):
        return _default(read_json(path, _TemplateFile).chat_template, path)
    path = folder / "chat_template.jinja"
    if exists(path):
        try:
            return read_bytes(path).decode(), path.name
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: cannot be read as text ({error})") from None
    path = folder / "tokenizer_config.json"
    templates = read_optional_json(path, _TokenizerConfig).chat_template
    return (None, path.name) if templates is None else _default(templates, path)


def _default(templates: _Templates, path: Path) -> tuple[str, str]:
    if isinstance(templates, list):
        templates = {each.name: each.template for each in templates}
    if isinstance(templates, dict):
        if "default" not in templates:
            raise UserError(f"{path}: chat_template has no template named default")
        templates = templates["default"]
    return templates, path.name


def image_settings(folder: Path, file: ProcessorFile, config: VLMConfig, pad_to_square: bool | None) -> ImageSettings:
    """The image settings. Raises `UserError` if there are none, or some are not supported."""
    if file.image_processor:
        return ImageSettings.from_dict(
            file.image_processor, config, "processor_config.json: image_processor", pad_to_square
        )
    name = "preprocessor_config.json"
    raw = read_optional_json(folder / name, dict[str, Any])
    if not raw:
        raise UserError(f"{folder}: no image settings (expected {name}, or image_processor in processor_config.json)")
    return ImageSettings.from_dict(raw, config, name, pad_to_square)
