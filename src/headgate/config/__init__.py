"""Settings, read once: defaults < headgate.toml < environment. Frozen afterwards.

`load` raises ConfigError naming file, key and reason; nothing starts on a setting that is not understood.
"""

from headgate.config.checks import check_apps
from headgate.config.load import catalogue_path, data_dir, demo_model_path, load, model_spec, read_document
from headgate.config.settings import (
    ACCOUNT_NAME,
    DEFAULT_APP,
    MODEL_NAME,
    Algorithm,
    AppSettings,
    BillingSettings,
    ConfigError,
    DeveloperSettings,
    Document,
    EmbeddedSettings,
    LimitSettings,
    LogSettings,
    Margins,
    ModelSettings,
    ProviderKind,
    ProviderSettings,
    ServerSettings,
    Settings,
    TokenSettings,
)

__all__ = [
    "ACCOUNT_NAME",
    "DEFAULT_APP",
    "MODEL_NAME",
    "Algorithm",
    "AppSettings",
    "BillingSettings",
    "ConfigError",
    "DeveloperSettings",
    "Document",
    "EmbeddedSettings",
    "LimitSettings",
    "LogSettings",
    "Margins",
    "ModelSettings",
    "ProviderKind",
    "ProviderSettings",
    "ServerSettings",
    "Settings",
    "TokenSettings",
    "catalogue_path",
    "check_apps",
    "data_dir",
    "demo_model_path",
    "load",
    "model_spec",
    "read_document",
]
