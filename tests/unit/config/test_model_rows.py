"""[[models]]: what a row may say, what its provider makes of it, and the names that rows call each other by."""

from pathlib import Path
from typing import Any

import pytest

from headgate.bootstrap.gateway import model_specs
from headgate.config import ConfigError, Settings, load, retired_rows
from headgate.config.variants import load_variants
from headgate.core.models import Catalog, ModelSpec, Template

GROQ = load_variants()["groq"]
GROQ_REFUSES = (*GROQ.refuses, *GROQ.refuses_chat)

PROVIDERS = """
[providers.acme]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
[providers.grok]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
variant = "groq"
image_urls = "pass"
[providers.claude]
kind = "anthropic"
base_url = "http://127.0.0.1:9/v1"
[providers.coral]
kind = "cohere"
base_url = "http://127.0.0.1:9/v2"
"""


def model(name: str = "large", *lines: str, provider: str = "acme", **fields: Any) -> str:
    """A row; `lines` are further ones, as TOML."""
    values = {"context_window": 8192, "max_output_tokens": 4096, "input_price": "'1'", "output_price": "'3'"}
    written = [f"{key} = {value}" for key, value in (values | fields).items() if value is not None]
    return "\n".join(["[[models]]", f"name = '{name}'", f"provider = '{provider}'", *written, *lines, ""])


def retired(name: str, successor: str, *lines: str, provider: str = "acme") -> str:
    head = ("[[models]]", f"name = '{name}'", f"provider = '{provider}'", f"successor = '{successor}'")
    return "\n".join([*head, *lines, ""])


def read(*rows: str) -> Settings:
    Path("given.toml").write_text(PROVIDERS + "".join(rows))
    return load(Path("given.toml"), {})


def catalog(*rows: str) -> Catalog:
    settings = read(*rows)
    return Catalog(model_specs(settings), retired_rows(settings))


def spec(*lines: str, **fields: Any) -> ModelSpec:
    return catalog(model("large", *lines, **fields)).resolve("large")


def refused(*rows: str) -> tuple[str, str]:
    """(key, reason) of what stops the start."""
    with pytest.raises(ConfigError) as error:
        read(*rows)
    file, key, reason = str(error.value).split(": ", 2)
    assert file == "given.toml"
    return key, reason


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class TestAbilities:
    @pytest.mark.parametrize(
        ("provider", "tools", "logprobs"),
        [("acme", False, True), ("claude", True, False), ("coral", True, False)],
    )
    def test_what_a_row_leaves_out_is_as_its_provider_is(
        self, provider: str, tools: bool, logprobs: bool
    ) -> None:
        given = spec(provider=provider)
        assert (given.tools, given.logprobs, given.vision, given.image_tokens) == (tools, logprobs, False, 0)
        assert (given.refuses, given.template, given.image_urls) == ((), None, "fetch")
        assert (given.weight, given.deployments, given.fallbacks) == (1, (), ())

    def test_a_row_says_otherwise(self) -> None:
        assert spec("tools = true").tools
        assert not spec("tools = false", provider="claude").tools
        assert not spec("logprobs = false").logprobs

    def test_an_image_has_a_bound(self) -> None:
        assert spec("vision = true").image_tokens == 5000
        assert spec("vision = true\nimage_tokens = 1600").image_tokens == 1600

    def test_what_a_model_refuses_adds_to_what_its_service_refuses(self) -> None:
        given = spec("refuses = ['stop', 'logprobs']", provider="grok")
        assert given.refuses == ("stop", *GROQ_REFUSES)
        assert (given.takes_n, given.logprobs, given.image_urls) == (False, False, "pass")
        assert spec("refuses = ['temperature+top_p', 'prefill']", provider="claude").refuses == (
            "temperature+top_p",
            "prefill",
        )

    def test_a_model_that_refuses_tools_has_none(self) -> None:
        assert not spec("refuses = ['tools']", provider="claude").tools

    @pytest.mark.parametrize(
        ("lines", "fields", "key", "reason"),
        [
            ("vision = true", {"mode": "'completion'"}, "vision", "chats"),
            ("tools = true", {"mode": "'completion'"}, "tools", "chats"),
            ("image_tokens = 5", {}, "image_tokens", "vision = true"),
            ("vision = true\nimage_tokens = 0", {}, "image_tokens", "at least 1"),
            ("refuses = ['temprature']", {}, "refuses", "'temprature' is not one of temperature, "),
            ("tools = true\nrefuses = ['tools']", {}, "refuses", "contradicts"),
            ("logprobs = true\nrefuses = ['logprobs']", {}, "refuses", "contradicts"),
            ("logprobs = true", {"provider": "grok"}, "logprobs", "'groq' gives no"),
            ("template = 'chatml'", {}, "template", "belongs to mode 'completion'"),
            ("template = 'chatlm'", {"mode": "'completion'"}, "template", "'chatlm' is not one of"),
            ("template = { user = ['', ''] }", {"mode": "'completion'"}, "template", "system"),
            ("weight = 0", {}, "weight", "1 to 1000"),
        ],
    )
    def test_what_makes_no_sense_stops_the_start(
        self, lines: str, fields: dict[str, Any], key: str, reason: str
    ) -> None:
        told_key, told_reason = refused(model("large", lines, **fields))
        assert told_key == f"models[0].{key}"
        assert reason in told_reason

    @pytest.mark.parametrize(
        "line",
        ["vision = true", "tools = true", "refuses = ['stop']", "deployments = [{ provider = 'acme' }]"],
    )
    def test_an_embedded_model_is_what_its_engine_is(self, line: str) -> None:
        row = f"[[models]]\nname = 'mine'\nprovider = 'embedded'\npath = '/x.gguf'\n{line}\n"
        assert refused(row)[0] == f"models[0].{line.split(' ', maxsplit=1)[0]}"


class TestTemplates:
    def test_by_name(self) -> None:
        given = spec("template = 'chatml'", mode="'completion'").template
        assert given is not None
        assert given.answer == "<|im_start|>assistant\n"

    def test_in_full(self) -> None:
        line = "template = { system = ['', '\\n'], user = ['Q: ', '\\n'], assistant = ['A: ', '\\n'], answer = 'A:' }"
        given = spec(line.replace("'", '"'), mode="'completion'").template
        assert given == Template(system=("", "\n"), user=("Q: ", "\n"), assistant=("A: ", "\n"), answer="A:")

    def test_of_an_embedded_model_that_only_completes(self) -> None:
        row = "[[models]]\nname = 'mine'\nprovider = 'embedded'\npath = '/x.gguf'\nmode = 'completion'\n"
        assert catalog(row + "template = 'alpaca'\n").resolve("mine").template is not None


class TestRetired:
    def test_its_names_mean_the_successor(self) -> None:
        names = catalog(model(), retired("old", "large", "aliases = ['older']"))
        for name in ("old", "older", "acme/old", "acme/older"):
            assert names.resolve(name).name == "large"
        assert [row.name for row in names.retired if row.provider == "acme"] == ["old"]

    @pytest.mark.parametrize("successor", ["acme/large", "latest", "demo", "claude-opus-5-5"])
    def test_a_successor_may_be_named_in_every_way(self, successor: str) -> None:
        names = catalog(model("large", "aliases = ['latest']"), retired("old", successor))
        assert names.resolve("old") is names.resolve(successor)

    @pytest.mark.parametrize(
        ("row", "key", "reason"),
        [
            (retired("old", "nothing"), "successor", "'nothing' is not in the catalogue"),
            (retired("old", "old"), "successor", "itself retired"),
            (retired("old", "gpt-4"), "successor", "'gpt-4' is itself retired"),
            (retired("old", "large", "mode = 'chat'"), "mode", "a retired model has only"),
            (retired("old", "large", "input_price = '1'"), "input_price", "a retired model has only"),
            (retired("old", "large", provider="nobody"), "provider", "not in [providers]"),
            (retired("o/d", "large"), "name", "letters"),
        ],
    )
    def test_what_is_wrong_is_named(self, row: str, key: str, reason: str) -> None:
        told_key, told_reason = refused(row, model())
        assert told_key == f"models[0].{key}"
        assert reason in told_reason

    def test_a_name_in_use_wins_over_a_retired_one(self) -> None:
        rows = (model("large", "aliases = ['old']"), retired("old", "small", provider="grok"), model("small"))
        assert catalog(*rows).resolve("old").name == "large"

    def test_an_own_row_takes_one_retired_name_and_leaves_the_others(self) -> None:
        names = catalog(model("gpt-4"))
        assert names.resolve("gpt-4").provider == "acme"
        assert names.resolve("gpt-4-0613").name == "gpt-4.1"

    def test_an_own_row_takes_a_successors_place(self) -> None:
        assert catalog(model("gpt-4.1")).resolve("gpt-4").provider == "acme"

    def test_a_successor_that_is_retired_in_turn_hands_its_names_on(self) -> None:
        names = catalog(model(), retired("gpt-4.1", "large", provider="openai"))
        assert names.resolve("gpt-4").name == names.resolve("gpt-4.1").name == "large"

    def test_a_successor_whose_name_comes_to_mean_two_models_takes_its_retired_names_along(self) -> None:
        names = catalog(model("gpt-4.1"), model("gpt-4.1", provider="claude"))
        assert "gpt-4" not in {row.name for row in names.retired}
        assert "text-davinci-003" in {row.name for row in names.retired}


class TestFallbacks:
    def test_they_are_kept_in_order(self) -> None:
        rows = (model("large", "fallbacks = ['claude/small', 'demo']"), model("small", provider="claude"))
        assert catalog(*rows).resolve("large").fallbacks == ("claude/small", "demo")

    def test_two_models_may_name_each_other(self) -> None:
        names = catalog(model("large", "fallbacks = ['small']"), model("small", "fallbacks = ['large']"))
        assert names.resolve(names.resolve("large").fallbacks[0]).fallbacks == ("large",)

    @pytest.mark.parametrize(
        ("names", "reason"),
        [
            ("'nothing'", "'nothing' is not in the catalogue"),
            ("'large'", "the model itself"),
            ("'latest'", "the model itself"),
            ("'acme/large'", "the model itself"),
            ("'old'", "the model itself"),
            ("'twin'", "ambiguous; use one of: acme/twin, claude/twin"),
            ("'demo', 'embedded/demo'", "given twice"),
            (", ".join("'demo'" for _ in range(9)), "at most 8"),
        ],
    )
    def test_what_cannot_be_followed_stops_the_start(self, names: str, reason: str) -> None:
        key, told = refused(
            model("large", "aliases = ['latest']", f"fallbacks = [{names}]"),
            retired("old", "large"),
            model("twin"),
            model("twin", provider="claude"),
        )
        assert key == "models[0].fallbacks"
        assert reason in told


class TestDeployments:
    def test_each_is_what_its_own_provider_makes_of_it(self) -> None:
        given = spec(
            "cached_input_price = '0.5'",
            "refuses = ['stop']",
            "weight = 3",
            """deployments = [
                { provider = 'claude', upstream_name = 'big', weight = 2, input_price = '2' },
                { provider = 'grok', output_price = '1' },
            ]""",
        )
        own, claude, grok = given.deployments
        assert [(one.provider, one.upstream_name, one.weight) for one in given.deployments] == [
            ("acme", "large", 3),
            ("claude", "big", 2),
            ("grok", "large", 1),
        ]
        assert {one.name for one in given.deployments} == {"large"}
        assert all(one.deployments == () and one.fallbacks == () for one in given.deployments)
        prices = [(one.input_rate, one.cached_rate, one.output_rate) for one in given.deployments]
        assert prices == [
            (10**9, 5 * 10**8, 3 * 10**9),
            (2 * 10**9, 2 * 10**9, 3 * 10**9),
            (10**9, 5 * 10**8, 10**9),
        ]
        assert (own.takes_n, claude.takes_n, grok.takes_n) == (True, False, False)
        assert (own.refuses, grok.refuses) == (("stop",), ("stop", *GROQ_REFUSES))
        assert (own.logprobs, claude.logprobs, grok.logprobs) == (True, False, False)
        assert (own.image_urls, grok.image_urls) == ("fetch", "pass")

    @pytest.mark.parametrize(
        ("deployment", "key", "reason"),
        [
            ("provider = 'nobody'", "deployments[0].provider", "not in [providers]"),
            ("provider = 'embedded'", "deployments[0].provider", "a row of its own"),
            ("provider = 'acme'", "deployments[0]", "acme/large is given twice"),
            ("provider = 'grok', weight = 0", "deployments[0].weight", "1 to 1000"),
            ("provider = 'grok', input_price = '-1'", "deployments[0].input_price", "not negative"),
            ("provider = 'claude'", "deployments[0].mode", "only be 'chat'"),
            ("provider = 'grok', price = '1'", "deployments[0]", "unknown field"),
        ],
    )
    def test_what_is_wrong_is_named(self, deployment: str, key: str, reason: str) -> None:
        told_key, told = refused(model("large", f"deployments = [{{ {deployment} }}]", mode="'both'"))
        assert (told_key, reason in told) == (f"models[0].{key}", True), told
