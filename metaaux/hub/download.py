"""Fetching pipelines and networks from the Hugging Face Hub into its cache."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .card import CARD, card_files
from .layout import CONFIG, INDEX, WEIGHTS, check_components, check_model_index, has_variant, variant_files

#: What callers may say about a download, as [`huggingface_hub.snapshot_download`] takes it.
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def is_hub_id(name: object) -> bool:
    """Whether this is a text of the form "organisation/name". A path object never is."""
    if not isinstance(name, str) or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def download_pipeline(repo_id: str, variant: str | None = None, subfolder: str | None = None, **kwargs: Any) -> str:
    """Fetches a pipeline's configurations and safetensors from the Hub into the cache; returns its folder there.

    What the Hub stores under a SHA-256 is checked against it, so a file that was damaged on its way or on the disk is
    found; it is taken out of the cache. An interrupted download goes on where it stopped at the next call.

    Args:
        repo_id: Hub id.
        variant: files named `*.<variant>.safetensors` are taken where a component has them.
        subfolder: of the repository, where the pipeline is not at its top.
        **kwargs: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only` as
            [`huggingface_hub.snapshot_download`] takes them; others are ignored.

    Raises:
        OSError: the repository or revision does not exist, cannot be reached, or a file is missing or damaged.
        ValueError: the repository holds another kind of pipeline, or `subfolder` leads out of it.
    """
    options, files = _options(kwargs), _weights(variant)
    prefix = "".join(f"{part}/" for part in check_subfolder(subfolder).parts)
    # The index first: a repository of another kind costs nothing more, and the rest comes from the same commit.
    top = Path(_fetch(repo_id, [prefix + INDEX, prefix + CARD], options))
    folder = top / prefix
    modules = check_model_index(folder)
    options["revision"] = top.name
    names = [f"{prefix}{name}/" for name in modules]
    configurations = [f"{name}*.json" for name in names]
    card = folder / CARD
    beside = card_files(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else []
    _fetch(
        repo_id,
        [prefix + glob.escape(name) for name in beside]
        + configurations
        + [name + file for name in names for file in files],
        options,
    )
    without = [name for name in modules if not has_variant(folder / name, variant)]
    if variant is not None and without:
        _fetch(repo_id, [f"{prefix}{name}/{file}" for name in without for file in _weights(None)], options)
    check_components(folder, list(modules), name=repo_id)
    _check_digests(folder, list(modules), repo_id)
    return str(folder)


def download_component(repo_id: str, variant: str | None = None, **kwargs: Any) -> Path:
    """Fetches one network, which is a repository of its own; arguments and errors as `download_pipeline` has them."""
    folder = Path(
        _fetch(repo_id, [CONFIG, f"{WEIGHTS}.safetensors.index*.json", *_weights(variant)], _options(kwargs))
    )
    _check_digests(folder.parent, [folder.name], repo_id)
    return folder


def check_subfolder(subfolder: str | None) -> PurePosixPath:
    """A folder inside another one, with either system's separators.

    Raises:
        ValueError: it leads out of that one.
    """
    path = PurePosixPath((subfolder or "").replace("\\", "/").strip("/"))
    if ".." in path.parts or ":" in str(path):
        raise ValueError(f"subfolder must lie inside the repository or folder, got {subfolder!r}")
    return path


def _options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: kwargs[name] for name in DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
    if "cache_dir" in options:
        options["cache_dir"] = os.path.expanduser(options["cache_dir"])
    return options


def _weights(variant: str | None) -> list[str]:
    """Patterns of a network's files: a variant's name stands between dots, `model.fp16-00001-of-00002.safetensors`."""
    name = variant_files(variant)[0]
    return [name, name.replace(".safetensors", "-*.safetensors")]


def _fetch(repo_id: str, patterns: list[str], options: Mapping[str, Any]) -> str:
    try:
        return snapshot_download(repo_id, allow_patterns=patterns, **options)
    except LocalEntryNotFoundError as error:
        cause = " ".join(str(error).split())[:300]
        raise LocalEntryNotFoundError(f"{repo_id} is not in the cache and could not be looked up: {cause}") from error
    except GatedRepoError as error:
        raise OSError(f"{repo_id} is gated: accept its terms on the Hub and pass a token that may read it") from error
    except RepositoryNotFoundError as error:
        raise OSError(f"there is no repository {repo_id} on the Hub, or it is private: pass token=…") from error
    except RevisionNotFoundError as error:
        raise OSError(f"{repo_id} has no revision {options.get('revision')!r}") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(f"{repo_id} could not be downloaded: {cause}; the next call goes on from here") from error


def _check_digests(folder: Path, components: Sequence[str], repo_id: str) -> None:
    for path in sorted(path for name in components for path in (folder / name).glob("*.safetensors")):
        blob = path.resolve()
        if len(blob.name) != 64:  # the cache names a large file by the SHA-256 under which the Hub stores it
            continue
        digest = hashlib.sha256()
        with blob.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        digest = digest.hexdigest()
        if digest != blob.name:
            what = f"{path.parent.name}/{path.name} of {repo_id} is damaged (SHA-256 {digest[:12]}…, expected "
            what += f"{blob.name[:12]}…)"
            try:
                path.unlink()
                blob.unlink(missing_ok=True)
            except OSError as error:
                raise OSError(f"{what} and could not be removed from the cache ({error}); delete {blob}") from error
            raise OSError(f"{what}; it was removed from the cache, load again to download it anew")
