"""From and to the Hugging Face Hub: loading, publishing, model cards."""

from __future__ import annotations

from ..models.weights import FingerprintCache
from .loading import LoadingMixin
from .publishing import PublishingMixin


class HubMixin(LoadingMixin, PublishingMixin):
    """The life of a `DiffusionPipeline` of this project's networks outside memory, and its copies."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and values of the generator's weights, 64 hexadecimal digits.

        Precision, device, variants of the files, saving again and wrappers such as torch.compile leave it as it is
        ([`~metaaux.models.weights.generator_fingerprint`]). Computed again once weights have been changed in place.
        """
        return self.__dict__.setdefault("_fingerprints", FingerprintCache())(self.generator)

    def __getstate__(self) -> dict[str, object]:
        """Of copies and pickles: what is made at the first use and belongs to this object alone is left out."""
        return {name: value for name, value in self.__dict__.items() if name != "_fingerprints"} | {"_aligner": None}
