"""The settings' types: headgate.toml as written (`Document`), and what was made of it (`Settings`)."""

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Literal

from msgspec import Struct

from headgate.core.accounts import App, Developer, Variable
from headgate.core.models import ImageURLs, Mode
from headgate.core.money import MarginPPM

ACCOUNT_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
ProviderKind = Literal["openai", "anthropic", "cohere", "embedded"]
Algorithm = Literal["HS256", "RS256", "ES256"]
Precision = Literal["auto", "stored", "float32"]


class ConfigError(Exception):
    """A setting is wrong; the message names the file, the key and the reason."""


class ServerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    env: str = "production"
    public_url: str = ""
    cors_origins: tuple[str, ...] = ("*",)
    first_chunk_wait_s: float = 5.0
    ping_interval_s: float = 10.0
    drain_deadline_s: float = 30.0
    write_timeout_s: float = 60.0
    max_body_bytes: int = 10 * 1024 * 1024
    max_choices: int = 128
    max_models: int = 16
    max_stops: int = 4
    open_tokenizer: bool = False


class TokenSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    algorithm: Algorithm = "HS256"
    secret_env: str = ""
    public_key_file: str = ""
    jwks_file: str = ""


class BillingSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    credit_usd: str = "0.0001"
    gross_margin_percent: str = "0"
    min_gross_margin_percent: str | None = None
    max_gross_margin_percent: str = "99"
    platform_share_percent: str = "0"


class EmbeddedSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The embedded engine: parallel slots and threads per model, and how many requests may wait.

    `precision` "float32" computes with the weights as 32-bit floats, so that log probabilities are exact to 1e-5, at
    four times the memory; "stored" as the file has them; "auto": float32 for files of at most 16 MiB.
    """

    slots: int = 4
    threads: int = 1
    max_queue: int = 256
    precision: Precision = "auto"


class LimitSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


class LogSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class RoutingSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is done when an upstream fails. Times in seconds.

    `retries` after the first attempt, with growing pauses between `retry_wait_s` and `retry_max_wait_s` and none once
    `deadline_s` has passed. A deployment's circuit opens after `breaker_failures` failures in a row (0: never), or when
    `breaker_error_percent` of its last `breaker_calls` calls failed; after `breaker_open_s` one call may try it.
    """

    retries: int = 2
    deadline_s: float = 600.0
    retry_wait_s: float = 0.25
    retry_max_wait_s: float = 5.0
    breaker_failures: int = 5
    breaker_error_percent: int = 50
    breaker_calls: int = 20
    breaker_open_s: float = 15.0


ACCOUNT_BYTES = 100 * 1024 * 1024


class FileSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Images that clients send, upload or name by URL. `keep_s`: how long an upload lives.

    `max_account_bytes`: all uploads of one account together; where it is not given 100 MiB, within the other bounds.
    """

    max_bytes: int = 10 * 1024 * 1024
    max_total_bytes: int = 1024 * 1024 * 1024
    max_account_bytes: int | None = None
    keep_s: float = 24 * 3600.0

    @property
    def account_bytes(self) -> int:
        if self.max_account_bytes is not None:
            return self.max_account_bytes
        return max(self.max_bytes, min(ACCOUNT_BYTES, self.max_total_bytes))


class ProviderSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One upstream service. Times in seconds; `timeout_s` is the longest silence, unless a phase has its own.

    `variant`: a row of data/variants.toml, how this OpenAI-compatible service differs. `headers` and `query` go with
    every request. `proxy` and `ca_file`, `client_cert_file`, `client_key_file` say how it is reached; `proxy_env` names
    a variable holding a proxy's URL where that has a password.
    """

    kind: ProviderKind
    base_url: str = ""
    api_key_env: str = ""
    variant: str = ""
    headers: dict[str, str] = {}
    query: dict[str, str] = {}
    timeout_s: float = 60.0
    connect_timeout_s: float | None = None
    first_byte_timeout_s: float | None = None
    chunk_timeout_s: float | None = None
    total_timeout_s: float = 600.0
    max_concurrency: int = 512
    queue_wait_s: float = 3.0
    proxy: str = ""
    proxy_env: str = ""
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""
    image_urls: ImageURLs = "fetch"


class DeploymentSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of several places where a model is served; what it leaves out is as in the model's row."""

    provider: str
    upstream_name: str = ""
    weight: int = 1
    input_price: str | None = None
    cached_input_price: str | None = None
    output_price: str | None = None


class TemplateSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See core.models.Template."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    start: str = ""
    answer: str = ""


class ModelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[[models]]` row as written; prices in USD per million tokens, as strings.

    `successor`: the model is retired, and the entry of that name answers in its place; the row has nothing else then.
    """

    name: str
    provider: str
    upstream_name: str = ""
    mode: Mode | None = None
    context_window: int | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: tuple[float, float] = (0.0, 2.0)
    input_price: str | None = None
    cached_input_price: str | None = None
    output_price: str | None = None
    gross_margin_percent: str | None = None
    vision: bool = False
    image_tokens: int | None = None
    tools: bool | None = None
    logprobs: bool | None = None
    refuses: tuple[str, ...] = ()
    template: str | TemplateSettings | None = None
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    weight: int = 1
    deployments: tuple[DeploymentSettings, ...] = ()
    successor: str | None = None
    path: str | None = None


class AppSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    prompt: str
    variables: tuple[Variable, ...]
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    description: str = ""
    gross_margin_percent: str | None = None


class DeveloperSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    account: str
    applications: tuple[str, ...] = ()


class Document(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """headgate.toml, and the catalogue file (which uses providers and models only)."""

    server: ServerSettings = ServerSettings()
    tokens: TokenSettings = TokenSettings()
    billing: BillingSettings = BillingSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()
    limits: LimitSettings = LimitSettings()
    log: LogSettings = LogSettings()
    routing: RoutingSettings = RoutingSettings()
    files: FileSettings = FileSettings()
    providers: dict[str, ProviderSettings] = {}
    models: tuple[ModelSettings, ...] = ()
    apps: dict[str, AppSettings] = {}
    developers: dict[str, DeveloperSettings] = {}


class Margins(Struct, frozen=True, kw_only=True):
    """The installation's gross margins in millionths, and the platform's percentage of a developer's margin."""

    default: MarginPPM
    floor: MarginPPM | None
    cap: MarginPPM
    platform_share_percent: Decimal


class Settings(Struct, frozen=True, kw_only=True):
    """Everything that was decided before the start. `environ` is the environment as it was read."""

    source: str
    data_dir: Path
    environ: Mapping[str, str]
    server: ServerSettings
    tokens: TokenSettings
    embedded: EmbeddedSettings
    limits: LimitSettings
    log: LogSettings
    routing: RoutingSettings
    files: FileSettings
    margins: Margins
    credit_usd: Decimal
    providers: Mapping[str, ProviderSettings]
    models: tuple[ModelSettings, ...]
    apps: Mapping[str, App]
    developers: Mapping[str, Developer]

    def key(self, variable: str) -> str | None:
        """The value of an environment variable; an empty one counts as not set."""
        return self.environ.get(variable) or None


DEFAULT_APP = App(
    name="default",
    model="demo",
    prompt="{{query}}",
    variables=(Variable(name="query", label="Query", type="paragraph", required=True),),
    description="Answers one query.",
)
