"""Tokenizers for clients that ask for them by themselves: which model's, and what it answers."""

from headgate.core.errors import InvalidRequest, ModelUnavailable
from headgate.core.models import ModelSpec
from headgate.core.ports import Tokenizer
from headgate.service.serving import Serving


class Tokenizing:
    """Finds the tokenizer of a model."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def of(self, name: str | None) -> tuple[Tokenizer, ModelSpec]:
        """The tokenizer of the named model; without a name, that of the first model that has one and works.

        UnknownModel, AmbiguousModel; InvalidRequest where the model's tokenizer is not at hand; ModelUnavailable.
        """
        if name is None:
            return self._first()
        spec = self._serving.now.catalog.resolve(name)
        provider = self._serving.now.providers[spec.provider]
        if provider.tokenizer is None:
            raise InvalidRequest(
                f"The tokenizer of the model {spec.name} is not at hand; models with one: {self._names()}.",
                param="model",
            )
        reason = provider.unavailable(spec)
        if reason is not None:
            raise ModelUnavailable(f"The model {spec.name} is not available: {reason}.", param="model")
        return provider.tokenizer, spec

    def _first(self) -> tuple[Tokenizer, ModelSpec]:
        for spec in self._serving.now.catalog.models:
            provider = self._serving.now.providers[spec.provider]
            if provider.tokenizer is not None and provider.unavailable(spec) is None:
                return provider.tokenizer, spec
        raise ModelUnavailable("No model with a tokenizer is available.", param="model")

    def _names(self) -> str:
        names = [
            spec.name
            for spec in self._serving.now.catalog.models
            if self._serving.now.providers[spec.provider].tokenizer is not None
        ]
        return ", ".join(names[:10]) or "none"
