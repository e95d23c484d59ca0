"""Settings, read once: defaults < headgate.toml < environment. Frozen afterwards.

`load` raises ConfigError naming file, key and reason; nothing starts on a setting that is not understood.
"""

from headgate.config.check_apps import check_apps
from headgate.config.load import BUILT_IN, catalogue_path, data_dir, demo_model_path, load, read_document
from headgate.config.settings import (
    ACCOUNT_NAME,
    DEFAULT_APP,
    MODEL_NAME,
    Algorithm,
    AppSettings,
    BillingSettings,
    ConfigError,
    DeploymentSettings,
    DeveloperSettings,
    Document,
    EmbeddedSettings,
    FileSettings,
    LimitSettings,
    LogSettings,
    Margins,
    ModelSettings,
    ProviderKind,
    ProviderSettings,
    RoutingSettings,
    ServerSettings,
    Settings,
    TemplateSettings,
    TokenSettings,
)
from headgate.config.specs import model_spec, retired_rows
from headgate.config.templates import template_of

__all__ = [
    "ACCOUNT_NAME",
    "BUILT_IN",
    "DEFAULT_APP",
    "MODEL_NAME",
    "Algorithm",
    "AppSettings",
    "BillingSettings",
    "ConfigError",
    "DeploymentSettings",
    "DeveloperSettings",
    "Document",
    "EmbeddedSettings",
    "FileSettings",
    "LimitSettings",
    "LogSettings",
    "Margins",
    "ModelSettings",
    "ProviderKind",
    "ProviderSettings",
    "RoutingSettings",
    "ServerSettings",
    "Settings",
    "TemplateSettings",
    "TokenSettings",
    "catalogue_path",
    "check_apps",
    "data_dir",
    "demo_model_path",
    "load",
    "model_spec",
    "read_document",
    "retired_rows",
    "template_of",
]
