"""Saving pipelines and publishing them on the Hugging Face Hub."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from ..files import forget_origin, write_json, write_text
from ..models.weights import ORIGIN, cast, check_finite, origin_of, unwrapped, without_wrappers
from .card import CARD, PICTURES, PLACEHOLDER, card_of, updated_card
from .download import check_subfolder, is_hub_id
from .layout import (
    CONFIG,
    INDEX,
    NETWORKS,
    PIPELINE,
    WEIGHTS,
    check_components,
    check_model_index,
    has_variant,
    read_json,
    variant_files,
)

_VARIANT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class PublishingMixin:
    """Saving and publishing of a `DiffusionPipeline` of this project's networks."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        safe_serialization: bool = True,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves every component, the index and the model card.

        What the folder holds is replaced once everything is written, so that a pipeline may be saved where it was
        loaded from, and other variants stay. The generator's fingerprint is written into its configuration.

        Args:
            save_directory: the folder, made if missing; `~` is the home folder.
            variant: names the weight files; "fp16" and "bf16" also store them in that precision, in half the bytes.
            max_shard_size: weights larger than this are split into files of at most this size, for example "15MB".
            safe_serialization: must stay True: other weight files are pickles.
            dtype: precision of the weights in the files. Default: as `variant` says, else the pipeline's own.
            **kwargs: see [`~diffusers.DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: a component's class is not of this package, so that nothing could load it again, or it has
                weights that are not finite.
            OverflowError: a weight is too large for the precision.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must stay True: other weight files are pickles, which can run code")
        variant_files(variant)  # must be a word
        if kwargs.pop("push_to_hub", False):
            raise ValueError("call push_to_hub(repo_id) to publish a pipeline")
        for name, network in self.components.items():
            if network is not None:
                _check_class(name, type(unwrapped(network)))
                if any(tensor.is_meta for tensor in network.parameters()):
                    raise ValueError(f"the {name}'s weights are offloaded: call remove_all_hooks() before saving")
                check_finite(network, name)
        origin = origin_of(self.generator)
        pipeline = self._to_be_saved(dtype or _VARIANT_DTYPES.get(variant))
        folder = Path(os.path.expanduser(save_directory))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            temporary = Path(temporary)
            super(PublishingMixin, pipeline).save_pretrained(
                temporary, variant=variant, max_shard_size=max_shard_size, **kwargs
            )
            forget_origin(temporary)
            _amend(temporary / "generator" / CONFIG, {ORIGIN: origin})
            # A subclass is saved as what anyone can load; its own from_pretrained takes it too.
            _amend(temporary / INDEX, {"_class_name": PIPELINE})
            write_text(card_of(self), temporary / CARD)
            for name, content in self.card_files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
            _move_into(temporary, folder, variant)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        variants: Sequence[str | None] = (None, "fp16"),
        revision: str | None = None,
        subfolder: str | None = None,
        max_shard_size: int | str | None = None,
        license: str | None = None,
        base_models: Sequence[str] | None = None,
        tags: Sequence[str] | None = None,
        figures: Mapping[str, float | str] | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        token: str | None = None,
    ) -> str:
        """Publishes the pipeline with its model card in one commit; makes the repository if there is none.

        Args:
            repo_id: Hub id, "organisation/name".
            variants: weights to upload: `None` in the pipeline's own precision, "fp16" in half the bytes.
            revision: branch to commit to; made if missing. Default: main.
            subfolder: of the repository.
            max_shard_size: see `save_pretrained`.
            license: licence of the weights for the card's front matter, as the Hub names it.
            base_models: Hub ids of models that these weights were made from.
            tags: added to the card's tags.
            figures: measured results by name, a table in the card.
            commit_message: of the commit.
            private: whether a new repository is private.
            create_pr: open a pull request instead of committing.
            token: that may write to the repository. Default: the one of `hf auth login`.

        Returns:
            Address of the commit.

        Raises:
            OSError: the Hub cannot be reached or refuses; nothing has been committed.
        """
        if not variants:
            raise ValueError("variants is empty: there is nothing to upload")
        with tempfile.TemporaryDirectory() as folder:
            for variant in variants:
                self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            card = updated_card(ModelCard(card_of(self, repo_id)), repo_id, license, base_models, tags, figures)
            write_text(card, Path(folder, CARD))
            message = commit_message or f"Upload {type(self).__name__}"
            subfolder = subfolder and str(check_subfolder(subfolder))
            api = HfApi(token=token)
            upload = functools.partial(
                api.upload_folder,
                folder_path=folder,
                path_in_repo=subfolder,
                revision=revision,
                commit_message=message,
                create_pr=create_pr,
            )
            return _commit(api, upload, repo_id, revision, private)

    def _to_be_saved(self, dtype: torch.dtype | None):
        """A pipeline like this one, its networks without wrappers and, where a precision is given, copies in it."""
        networks = {
            name: None if network is None else without_wrappers(network) for name, network in self.components.items()
        }
        if dtype is not None:
            networks = {
                name: None if network is None else cast(copy.deepcopy(network), name, dtype)
                for name, network in networks.items()
            }
        pipeline = copy.copy(self)
        # Anew: an optional component that was set later than the others is not in the index otherwise.
        pipeline.register_modules(**networks)
        return pipeline


#: A component's weights of all variants, and the indices of those in several files.
_ANY_WEIGHTS = re.compile(rf"{WEIGHTS}[\w.-]*(\.safetensors|\.index[\w.]*\.json)")


def files_to_push(folder: str | os.PathLike, variant: str | None = None) -> list[str]:
    """What a pipeline's folder holds of a pipeline, as paths inside of it: index, card, licence, configurations,
    weights, and the card's pictures. Whatever else lies there stays out.

    Args:
        folder: of the pipeline.
        variant: of the weights only those of this variant, where a component has it. Default: all.

    Raises:
        FileNotFoundError: index, configurations or weights are missing; no component has the variant.
        ValueError: it is another kind of pipeline, or `variant` is no word.
    """
    folder = Path(folder)
    names = list(check_model_index(folder))
    check_components(folder, names)
    if variant is not None and not any(has_variant(folder / name, variant) for name in names):
        raise FileNotFoundError(f"{folder} has no weights of the variant {variant!r} ({variant_files(variant)[0]})")
    found = [folder / INDEX, folder / CARD, *sorted(folder.glob("LICENSE*"))]
    for place in (folder, *(path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in names)):
        found += [path for path in sorted(place.iterdir()) if path.suffix.lower() in PICTURES]
    for name in names:
        place = folder / name
        weights = _weights_of(variant if has_variant(place, variant) else None) if variant else _ANY_WEIGHTS
        found += [path for path in sorted(place.iterdir()) if path.name == CONFIG or weights.fullmatch(path.name)]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    variant: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Publishes a saved pipeline as it stands, in one commit; makes the repository if there is none.

    Of its card, which must be there, only the name that an unpublished one has is replaced by `repo_id`.

    Args:
        folder: of the pipeline; which of its files are published is for `files_to_push` to say.
        repo_id: Hub id, "organisation/name".
        variant: see `files_to_push`.
        revision, commit_message, private, token: as `PublishingMixin.push_to_hub` takes them.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError, ValueError: as `files_to_push`, there is no card, or `repo_id` is none.
        OSError: the Hub cannot be reached or refuses; nothing has been committed.
    """
    if not is_hub_id(repo_id):
        raise ValueError(f"ids on the Hub have the form organisation/name, got {repo_id!r}")
    folder, files = Path(folder), files_to_push(folder, variant)
    if CARD not in files:
        raise FileNotFoundError(f"{folder} has no model card ({CARD}), which says what its weights may be used for")
    card = (folder / CARD).read_text(encoding="utf-8").replace(f'"{PLACEHOLDER}"', f'"{repo_id}"').encode("utf-8")
    api = HfApi(token=token)

    def upload(repo_id: str) -> CommitInfo:
        # Made at each call: huggingface_hub allows an operation one commit.
        operations = [CommitOperationAdd(name, card if name == CARD else folder / name) for name in files]
        message = commit_message or "Upload MetaAuxInverter"
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)

    return _commit(api, upload, repo_id, revision, private)


def _check_class(name: str, cls: type) -> None:
    module = cls.__module__
    if not module.startswith(NETWORKS) or getattr(importlib.import_module(module), cls.__name__, None) is not cls:
        base = next((base.__name__ for base in cls.__mro__ if base.__module__.startswith(NETWORKS)), "component")
        raise ValueError(
            f"the pipeline's {name} is a {module}.{cls.__name__}, which nobody could load again: only classes of "
            f"metaaux.models can be saved. Put its weights into a {base} first, or save it by itself and give it to "
            f"from_pretrained(…, {name}=…)"
        )


def _weights_of(variant: str | None) -> re.Pattern[str]:
    """Names of a component's files of one variant; `None`: those without a variant's name."""
    marks = rf"\.{re.escape(variant)}" if variant else ""
    return re.compile(rf"{WEIGHTS}({marks}(-\d+-of-\d+)?\.safetensors|\.safetensors\.index{marks}\.json)")


def _amend(path: Path, entries: Mapping[str, Any]) -> None:
    write_json(dict(sorted({**read_json(path), **entries}.items())), path)


def _move_into(source: Path, folder: Path, variant: str | None) -> None:
    """Moves a freshly saved pipeline over an older one, whose weights of the same variant go."""
    for path in sorted(source.rglob("*")):
        if path.is_dir():
            (folder / path.relative_to(source)).mkdir(exist_ok=True)
    written = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    # The index last: where it is new, so is everything it speaks of.
    for path in sorted(written, key=lambda path: path.name == INDEX):
        os.replace(source / path, folder / path)
    same = _weights_of(variant)
    for place in {path.parent for path in written if path.parent != Path()}:
        for old in (folder / place).iterdir():
            if same.fullmatch(old.name) and place / old.name not in written:
                old.unlink()


def _commit(
    api: HfApi, upload: Callable[..., CommitInfo], repo_id: str, revision: str | None, private: bool | None
) -> str:
    """Uploads in one commit, making repository and branch if need be; returns the commit's address."""
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = upload(repo_id=repo_id)
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(f"{repo_id} could not be published: {cause}; nothing was committed") from error
    return commit.commit_url
