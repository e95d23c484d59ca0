"""What is served now: a catalogue and the providers behind it, replaced as one by a reload."""

from collections.abc import Callable, Mapping

from headgate.core.models import Catalog, ModelSpec
from headgate.core.ports import Provider
from headgate.service.circuits import Circuits


class Served:
    """One state of it. Requests keep the one that they began with."""

    def __init__(self, catalog: Catalog, providers: Mapping[str, Provider]) -> None:
        self.catalog = catalog
        self.providers = providers

    def unavailable(self, spec: ModelSpec) -> str | None:
        """Why nothing can answer for the model, or None; one deployment or fallback that can is enough."""
        return self.reason(spec, self._unusable)

    def reason(self, spec: ModelSpec, of: Callable[[ModelSpec], str | None]) -> str | None:
        """The first deployment's reason, where all that may serve the model have one."""
        entries = (spec, *map(self.catalog.resolve, spec.fallbacks))
        reasons = [of(one) for entry in entries for one in (entry.deployments or (entry,))]
        return reasons[0] if all(reasons) else None

    def _unusable(self, spec: ModelSpec) -> str | None:
        return self.providers[spec.provider].unavailable(spec)

    def callable_models(self) -> str:
        """Names of models that can be called, for an error's advice; at most ten."""
        names = [spec.name for spec in self.catalog.models if self.unavailable(spec) is None]
        return ", ".join(names[:10]) + (", …" if len(names) > 10 else "") if names else "none"


class Serving:
    """`now` is what is served."""

    def __init__(self, catalog: Catalog, providers: Mapping[str, Provider], circuits: Circuits) -> None:
        self.now = Served(catalog, providers)
        self.circuits = circuits

    def replace(self, catalog: Catalog, providers: Mapping[str, Provider]) -> Served:
        """Serve these from now on; returns what was served until now."""
        before, self.now = self.now, Served(catalog, providers)
        return before

    def unavailable(self, spec: ModelSpec) -> str | None:
        """Why nothing can answer for the model now, or None."""
        return self.now.reason(spec, self._why_not)

    def _why_not(self, spec: ModelSpec) -> str | None:
        return self.now.providers[spec.provider].unavailable(spec) or self.circuits.reason(spec)
