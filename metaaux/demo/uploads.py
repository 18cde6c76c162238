"""Files that come in and go out: input components that hand on paths only, and names in Gradio's cache."""

from __future__ import annotations

import secrets
from pathlib import Path

import gradio as gr
from gradio.data_classes import FileData, ImageData, ListFiles
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
        return None if payload is None else payload.path

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Refuses addresses, see `_check_uploaded`."""
        _check_uploaded(url_or_file_path)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class FileInput(gr.File):
    """A file component that hands on paths and leaves no temporary file behind."""

    is_template = True

    def preprocess(self, payload: ListFiles | FileData | None) -> str | list[str] | None:
        """The upload's path, or a list of paths where several files are allowed."""
        if payload is None:
            return None
        files = payload.root if isinstance(payload, ListFiles) else [payload]
        paths = [file.path for file in files]
        return paths if self.file_count == "multiple" else paths[0]

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Refuses addresses, see `_check_uploaded`."""
        _check_uploaded(url_or_file_path)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


def _check_uploaded(path: str | Path | None) -> None:
    # Gradio would fetch what lies there, of any size.
    if path is not None and str(path).lower().startswith(("http:", "https:")):
        raise gr.Error("Addresses of files are not fetched here; upload the file itself.", print_exception=False)
