"""Loading networks and pipelines for inference, from folders and from the Hugging Face Hub."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin

from ..models.weights import REDUCIBLE, cast, weight_dtype
from .card import CARD, card_files
from .download import DOWNLOAD_OPTIONS, check_subfolder, download_component, download_pipeline, is_hub_id
from .layout import CONFIG, INDEX, check_components, check_model_index, has_variant, read_json, variant_files

Network = TypeVar("Network", bound=ModelMixin)

#: Name of the checkpoint that comes with the package.
EMBEDDED_MODEL = "metaaux-mini"


def embedded_model_folder(name: str = EMBEDDED_MODEL) -> Path:
    """Folder of the checkpoint that comes with the package, installed or run from its repository.

    Args:
        name: of another one of the package's, such as "metaaux-ffhq", which has no weights.

    Raises:
        FileNotFoundError: it is not there, as in an installation from incomplete sources.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = [parent / "hub_configs" / name for parent in (package, package.parent)]
    for folder in candidates:
        if (folder / INDEX).is_file():
            return folder
    raise FileNotFoundError(
        f"the embedded checkpoint {name} is missing (looked for {' and '.join(map(str, candidates))}); "
        "reinstall the package or name a model"
    )


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
    if unknown := kwargs.keys() - set(DOWNLOAD_OPTIONS):
        raise TypeError(f"load_component takes no {', '.join(sorted(unknown))}")
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        if not (allow_hub and is_hub_id(path)):
            raise FileNotFoundError(f"there is no folder {folder}, where a network was expected")
        folder = download_component(path, variant, **kwargs)
    cls = _class_of(folder, cls if isinstance(cls, tuple) else (cls,))
    _check_weights(folder, variant)
    # Parameters made inside a caller's inference_mode could never be adapted.
    with torch.inference_mode(False):
        network = _read(cls, folder, variant)
        cast(network, str(folder), dtype)
    return network.train(trainable).requires_grad_(trainable)


def _read(cls: type[Network], folder: Path, variant: str | None) -> Network:
    """A network in float32, whose precision is reduced afterwards: its fingerprint is that of the whole numbers."""
    try:
        network, found = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            disable_mmap=os.name == "nt",  # where a mapped file could not be replaced by saving
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: weights and {CONFIG} do not fit together: {str(error)[:300]}") from None
    wrong = {key: sorted(map(str, found[key]))[:3] for key in ("missing_keys", "unexpected_keys") if found[key]}
    if wrong:
        raise ValueError(f"{folder}: weights and {CONFIG} do not fit together: {wrong}")
    return network


def _class_of(folder: Path, classes: tuple[type[Network], ...]) -> type[Network]:
    """That of `classes` which a network's configuration names."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no network: there is no {CONFIG} in it")
    config = read_json(folder / CONFIG)
    named = {cls.__name__: cls for cls in classes}
    if config.get("_class_name") not in named:
        raise ValueError(f"{folder} holds a {str(config.get('_class_name'))[:80]}, expected {' or '.join(named)}")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder} holds quantised weights, which these networks cannot have")
    return named[config["_class_name"]]


def _check_weights(folder: Path, variant: str | None) -> None:
    if has_variant(folder, variant):
        return
    present = sorted(path.name for path in folder.glob("*.safetensors"))[:4]
    raise FileNotFoundError(
        f"{folder} lacks {variant_files(variant)[0]}"
        + (f"; it has {', '.join(present)}" if present else ": no safetensors file is in it")
        + (" (other weight files are pickles, which are not read)" if any(folder.glob("*.bin")) else "")
    )


def component_dtypes(dtype: torch.dtype | str | Mapping[str, Any] | None) -> Mapping[str, torch.dtype]:
    """Precision by component ("default": of the others) that a `dtype` of `from_pretrained` or `to` asks for.

    Args:
        dtype: of `REDUCIBLE`, while the small networks stay in float32; or already a mapping. Texts such as
            "bfloat16", "torch.float16" and "fp16" are names of precisions; "auto" and `None` are float32.

    Raises:
        ValueError: it is no precision that the networks compute in.
    """
    if isinstance(dtype, Mapping):
        return {name: weight_dtype(value) for name, value in dtype.items()}
    return {**dict.fromkeys(REDUCIBLE, weight_dtype(dtype)), "default": torch.float32}


def load_components(
    folder: Path, dtypes: Mapping[str, torch.dtype], variant: str | None = None, given: Mapping[str, Any] | None = None
) -> dict[str, ModelMixin]:
    """The networks of a pipeline's folder by name; those `given` are not read.

    Raises:
        FileNotFoundError: none of them has weights of that variant; those that lack it are read without.
        ValueError: the index names something that is no network; otherwise as `load_component`.
    """
    index = read_json(folder / INDEX)
    names = [name for name in check_model_index(folder) if name not in (given or {})]
    if variant is not None and names and not any(has_variant(folder / name, variant) for name in names):
        raise FileNotFoundError(f"{folder} has no weights of the variant {variant!r} ({variant_files(variant)[0]})")
    networks = {}
    for name in names:
        module, class_name = index[name]
        cls = getattr(importlib.import_module(module), str(class_name), None)
        if not (isinstance(cls, type) and issubclass(cls, ModelMixin) and cls.__module__ == module):
            raise ValueError(f"{folder} names {class_name!r} of {module} as {name}, which is no network")
        own = variant if has_variant(folder / name, variant) else None
        dtype = dtypes.get(name, dtypes.get("default", torch.float32))
        networks[name] = load_component(cls, folder / name, dtype=dtype, variant=own)
    return networks


class LoadingMixin:
    """Loading of a `DiffusionPipeline` of this project's networks."""

    #: Text of the model card that the pipeline was loaded with.
    card: str | None = None
    #: What lay beside it and it shows or links to, by path: its licence and its pictures.
    card_files: Mapping[str, bytes] = MappingProxyType({})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Loads a pipeline for inference: in eval mode, its parameters without gradients.

        Args:
            pretrained_model_name_or_path: Hub id ("organisation/name") or folder; a path object is always a folder.
                Default: the checkpoint that comes with the package, `"metaaux-mini"`, which needs no network.
            subfolder: of the repository or folder, where the pipeline is not at its top.
            variant: picks the weight files named so, such as "fp16", where a component has them. Weights are read from
                safetensors files only.
            dtype: precision in memory, float32 unless given, whatever precision the files have. A lower one applies to
                generator and discriminator (float16: see [`~metaaux.models.eg3d.EG3DGenerator`]), while the small
                networks, whose gradients or embeddings need it, stay in float32. `torch_dtype` is its older name.
            **kwargs: those of [`~diffusers.DiffusionPipeline.from_pretrained`], among them `revision`, `token`,
                `cache_dir`, `local_files_only` and `force_download`, components and settings in place of the
                checkpoint's, and `device_map`, which takes the name of one device.

        Raises:
            ValueError: the folder or repository holds another kind of pipeline, or names components from outside
                this package; or a precision or device map that there is not.
            OverflowError: a weight is too large for `dtype`.
            OSError: files are missing or damaged, or the Hub cannot be reached.
        """
        dtypes = component_dtypes(dtype if dtype is not None else kwargs.pop("torch_dtype", None))
        kwargs.pop("torch_dtype", None)
        device = _one_device(kwargs.pop("device_map", None))
        kwargs.pop("low_cpu_mem_usage", None)  # weights are never held twice
        if kwargs.pop("use_safetensors", True) is not True:
            raise ValueError("use_safetensors must stay True: other weight files are pickles, which can run code")
        if kwargs.pop("proxies", None):
            raise ValueError("huggingface_hub takes no proxies as arguments any more: set HTTPS_PROXY, or HTTP_PROXY")
        options = {option: kwargs.pop(option) for option in DOWNLOAD_OPTIONS if option in kwargs}
        name, folder = cls._locate(pretrained_model_name_or_path, variant, subfolder, options)
        kwargs |= load_components(folder, dtypes, variant, kwargs)
        with torch.inference_mode(False):
            pipeline = super().from_pretrained(folder, **kwargs)
        for component in pipeline.components.values():
            if component is not None:
                component.eval().requires_grad_(False)
        pipeline.register_to_config(_name_or_path=name)
        if (folder / CARD).is_file():
            pipeline.card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
            beside = {name: folder / name for name in card_files(pipeline.card)}
            pipeline.card_files = {name: path.read_bytes() for name, path in beside.items() if path.is_file()}
        return pipeline if device is None else pipeline.to(device)

    @classmethod
    def _locate(
        cls, name: str | os.PathLike | None, variant: str | None, subfolder: str | None, options: Mapping[str, Any]
    ) -> tuple[str, Path]:
        """What the pipeline calls itself, and its folder: given, embedded, or downloaded."""
        if name is None or (name == EMBEDDED_MODEL and not os.path.isdir(name)):
            name, folder = EMBEDDED_MODEL, embedded_model_folder()
        elif os.path.isdir(os.path.expanduser(name)):
            folder = Path(os.path.expanduser(name))
        elif is_hub_id(name):
            return name, Path(cls.download(name, variant, subfolder=subfolder, **options))
        else:
            raise FileNotFoundError(
                f"{str(name)!r} is neither a valid local path nor a valid repo id: there is no such folder, and ids "
                "on the Hub have the form organisation/name"
            )
        folder = folder / check_subfolder(subfolder)
        check_components(folder, list(check_model_index(folder)))
        return str(name), folder

    @classmethod
    def download(cls, pretrained_model_name: str, variant: str | None = None, **kwargs: Any) -> str:
        """Fetches a pipeline from the Hub and returns its cached folder; see [`download_pipeline`]."""
        return download_pipeline(pretrained_model_name, variant, **kwargs)

    def to(self, *args: Any, **kwargs: Any):
        """Moves the pipeline to a device, and generator and discriminator to a precision.

        Arguments are those of [`~diffusers.DiffusionPipeline.to`]; the other networks are put into float32 where a
        precision is given, as `from_pretrained` loads them.

        Raises:
            ValueError: a precision in which the networks do not compute.
            OverflowError: a weight is too large for the precision.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        found = [argument for argument in args if isinstance(argument, torch.dtype)]
        if dtype is not None or found:
            dtypes = component_dtypes(dtype if dtype is not None else found[0])
            for name, network in self.components.items():
                if network is not None:
                    cast(network, name, dtypes.get(name, torch.float32))
        args = [argument for argument in args if not isinstance(argument, torch.dtype)]
        return super().to(*args, **kwargs) if args or kwargs else self


def _one_device(device_map: Any) -> torch.device | None:
    if device_map is None:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device_map takes the name of one device, such as 'cuda', got {device_map!r}: the networks are small, "
            "and each gradient step of an inversion needs all of them"
        ) from None
