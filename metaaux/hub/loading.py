"""Where pipelines come from and go to: the embedded checkpoint, folders, and the Hugging Face Hub."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..files import atomic_path, forget_origin
from ..models.weights import check_finite
from .card import CARD, generated_card, updated_card

Network = TypeVar("Network", bound=ModelMixin)

#: Name of the checkpoint that comes with the package.
EMBEDDED_MODEL = "metaaux-mini"

_INDEX = "model_index.json"
_PIPELINE = "MetaAuxInverter"
_WEIGHTS = "diffusion_pytorch_model"
_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_CONFIG = "config.json"
#: An index of a thousand shards is far below it.
_MAX_JSON_BYTES = 8 * 2**20
_VARIANT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def embedded_model_folder() -> Path:
    """Folder of the checkpoint that comes with the package, installed or run from its repository.

    Raises:
        FileNotFoundError: it is not there, as in an installation from incomplete sources.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = [parent / "hub_configs" / EMBEDDED_MODEL for parent in (package, package.parent)]
    for folder in candidates:
        if (folder / _INDEX).is_file():
            return folder
    raise FileNotFoundError(
        f"the embedded checkpoint {EMBEDDED_MODEL} is missing (looked for {' and '.join(map(str, candidates))}); "
        "reinstall the package or name a model"
    )


def check_model_index(folder: str | os.PathLike) -> dict[str, str]:
    """Checks that a folder holds one of this project's pipelines; returns the module of each component in it.

    diffusers imports whatever module a component names, so only this package's networks may be named.

    Raises:
        FileNotFoundError: there is no `model_index.json`.
        ValueError: it is damaged, is of another kind of pipeline, or names modules from outside this package.
    """
    path = Path(folder) / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline: there is no {_INDEX} in it")
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(index, dict) or index.get("_class_name") != _PIPELINE:
        raise ValueError(f"{folder} holds no {_PIPELINE}, as its {_INDEX} says")
    modules = {name: value[0] for name, value in index.items() if isinstance(value, list) and value and value[0]}
    for name, module in modules.items():
        if not str(module).startswith("metaaux.models.") or not name.isidentifier():
            raise ValueError(f"{folder} names {module!r} as the module of {name}; components come from metaaux.models")
    return modules


def check_components(folder: str | os.PathLike, components: Sequence[str], name: str | None = None) -> None:
    """Checks that configuration and weights of each component are there, every shard of them.

    Args:
        folder: of the pipeline.
        components: names of its components.
        name: what error messages call the pipeline. Default: the folder.

    Raises:
        FileNotFoundError: a file is missing.
    """
    without_weights = []
    for component in components:
        place = Path(folder, component)
        if not (place / "config.json").is_file():
            raise FileNotFoundError(f"{name or folder} lacks the component {component}: no {component}/config.json")
        for index in sorted(place.glob("*.index*.json")):
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                shards = sorted({str(shard) for shard in weight_map.values()})
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{name or folder}: {component}/{index.name} is damaged") from None
            # Indices of other variants travel along without their shards.
            present = [shard for shard in shards if (place / shard).is_file()]
            if present and present != shards:
                missing = sorted(set(shards) - set(present))
                raise FileNotFoundError(f"{name or folder} lacks {component}/{missing[0]}, a part of its weights")
        if not any(place.glob("*.safetensors")):
            without_weights.append(component)
    if len(without_weights) == len(components):
        raise FileNotFoundError(f"{name or folder} is a configuration without weights (no safetensors files)")
    if without_weights:
        raise FileNotFoundError(
            f"{name or folder} lacks the weights of {', '.join(without_weights)}: no safetensors file in the folder"
        )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may come from a stranger.

    Raises:
        ValueError: it is larger than any of this project's, is no JSON, or holds something else than an object.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_JSON_BYTES // 2**20} MiB")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def load_component(
    cls: type[Network] | tuple[type[Network], ...],
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    trainable: bool = False,
    allow_hub: bool = False,
    **kwargs: Any,
) -> Network:
    """Loads one network from its folder: configuration and safetensors, whatever else lies there.

    Args:
        cls: the network's class, or several of which the configuration names one.
        path: folder of the network; `~` is the home folder.
        dtype: precision of the weights in memory, whatever the files have.
        variant: reads `*.<variant>.safetensors`.
        trainable: in training mode, with gradients. Default: in eval mode, without.
        allow_hub: whether a text that names no folder is a Hub id ("organisation/name"). Otherwise nothing is ever
            asked of the Hub.
        **kwargs: for a Hub id `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, as
            [`huggingface_hub.snapshot_download`] takes them.

    Raises:
        FileNotFoundError: there is no such folder, or no configuration or safetensors file in it.
        ValueError: the folder holds a network of another class, or one whose tensors are not those of its
            configuration or not finite.
        OverflowError: a weight is too large for `dtype`.
        OSError: a file is damaged, or the Hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if not (allow_hub and isinstance(path, str) and _is_hub_id(path)):
            raise FileNotFoundError(f"there is no folder {folder}, where a network was expected")
        options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
        marks = f".{variant}" if variant else ""
        weights = [f"{_WEIGHTS}{marks}{part}.safetensors" for part in ("", "-*")]
        folder = Path(_fetch(path, [_CONFIG, *weights, "*.safetensors.index*.json"], options))
    cls = _class_of(folder, cls if isinstance(cls, tuple) else (cls,))
    _check_weights(folder, variant)
    # Parameters made inside a caller's inference_mode could never be adapted.
    with torch.inference_mode(False):
        try:
            network, found = cls.from_pretrained(
                folder,
                dtype=torch.float32,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}: weights and {_CONFIG} do not fit together: {str(error)[:300]}") from None
        wrong = {key: sorted(map(str, found[key]))[:3] for key in ("missing_keys", "unexpected_keys") if found[key]}
        if wrong:
            raise ValueError(f"{folder}: weights and {_CONFIG} do not fit together: {wrong}")
        check_finite(network, str(folder), dtype)
        network.to(dtype)
    return network.train(trainable).requires_grad_(trainable)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _class_of(folder: Path, classes: tuple[type[Network], ...]) -> type[Network]:
    """That of `classes` which a network's configuration names."""
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no network: there is no {_CONFIG} in it")
    config = _read_json(folder / _CONFIG)
    named = {cls.__name__: cls for cls in classes}
    if config.get("_class_name") not in named:
        raise ValueError(f"{folder} holds a {str(config.get('_class_name'))[:80]}, expected {' or '.join(named)}")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder} holds quantised weights, which these networks cannot have")
    return named[config["_class_name"]]


def _check_weights(folder: Path, variant: str | None) -> None:
    marks = f".{variant}" if variant else ""
    names = (f"{_WEIGHTS}{marks}.safetensors", f"{_WEIGHTS}.safetensors.index{marks}.json")
    if not any((folder / name).is_file() for name in names):
        present = sorted(path.name for path in folder.glob("*.safetensors"))[:4]
        raise FileNotFoundError(
            f"{folder} lacks {names[0]}"
            + (f"; it has {', '.join(present)}" if present else ": no safetensors file is in it")
            + (" (other weight files are pickles, which are not read)" if any(folder.glob("*.bin")) else "")
        )


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
        ValueError: the repository holds another kind of pipeline.
    """
    options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    # The index first: a repository of another kind costs nothing more, and the rest comes from the same commit.
    top = Path(_fetch(repo_id, [prefix + _INDEX, prefix + CARD], options))
    folder = top / prefix
    modules = check_model_index(folder)
    options["revision"] = top.name
    names = [f"{prefix}{name}/" for name in modules]
    configurations = [f"{name}*.json" for name in names]
    # A variant's name stands between dots: `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`.
    plain = [f"{name}{_WEIGHTS}{part}.safetensors" for name in names for part in ("", "-*")]
    if variant is None:
        _fetch(repo_id, configurations + plain, options)
    else:
        named = [f"{name}{_WEIGHTS}.{variant}{part}.safetensors" for name in names for part in ("", "-*")]
        _fetch(repo_id, configurations + named, options)
        without = [name for name in modules if not any((folder / name).glob(f"*.{variant}*.safetensors"))]
        if without:
            starts = tuple(f"{prefix}{name}/" for name in without)
            _fetch(repo_id, [pattern for pattern in plain if pattern.startswith(starts)], options)
    check_components(folder, list(modules), name=repo_id)
    _check_digests(folder, list(modules), repo_id)
    return str(folder)


def _fetch(repo_id: str, patterns: list[str], options: Mapping[str, Any]) -> str:
    try:
        return snapshot_download(repo_id, allow_patterns=patterns, **options)
    except LocalEntryNotFoundError:
        raise
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
            path.unlink()
            blob.unlink(missing_ok=True)
            raise OSError(
                f"{path.parent.name}/{path.name} of {repo_id} is damaged (SHA-256 {digest[:12]}…, expected "
                f"{blob.name[:12]}…); it was removed from the cache, load again to download it anew"
            )


class HubMixin:
    """Loading, saving and publishing of a `DiffusionPipeline` of this project's networks."""

    #: Text of the model card that the pipeline was loaded with.
    card: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *,
        subfolder: str | None = None,
        **kwargs: Any,
    ):
        """Loads a pipeline for inference: in eval mode, its parameters without gradients.

        Args:
            pretrained_model_name_or_path: Hub id or folder. Default: the checkpoint that comes with the package,
                `"metaaux-mini"`, which needs no network.
            subfolder: of the repository or folder, where the pipeline is not at its top.
            **kwargs: those of [`~diffusers.DiffusionPipeline.from_pretrained`], among them `revision`, `token`,
                `cache_dir`, `local_files_only` and `force_download`. `dtype` is float32 unless
                given, whatever precision the files have; a half precision is for GPUs and applies to generator and
                discriminator, while the small networks, whose gradients or embeddings need it, stay in float32.
                `variant="fp16"` picks files named so. Weights are read from safetensors files only.

        Raises:
            ValueError: the folder or repository holds another kind of pipeline, or names components from outside
                this package.
            OSError: files are missing or damaged, or the Hub cannot be reached.
        """
        name = pretrained_model_name_or_path
        embedded = name is None or (name == EMBEDDED_MODEL and not os.path.isdir(name))
        if embedded:
            name = EMBEDDED_MODEL
        # `torch_dtype` is the older name of diffusers' `dtype`.
        dtype = kwargs.pop("torch_dtype", None) or kwargs.get("dtype") or torch.float32
        if isinstance(dtype, torch.dtype):
            dtype = {"generator": dtype, "discriminator": dtype, "default": torch.float32}
        kwargs["dtype"] = dtype
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors must stay True: other weight files are pickles, which can run code")
        options = {option: kwargs.pop(option) for option in _DOWNLOAD_OPTIONS if option in kwargs}
        if embedded or os.path.isdir(name):
            folder = Path(embedded_model_folder() if embedded else name, subfolder or "")
            check_components(folder, list(check_model_index(folder)))
        elif str(name).count("/") > 1:
            raise ValueError(f"{str(name)!r} is neither a valid local path nor a valid repo id")
        else:
            folder = Path(cls.download(str(name), kwargs.get("variant"), subfolder=subfolder, **options))
        # Parameters made inside a caller's inference_mode could never be adapted.
        with torch.inference_mode(False):
            pipeline = super().from_pretrained(folder, **kwargs)
        for component in pipeline.components.values():
            if component is not None:
                component.eval().requires_grad_(False)
        pipeline.register_to_config(_name_or_path=str(name))
        if (folder / CARD).is_file():
            pipeline.card = (folder / CARD).read_text(encoding="utf-8")
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, variant: str | None = None, **kwargs: Any) -> str:
        """Fetches a pipeline from the Hub and returns its cached folder; see [`download_pipeline`]."""
        return download_pipeline(pretrained_model_name, variant, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Saves every component, the index and the model card.

        Args:
            save_directory: the folder, made if missing.
            variant: names the weight files; "fp16" and "bf16" also store them in that precision, in half the bytes.
            max_shard_size: weights larger than this are split into files of at most this size, for example "15MB".
            safe_serialization: must stay True: other weight files are pickles.
            **kwargs: see [`~diffusers.DiffusionPipeline.save_pretrained`].
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must stay True: other weight files are pickles, which can run code")
        if kwargs.pop("push_to_hub", False):
            raise ValueError("call push_to_hub(repo_id) to publish a pipeline")
        pipeline = self._in_precision(_VARIANT_DTYPES[variant]) if variant in _VARIANT_DTYPES else self
        super(HubMixin, pipeline).save_pretrained(
            save_directory, variant=variant, max_shard_size=max_shard_size, **kwargs
        )
        forget_origin(save_directory)
        with atomic_path(Path(save_directory, CARD)) as temporary:
            temporary.write_text(self.card or generated_card(self), encoding="utf-8")

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
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            for variant in variants:
                self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            card = updated_card(
                ModelCard(self.card or generated_card(self, repo_id)), repo_id, license, base_models, tags, figures
            )
            Path(folder, CARD).write_text(card, encoding="utf-8")
            try:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    path_in_repo=subfolder,
                    revision=revision,
                    commit_message=commit_message or f"Upload {type(self).__name__}",
                    create_pr=create_pr,
                )
            except (HfHubHTTPError, httpx2.HTTPError) as error:
                cause = " ".join(str(error).split())[:300] or type(error).__name__
                raise OSError(f"{repo_id} could not be published: {cause}; nothing was committed") from error
        return commit.commit_url

    def _in_precision(self, dtype: torch.dtype):
        """A pipeline like this one whose networks are copies in another precision."""
        networks = {
            name: None if network is None else copy.deepcopy(network).to(dtype)
            for name, network in self.components.items()
        }
        settings = {name: value for name, value in self.config.items() if name not in networks and name[0] != "_"}
        return type(self)(**networks, **settings)
