"""What comes in and goes out: input components that hand on paths only or say what they take, and names in Gradio's
cache."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import gradio as gr
from gradio.data_classes import FileData, GradioRootModel, ImageData, ListFiles
from gradio.processing_utils import save_base64_to_cache
from gradio.utils import get_upload_folder
from PIL import Image


def new_file(name: str) -> str:
    """Path for a new file that its visitor will download: in a folder of Gradio's cache that cannot be guessed.

    Gradio takes files there over without another copy, and deletes them with the rest of the cache.
    """
    folder = Path(get_upload_folder()) / secrets.token_hex(20)
    folder.mkdir(parents=True)
    return str(folder / name)


def save_picture(image: Image.Image, name: str = "view.png") -> str:
    """Writes a PNG for its visitor alone; returns its path.

    Gradio names a picture that it saves itself after its contents, so that two visitors with the same picture share a
    file, which one may be reading while it is written again for the other.
    """
    path = new_file(name)
    image.save(path)
    return path


class PhotoInput(gr.Image):
    """An image component that hands on the uploaded file as it is, unopened: the demo's own checks come first."""

    is_template = True

    def preprocess(self, payload: ImageData | None) -> str | None:
        """The upload's path."""
        return None if payload is None else _uploaded(payload.path)

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Refuses addresses of others, see `_own`."""
        return await super().async_move_resource_to_block_cache(_own(url_or_file_path))


class FileInput(gr.File):
    """A file component that hands on paths and leaves no temporary file behind."""

    is_template = True

    def preprocess(self, payload: ListFiles | FileData | None) -> str | list[str] | None:
        """The upload's path, or a list of paths where several files are allowed."""
        if payload is None:
            return None
        files = payload.root if isinstance(payload, ListFiles) else [payload]
        paths = [_uploaded(file.path) for file in files]
        return paths if self.file_count == "multiple" else paths[0]

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Refuses addresses of others, see `_own`."""
        return await super().async_move_resource_to_block_cache(_own(url_or_file_path))


class _Files(GradioRootModel):
    root: list[FileData | str]


class ApiFiles(FileInput):
    """Several files for an endpoint, each an upload or an address.

    MCP clients know files by their addresses only. Gradio turns these into files by itself where an argument is one
    file, not where it is a list, for which its schema has a reference that leads nowhere besides.
    """

    is_template = True

    def __init__(self, **options: Any) -> None:
        super().__init__(file_count="multiple", **options)
        self.data_model = _Files

    def preprocess(self, payload: _Files | None) -> list[str] | None:
        """The files' paths."""
        if payload is None:
            return None
        return [_given(file) if isinstance(file, str) else _uploaded(file.path) for file in payload.root]

    def api_info(self) -> dict[str, Any]:
        """Schema of what is taken."""
        item = {"type": "string", "format": "Gradio File Input - a http or https url to a file"}
        return {"type": "array", "items": item}


class Amounts(gr.JSON):
    """Numbers by name, for an endpoint. Gradio's own schema of JSON, an empty type, is none that clients accept."""

    is_template = True

    def api_info(self) -> dict[str, Any]:
        """Schema of what is taken."""
        return {"type": "object", "additionalProperties": {"type": "number"}}


class Angles(gr.JSON):
    """A list of numbers, for an endpoint; see `Amounts`."""

    is_template = True

    def api_info(self) -> dict[str, Any]:
        """Schema of what is taken."""
        return {"type": "array", "items": {"type": "number"}}


def _own(path: str | Path | None) -> str | Path | None:
    """A path as it is, and that of a file of this server's by its address, by which MCP clients hand on what they were
    given. Other addresses are refused: Gradio would fetch what lies there, of any size."""
    if path is None or not str(path).lower().startswith(("http:", "https:")):
        return path
    _, marker, local = urlsplit(str(path)).path.partition("/gradio_api/file=")
    if not marker or not Path(unquote(local)).is_file():
        raise gr.Error(
            "Addresses of files are not fetched here, unless the file was uploaded or made here; upload it first.",
            print_exception=False,
        )
    return _uploaded(unquote(local))


def _given(file: str) -> str:
    """The path of a file that is given as a text: its address, or its contents as a data URL."""
    if file.startswith("data:"):
        return save_base64_to_cache(file, get_upload_folder())
    return _uploaded(str(_own(file)))


def _uploaded(path: str) -> str:
    """A path, which has to lie where uploads and results do."""
    if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise gr.Error("This file was not uploaded; upload it first.", print_exception=False)
    return path
