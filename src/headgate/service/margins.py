"""Which gross margin a request bears: the app's, else the model's, else the installation's; or its own override."""

from collections.abc import Mapping

from headgate.config import Margins
from headgate.core.accounts import App
from headgate.core.completion import CompletionRequest
from headgate.core.errors import InvalidRequest
from headgate.core.models import ModelSpec
from headgate.core.money import MarginPPM, margin_percent, margin_ppm, text


class MarginRules:
    def __init__(self, margins: Margins, apps: Mapping[str, App]) -> None:
        self._margins = margins
        self._apps = {
            name: margin_ppm(app.margin_percent)
            for name, app in apps.items()
            if app.margin_percent is not None
        }

    def margin_for(self, request: CompletionRequest, spec: ModelSpec) -> MarginPPM:
        """The margin in millionths. InvalidRequest when an override is outside [floor, cap]."""
        default = self._margins.default if spec.margin is None else spec.margin
        if request.app is not None:
            default = self._apps.get(request.app, default)
        if request.margin_override is None:
            return default
        floor = default if self._margins.floor is None else self._margins.floor
        override = margin_ppm(request.margin_override)
        if not floor <= override <= self._margins.cap:
            allowed = f"{text(margin_percent(floor))} to {text(margin_percent(self._margins.cap))}"
            raise InvalidRequest(
                f"overrideGrossMarginPercent must be {allowed} here, not {text(request.margin_override)}.",
                param="overrideGrossMarginPercent",
                allowed=allowed,
            )
        return override
