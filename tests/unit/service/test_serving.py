"""What can be called now, and why something cannot."""

from tests.support.clock import ManualClock
from tests.support.workbench import spec

from headgate.config import RoutingSettings
from headgate.core.errors import UpstreamFailed
from headgate.core.models import Catalog, ModelSpec
from headgate.providers.fake import Fake
from headgate.service.circuits import Circuits
from headgate.service.serving import Serving

RULES = RoutingSettings(breaker_failures=1)


def serving(*models: ModelSpec, **reasons: str) -> Serving:
    providers = {name: Fake(name, reason=reasons.get(name)) for name in ("one", "two", "three")}
    return Serving(Catalog(models), providers, Circuits(RULES, ManualClock()))


def test_one_deployment_that_works_is_enough() -> None:
    one, two = spec(provider="one"), spec(provider="two")
    both = spec(provider="one", deployments=(one, two))
    place = serving(both, one="set ONE_KEY")
    assert place.unavailable(both) is None
    place.circuits.of(two).failed(0, UpstreamFailed("broken"))
    assert place.unavailable(both) == "set ONE_KEY"


def test_a_fallback_that_works_is_enough() -> None:
    main, spare = spec(provider="one", fallbacks=("spare",)), spec("spare", "two")
    assert serving(main, spare, one="set ONE_KEY").unavailable(main) is None
    assert serving(main, spare, one="set ONE_KEY", two="set TWO_KEY").unavailable(main) == "set ONE_KEY"


def test_an_open_circuit_is_a_reason() -> None:
    place = serving(model := spec(provider="one"))
    place.circuits.of(model).failed(0, UpstreamFailed("broken"))
    assert "left alone for a while" in (place.unavailable(model) or "")


def test_a_replaced_catalogue_is_what_counts_from_then_on() -> None:
    place = serving(spec("old", "one"))
    new, providers = Catalog([spec("new", "two")]), {"two": Fake("two")}
    before = place.replace(new, providers)
    assert (place.now.catalog, place.now.providers) == (new, providers)
    assert [model.name for model in before.catalog.models] == ["old"]
    assert place.now.callable_models() == "new"
