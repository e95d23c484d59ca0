"""What is checked of apps and developers."""

import math
from typing import get_args

from headgate.config.checks import Checks, is_numeric
from headgate.config.settings import ACCOUNT_NAME, AppSettings, DeveloperSettings, Settings
from headgate.core import money
from headgate.core.accounts import FUNDING_ACCOUNT, PLATFORM_ACCOUNT, App, Developer, Variable, VariableType
from headgate.core.errors import AmbiguousModel, UnknownModel
from headgate.core.models import Catalog, ModelSpec


def checked_app(check: Checks, name: str, row: AppSettings) -> App:
    key = f"apps.{name}"
    if not ACCOUNT_NAME.fullmatch(name):
        raise check.fail(key, "an app's name is 1 to 64 letters, digits and . _ -")
    if row.max_tokens is not None and row.max_tokens < 1:
        raise check.fail(f"{key}.max_tokens", "must be at least 1")
    if row.temperature is not None and not 0 <= row.temperature < math.inf:
        raise check.fail(f"{key}.temperature", "must be 0 or more")
    if row.top_p is not None and not 0 <= row.top_p <= 1:
        raise check.fail(f"{key}.top_p", "must be 0 to 1")
    if not all(row.stop):
        raise check.fail(f"{key}.stop", "must be non-empty strings")
    _variables(check, key, row.variables)
    margin = None
    if row.gross_margin_percent is not None:
        margin = money.margin_percent(check.percent(f"{key}.gross_margin_percent", row.gross_margin_percent))
    return App(
        name=name,
        model=row.model,
        prompt=row.prompt,
        variables=row.variables,
        temperature=row.temperature,
        top_p=row.top_p,
        max_tokens=row.max_tokens,
        stop=row.stop,
        description=row.description,
        margin_percent=margin,
    )


def _variables(check: Checks, key: str, variables: tuple[Variable, ...]) -> None:
    if not variables:
        raise check.fail(f"{key}.variables", "an app declares at least one variable")
    names: set[str] = set()
    for index, variable in enumerate(variables):
        where = f"{key}.variables[{index}]"
        if variable.name in names:
            raise check.fail(f"{where}.name", f"{variable.name!r} is declared twice")
        names.add(variable.name)
        if variable.type not in get_args(VariableType):
            raise check.fail(f"{where}.type", "unknown type")
        if variable.type == "select" and not variable.options:
            raise check.fail(f"{where}.options", "a select variable needs options")
        if variable.max_length is not None and variable.max_length < 1:
            raise check.fail(f"{where}.max_length", "must be at least 1")
        if variable.default is not None and (problem := _wrong_default(variable)):
            raise check.fail(f"{where}.default", problem)


def checked_developer(check: Checks, name: str, row: DeveloperSettings) -> Developer:
    key = f"developers.{name}.account"
    if not ACCOUNT_NAME.fullmatch(row.account):
        raise check.fail(key, "an account's name is 1 to 64 letters, digits and . _ -")
    if row.account in (PLATFORM_ACCOUNT, FUNDING_ACCOUNT):
        raise check.fail(key, f"{row.account!r} belongs to the ledger itself")
    return Developer(id=name, account=row.account, applications=row.applications)


def check_apps(settings: Settings, catalog: Catalog) -> None:
    """Apps against the limits of their models, which for embedded ones are known only now. ConfigError."""
    check = Checks(settings.source)
    for app in settings.apps.values():
        try:
            spec = catalog.resolve(app.model)
        except (AmbiguousModel, UnknownModel) as error:
            raise check.fail(f"apps.{app.name}.model", str(error)) from None
        _against_model(check, app, spec)


def _against_model(check: Checks, app: App, spec: ModelSpec) -> None:
    """A broken model has no limits."""
    low, high = spec.temperature
    if app.temperature is not None and not low <= app.temperature <= high:
        raise check.fail(f"apps.{app.name}.temperature", f"must be {low:g} to {high:g} for {spec.name}")
    if app.max_tokens is not None and spec.broken is None and app.max_tokens > spec.max_output_tokens:
        raise check.fail(
            f"apps.{app.name}.max_tokens", f"must be at most {spec.max_output_tokens} for {spec.name}"
        )


def _wrong_default(variable: Variable) -> str | None:
    """Why clients that leave the variable out would be refused, or None."""
    default = variable.default
    if variable.type == "select":
        return None if default in variable.options else "is not among the options"
    if variable.type == "checkbox":
        return None if isinstance(default, bool) else "must be true or false"
    if variable.type == "number":
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        return None if is_number or is_numeric(default) else "must be a number"
    if not isinstance(default, str):
        return "must be a string"
    if variable.max_length is not None and len(default) > variable.max_length:
        return "is longer than max_length"
    return None
