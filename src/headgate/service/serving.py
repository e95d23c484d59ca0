"""What is served now: a catalogue and the providers behind it, replaced as one by a reload."""

from collections.abc import Mapping

from headgate.core.models import Catalog, ModelSpec
from headgate.core.ports import Provider
from headgate.service.circuits import Circuits


class Served:
    """One state of it. Requests keep the one that they began with."""

    def __init__(self, catalog: Catalog, providers: Mapping[str, Provider]) -> None:
        self.catalog = catalog
        self.providers = providers

    def unavailable(self, spec: ModelSpec) -> str | None:
        """Why the model cannot be called at all, or None; one deployment that can is enough."""
        reasons = [self.providers[one.provider].unavailable(one) for one in spec.deployments or (spec,)]
        return reasons[0] if all(reasons) else None

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
        """Why the model cannot be called now, or None."""
        return self.now.unavailable(spec) or self.circuits.reason(spec)
