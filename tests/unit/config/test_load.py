"""headgate.toml and the environment, and what is said when they are wrong."""

from decimal import Decimal
from pathlib import Path

import pytest

from headgate.config import ConfigError, ServerSettings, Settings, load, model_spec
from headgate.core.models import Catalog

PROVIDER = '[providers.acme]\nkind = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n'
MODEL = """
[[models]]
name = "acme-large"
provider = "acme"
context_window = 8192
max_output_tokens = 4096
input_price = "0.50"
output_price = "1.50"
"""
APP = '[apps.story]\nmodel = "demo"\nprompt = "About {{topic}}."\nvariables = [{ name = "topic" }]\n'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str, **environ: str) -> Settings:
    Path("given.toml").write_text(text)
    return load(Path("given.toml"), environ)


def with_model(line: str) -> str:
    """The model's row with one line added, or put in place of its former one."""
    key = line.partition(" ")[0]
    kept = [old for old in MODEL.splitlines() if not old.startswith(f"{key} ")]
    return "\n".join([PROVIDER, *kept, line, ""])


def with_default(kind: str, default: str, more: str = "") -> str:
    """An app whose one variable has this type and default, as TOML."""
    variable = f'name = "topic", type = "{kind}", default = {default}' + (f", {more}" if more else "")
    return APP.replace('name = "topic"', variable)


def with_app(line: str) -> str:
    key = line.partition(" ")[0]
    kept = [old for old in APP.splitlines() if not old.startswith(f"{key} ")]
    return "\n".join([*kept, line, ""])


class TestDefaults:
    def test_nothing_is_needed(self) -> None:
        settings = load(None, {})
        assert settings.source == "built-in defaults"
        assert settings.server == ServerSettings()
        assert (settings.server.env, settings.server.cors_origins) == ("production", ("*",))
        assert (settings.server.first_chunk_wait_s, settings.server.max_body_bytes) == (5, 10 * 1024 * 1024)
        caps = settings.server
        assert (caps.max_choices, caps.max_models, caps.max_stops) == (128, 16, 4)
        assert (settings.server.ping_interval_s, settings.server.drain_deadline_s) == (10, 30)
        assert (settings.tokens.algorithm, settings.credit_usd) == ("HS256", Decimal("0.0001"))
        margins = settings.margins
        assert (margins.default, margins.floor, margins.cap) == (0, None, 990_000)
        assert margins.platform_share_percent == 0
        assert (settings.limits.requests_per_minute, settings.limits.tokens_per_minute) == (0, 0)
        assert set(settings.apps) == {"default"} and settings.apps["default"].prompt == "{{query}}"
        assert settings.developers == {}

    def test_the_embedded_model_and_the_built_in_providers_are_there(self) -> None:
        settings = load(None, {})
        assert [row.provider for row in settings.models if row.name == "demo"] == ["embedded"]
        assert {"openai", "anthropic", "cohere"} <= set(settings.providers)

    def test_an_empty_file_is_the_defaults(self) -> None:
        assert read("").server == ServerSettings()


class TestWhichFile:
    def test_the_file_in_the_current_folder_is_read_unless_another_is_named(self) -> None:
        Path("headgate.toml").write_text('[server]\nenv = "here"\n')
        assert load(None, {}).server.env == "here"
        assert load(None, {}).source == "headgate.toml"
        assert read('[server]\nenv = "named"\n').server.env == "named"

    def test_a_named_file_that_is_missing_stops_the_start(self) -> None:
        with pytest.raises(ConfigError, match=r"absent\.toml: the file does not exist"):
            load(Path("absent.toml"), {})

    def test_a_folder_and_bytes_that_are_no_text_stop_the_start(self) -> None:
        Path("folder.toml").mkdir()
        Path("binary.toml").write_bytes(b"\xff\xfe")
        for name in ("folder.toml", "binary.toml"):
            with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
                load(Path(name), {})

    def test_text_that_is_no_toml_stops_the_start_with_the_line(self) -> None:
        with pytest.raises(ConfigError, match=r"given\.toml: not valid TOML: .*line 2"):
            read("[server]\nenv = \n")


class TestEnvironment:
    def test_the_data_folder(self, tmp_path: Path) -> None:
        assert load(None, {"HEADGATE_DATA_DIR": str(tmp_path / "x")}).data_dir == tmp_path / "x"
        assert load(None, {"HEADGATE_DATA_DIR": "~/x"}).data_dir == Path.home() / "x"
        assert load(None, {"HEADGATE_DATA_DIR": ""}).data_dir == load(None, {}).data_dir
        assert load(None, {}).data_dir.is_absolute()

    def test_an_empty_variable_counts_as_not_set(self) -> None:
        settings = load(None, {"A": "", "B": "x"})
        assert (settings.key("A"), settings.key("B"), settings.key("C")) == (None, "x", None)

    @pytest.mark.parametrize("variable", ["HEADGATE_DATABASE_URL", "HEADGATE_VALKEY_URL"])
    def test_what_this_version_cannot_do_is_not_ignored(self, variable: str) -> None:
        with pytest.raises(ConfigError, match=f"environment: {variable}: .*not supported|only"):
            load(None, {variable: "postgresql://canary:secret@db/x"})
        load(None, {variable: ""})

    def test_values_of_the_environment_are_never_in_a_message(self) -> None:
        with pytest.raises(ConfigError) as error:
            load(None, {"HEADGATE_DATABASE_URL": "postgresql://canary:secret@db/x"})
        assert "canary" not in str(error.value)
        with pytest.raises(ConfigError, match="at least 32 bytes") as error:
            read('[tokens]\nsecret_env = "S"\n', S="canary")
        assert "canary" not in str(error.value)


class TestTheContractsExample:
    def test_every_key_of_it_is_understood(self) -> None:
        settings = read(
            """
[server]
env = "staging"
public_url = "https://gate.example/"
cors_origins = ["https://app.example"]
first_chunk_wait_s = 2
[tokens]
algorithm = "HS256"
secret_env = "SECRET"
[billing]
credit_usd = "0.001"
gross_margin_percent = "12.5"
min_gross_margin_percent = "5"
max_gross_margin_percent = "50"
platform_share_percent = "30"
[providers.acme]
kind = "openai"
base_url = "http://127.0.0.1:9100/v1"
api_key_env = "ACME_KEY"
timeout_s = 60
total_timeout_s = 600
max_concurrency = 512
[[models]]
name = "acme-large"
provider = "acme"
upstream_name = "mock-model"
mode = "completion"
context_window = 8192
max_input_tokens = 8000
max_output_tokens = 4096
temperature = [0, 2]
input_price = "0.50"
cached_input_price = "0.25"
output_price = "1.50"
vision = false
aliases = ["acme-latest"]
fallbacks = []
[apps.story]
model = "demo"
prompt = "Write a story about {{topic}}."
temperature = 0.7
max_tokens = 64
variables = [{ name = "topic", label = "Topic", type = "text-input", required = true, max_length = 48 }]
[developers.studio]
account = "studio"
applications = ["com.example.dev.app"]
[limits]
requests_per_minute = 60
tokens_per_minute = 6000
""",
            SECRET="s" * 32,
            ACME_KEY="k",
        )
        assert (settings.margins.default, settings.margins.floor, settings.margins.cap) == (
            125_000,
            50_000,
            500_000,
        )
        assert settings.key(settings.providers["acme"].api_key_env) == "k"
        row = next(row for row in settings.models if row.name == "acme-large")
        model = model_spec(row, settings.providers)
        assert (model.upstream_name, model.mode, model.aliases) == (
            "mock-model",
            "completion",
            ("acme-latest",),
        )
        assert (model.context_window, model.max_input_tokens, model.max_output_tokens) == (8192, 8000, 4096)
        assert (model.input_rate, model.cached_rate, model.output_rate) == (
            500_000_000,
            250_000_000,
            1_500_000_000,
        )
        (variable,) = settings.apps["story"].variables
        assert (variable.required, variable.max_length, variable.label) == (True, 48, "Topic")
        assert settings.developers["studio"].applications == ("com.example.dev.app",)


class TestModels:
    def test_what_a_row_leaves_out(self) -> None:
        settings = read(PROVIDER + MODEL)
        model = model_spec(settings.models[0], settings.providers)
        assert (model.upstream_name, model.mode, model.max_input_tokens) == ("acme-large", "chat", 8192)
        assert (model.cached_rate, model.temperature, model.margin) == (model.input_rate, (0, 2), None)
        assert model.takes_n and model.bills_prompt_per_call

    def test_a_row_with_a_built_in_name_replaces_it_whole(self) -> None:
        settings = read(PROVIDER + MODEL.replace("acme-large", "llama-3.3"))
        rows = [row for row in settings.models if row.name == "llama-3.3"]
        assert [(row.provider, row.temperature, row.max_output_tokens) for row in rows] == [
            ("acme", (0.0, 2.0), 4096)
        ]
        assert len(settings.models) == len(load(None, {}).models)

    def test_the_embedded_model_can_be_replaced_too(self) -> None:
        settings = read(PROVIDER + MODEL.replace("acme-large", "demo"))
        assert [row.provider for row in settings.models if row.name == "demo"] == ["acme"]

    def test_a_provider_with_a_built_in_name_replaces_it(self) -> None:
        settings = read(PROVIDER.replace("acme", "openai"))
        assert settings.providers["openai"].base_url == "http://127.0.0.1:9/v1"

    def test_a_row_may_use_a_built_in_provider(self) -> None:
        settings = read(MODEL.replace('provider = "acme"', 'provider = "openai"'))
        assert settings.models[0].provider == "openai"

    def test_another_gguf_is_a_row_with_a_path(self) -> None:
        settings = read('[[models]]\nname = "mine"\nprovider = "embedded"\npath = "/models/x.gguf"\n')
        assert settings.models[0].path == "/models/x.gguf"

    def test_the_own_rows_come_first_and_are_reachable_with_their_provider(self) -> None:
        settings = read(PROVIDER + MODEL)
        catalog = Catalog([model_spec(settings.models[0], settings.providers)])
        assert catalog.models[0] is catalog.resolve("acme/acme-large") is catalog.resolve("acme-large")


class TestApps:
    def test_the_default_app_can_be_configured(self) -> None:
        settings = read(APP.replace("story", "default"))
        assert settings.apps["default"].prompt == "About {{topic}}."

    @pytest.mark.parametrize(
        "name", ["demo", "embedded/demo", "openai/gpt-4", "acme-latest", "acme/acme-latest"]
    )
    def test_an_app_may_name_its_model_in_every_way(self, name: str) -> None:
        text = PROVIDER + MODEL + 'aliases = ["acme-latest"]\n' + APP.replace('"demo"', f'"{name}"')
        assert read(text).apps["story"].model == name

    def test_a_margin_is_kept_exactly(self) -> None:
        assert read(with_app('gross_margin_percent = "12.3456"')).apps["story"].margin_percent == Decimal(
            "12.3456"
        )


BAD = [
    # the shape of the file
    ("[servr]\n", "(top level)", "servr"),
    ("[server]\nenv = 5\n", "server.env", "str"),
    ("[server]\nprot = 1\n", "server", "prot"),
    ("[providers.acme]\nkind = 'openai'\nbase = 'x'\n", "providers.acme", "base"),
    ("[providers.a]\nkind='openai'\n[providers.b]\nkind='smoke'\n", "providers.(a|b).kind", "smoke"),
    (with_model("inputprice = '1'"), "models[0]", "inputprice"),
    (with_model("input_price = 0.5"), "models[0].input_price", "str"),
    (with_app("variables = [{ name = 'topic', requierd = true }]"), "apps.story.variables[0]", "requierd"),
    (with_app("variables = [{ name = 'topic', type = 'date' }]"), "apps.story.variables[0].type", "date"),
    ("models = 5\n", "models", "array"),
    # server
    ("[server]\nfirst_chunk_wait_s = 0\n", "server.first_chunk_wait_s", "greater than 0"),
    ("[server]\nfirst_chunk_wait_s = nan\n", "server.first_chunk_wait_s", "greater than 0"),
    ("[server]\nping_interval_s = inf\n", "server.ping_interval_s", "at most 3600"),
    ("[server]\ndrain_deadline_s = -1\n", "server.drain_deadline_s", "greater than 0"),
    ("[server]\nwrite_timeout_s = 0\n", "server.write_timeout_s", "greater than 0"),
    ("[server]\nmax_body_bytes = 0\n", "server.max_body_bytes", "at least 1"),
    ("[server]\nmax_choices = 0\n", "server.max_choices", "at least 1"),
    ("[server]\npublic_url = 'gate.example'\n", "server.public_url", "http://"),
    # tokens
    ("[tokens]\nalgorithm = 'none'\n", "tokens.algorithm", "none"),
    ("[tokens]\nalgorithm = 'RS256'\n", "tokens.public_key_file", "RS256 needs"),
    (
        "[tokens]\nalgorithm = 'ES256'\npublic_key_file = 'a'\njwks_file = 'b'\n",
        "tokens.public_key_file",
        "ES256 needs",
    ),
    ("[tokens]\njwks_file = 'b'\n", "tokens.jwks_file", "not to HS256"),
    (
        "[tokens]\nalgorithm = 'RS256'\njwks_file = 'b'\nsecret_env = 'S'\n",
        "tokens.secret_env",
        "belongs to HS256",
    ),
    ("[tokens]\nsecret_env = 'NOT_SET'\n", "tokens.secret_env", "NOT_SET must hold"),
    # billing
    ("[billing]\ncredit_usd = '0'\n", "billing.credit_usd", "more than 0"),
    ("[billing]\ncredit_usd = '0.0003'\n", "billing.credit_usd", "endless decimals"),
    ("[billing]\ncredit_usd = 'much'\n", "billing.credit_usd", "not a decimal"),
    ("[billing]\ncredit_usd = 'nan'\n", "billing.credit_usd", "not a finite"),
    ("[billing]\ngross_margin_percent = '99.5'\n", "billing.gross_margin_percent", "0 to 99"),
    ("[billing]\ngross_margin_percent = '1.00001'\n", "billing.gross_margin_percent", "four decimals"),
    ("[billing]\ngross_margin_percent = '-1'\n", "billing.gross_margin_percent", "0 to 99"),
    (
        "[billing]\ngross_margin_percent = '60'\nmax_gross_margin_percent = '50'\n",
        "billing.gross_margin_percent",
        "above max",
    ),
    (
        "[billing]\nmin_gross_margin_percent = '60'\nmax_gross_margin_percent = '50'\n",
        "billing.min_gross_margin_percent",
        "above max",
    ),
    ("[billing]\nplatform_share_percent = '101'\n", "billing.platform_share_percent", "0 to 100"),
    # limits and engine
    ("[limits]\nrequests_per_minute = -1\n", "limits.requests_per_minute", "0 (none) or more"),
    ("[limits]\ntokens_per_minute = 1.5\n", "limits.tokens_per_minute", "int"),
    ("[embedded]\nslots = 0\n", "embedded.slots", "1 to 64"),
    ("[embedded]\nthreads = 1000\n", "embedded.threads", "1 to 256"),
    ("[embedded]\nmax_queue = -1\n", "embedded.max_queue", "0 to 100000"),
    ("[log]\nlevel = 'loud'\n", "log.level", "loud"),
    # routing and files
    ("[routing]\nretries = -1\n", "routing.retries", "0 to 10"),
    ("[routing]\nretries = 11\n", "routing.retries", "0 to 10"),
    ("[routing]\nbreaker_failures = -1\n", "routing.breaker_failures", "0 to"),
    ("[routing]\nbreaker_error_percent = 0\n", "routing.breaker_error_percent", "1 to 100"),
    ("[routing]\nbreaker_error_percent = 101\n", "routing.breaker_error_percent", "1 to 100"),
    ("[routing]\nbreaker_calls = 0\n", "routing.breaker_calls", "1 to"),
    ("[routing]\nbreaker_open_s = 0\n", "routing.breaker_open_s", "greater than 0"),
    ("[routing]\ndeadline_s = nan\n", "routing.deadline_s", "greater than 0"),
    ("[routing]\nretry_wait_s = inf\n", "routing.retry_wait_s", "at most 3600"),
    ("[routing]\nretry_wait_s = 6\n", "routing.retry_wait_s", "above retry_max_wait_s"),
    ("[files]\nmax_bytes = 0\n", "files.max_bytes", "at least 1"),
    ("[files]\nmax_total_bytes = 5\n", "files.max_total_bytes", "below max_bytes"),
    ("[files]\nmax_account_bytes = 5\n", "files.max_account_bytes", "below max_bytes"),
    ("[files]\nmax_account_bytes = 2000000000\n", "files.max_account_bytes", "above max_total_bytes"),
    ("[files]\nkeep_s = 0\n", "files.keep_s", "greater than 0"),
    # providers
    (PROVIDER.replace('"openai"', '"embedded"'), "providers.acme.kind", "built in"),
    (PROVIDER.replace("providers.acme", "providers.embedded"), "providers.embedded.kind", "built in"),
    (PROVIDER.replace("http://127.0.0.1:9/v1", "ftp://x"), "providers.acme.base_url", "http://"),
    (PROVIDER.replace("providers.acme", "providers.'a/b'"), "providers.a/b", "letters"),
    (PROVIDER + "timeout_s = 0\n", "providers.acme.timeout_s", "greater than 0"),
    (PROVIDER + "timeout_s = 700\n", "providers.acme.timeout_s", "at most total_timeout_s"),
    (PROVIDER + "timeout_s = nan\n", "providers.acme.timeout_s", "greater than 0"),
    (PROVIDER + "max_concurrency = 0\n", "providers.acme.max_concurrency", "at least 1"),
    # models
    (with_model("name = 'a/b'"), "models[0].name", "a/b"),
    (with_model("name = ''"), "models[0].name", "letters"),
    (with_model("aliases = ['fine', 'not fine']"), "models[0].aliases", "not fine"),
    (with_model("provider = 'nobody'"), "models[0].provider", "not in [providers]"),
    (with_model("path = '/x.gguf'"), "models[0].path", "only embedded"),
    ("[[models]]\nname = 'mine'\nprovider = 'embedded'\n", "models[0].path", "needs the path"),
    (with_model("mode = 'both'").replace("openai", "anthropic"), "models[0].mode", "only be 'chat'"),
    (with_model("logprobs = true").replace("openai", "cohere"), "models[0].logprobs", "no log probabilities"),
    (with_model("temperature = [1, 0]"), "models[0].temperature", "low <= high"),
    (with_model("temperature = [-1, 0]"), "models[0].temperature", "0 <= low"),
    (with_model("temperature = [nan, 1]"), "models[0].temperature", "low"),
    (with_model("input_price = '-1'"), "models[0].input_price", "not negative"),
    (with_model("output_price = '0.0000000001'"), "models[0].output_price", "nine decimals"),
    (with_model("cached_input_price = 'free'"), "models[0].cached_input_price", "not a decimal"),
    (with_model("gross_margin_percent = '100'"), "models[0].gross_margin_percent", "0 to 99"),
    (with_model("context_window = 0"), "models[0].context_window", "at least 1"),
    (with_model("max_output_tokens = 9000"), "models[0].max_output_tokens", "above context_window"),
    (PROVIDER + MODEL.replace("output_price", "# output_price"), "models[0].output_price", "required"),
    (PROVIDER + MODEL.replace("context_window", "# "), "models[0].context_window", "required"),
    (PROVIDER + MODEL + MODEL, "models[1].name", "given twice"),
    (
        PROVIDER + MODEL + MODEL.replace('"acme-large"', '"b"') + "aliases=['acme-large']\n",
        "models[1]",
        "twice",
    ),
    # apps and developers
    (with_app("model = 'unheard-of'"), "apps.story.model", "not in the catalogue"),
    (with_app("variables = []"), "apps.story.variables", "at least one"),
    (with_app("variables = [{ name = 'a' }, { name = 'a' }]"), "apps.story.variables[1].name", "twice"),
    (with_app("variables = [{ name = 'a', type = 'select' }]"), "apps.story.variables[0].options", "options"),
    (
        with_app("variables = [{ name = 'a', max_length = 0 }]"),
        "apps.story.variables[0].max_length",
        "at least",
    ),
    (with_app("max_tokens = 0"), "apps.story.max_tokens", "at least 1"),
    (with_app("temperature = -0.1"), "apps.story.temperature", "0 or more"),
    (with_app("temperature = nan"), "apps.story.temperature", "0 or more"),
    (with_app("top_p = 1.5"), "apps.story.top_p", "0 to 1"),
    (with_app("stop = ['']"), "apps.story.stop", "non-empty"),
    (with_app("gross_margin_percent = 'x'"), "apps.story.gross_margin_percent", "not a decimal"),
    (
        with_app("gross_margin_percent = '60'") + "[billing]\nmax_gross_margin_percent = '50'\n",
        "apps.story.gross_margin_percent",
        "above",
    ),
    (with_default("text-input", "5"), "apps.story.variables[0].default", "string"),
    (with_default("text-input", "'abc'", "max_length = 2"), "apps.story.variables[0].default", "longer"),
    (with_default("number", "'many'"), "apps.story.variables[0].default", "number"),
    (with_default("checkbox", "'yes'"), "apps.story.variables[0].default", "true or false"),
    (with_default("select", "'c'", "options = ['a', 'b']"), "apps.story.variables[0].default", "options"),
    (APP.replace("apps.story", "apps.'a b'"), "apps.a b", "letters"),
    ("[developers.d]\naccount = 'a b'\n", "developers.d.account", "letters"),
    ("[developers.d]\naccount = 'platform'\n", "developers.d.account", "ledger itself"),
    ("[developers.d]\n", "developers.d", "account"),
]


@pytest.mark.parametrize(("text", "key", "reason"), BAD, ids=[f"{i}-{case[1]}" for i, case in enumerate(BAD)])
def test_what_is_wrong_stops_the_start_with_file_key_and_reason(text: str, key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(text)
    file, told_key, told_reason = str(error.value).split(": ", 2)
    assert file == "given.toml"
    assert told_key.startswith(key) if key == "models[1]" else told_key == key
    assert reason in told_reason


def test_an_own_alias_takes_a_built_in_name_from_the_catalogue(tmp_path: Path) -> None:
    file = tmp_path / "headgate.toml"
    file.write_text(
        """
        [providers.acme]
        kind = "openai"
        base_url = "http://127.0.0.1:9/v1"
        [[models]]
        name = "acme-large"
        provider = "acme"
        context_window = 8192
        max_output_tokens = 4096
        input_price = "0.5"
        output_price = "1.5"
        aliases = ["gpt-4"]
        """
    )
    settings = load(file, {})
    assert [row.name for row in settings.models if "gpt-4" in (row.name, *row.aliases)] == ["acme-large"]
