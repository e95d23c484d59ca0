"""The functions that a chat's model may ask for.

https://platform.openai.com/docs/guides/function-calling
Custom tools, whose input is free text, and `allowed_tools` are refused by name.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from headgate.core.completion import Tool, Tools
from headgate.core.errors import InvalidRequest
from headgate.dialects.base import unsupported
from headgate.dialects.chat_format import identifier, schema_text
from headgate.dialects.chat_wire import ChatBody, FunctionBody, ToolBody, ToolChoiceBody

MOST_TOOLS = 128

_MODES: Mapping[str, Literal["none", "auto", "required"]] = MappingProxyType(
    {"none": "none", "auto": "auto", "required": "required"}
)
_MODES_IN_WORDS = 'none, auto, required or {"type": "function", "function": {"name": …}}'


def tools_of(wire: ChatBody) -> Tools | None:
    """The tools with all that is said about them; None where there are none, and so nothing to be said."""
    if not wire.tools:
        if wire.tool_choice not in (None, "none", "auto"):
            raise unsupported("tool_choice", "without tools")
        return None
    if len(wire.tools) > MOST_TOOLS:
        allowed = f"at most {MOST_TOOLS} functions"
        raise InvalidRequest(f"tools must hold {allowed}.", param="tools", allowed=allowed)
    tools = tuple([_tool(tool, f"tools[{index}]") for index, tool in enumerate(wire.tools)])
    names = _distinct_names(tools)
    choice = wire.tool_choice
    if isinstance(choice, ToolChoiceBody):
        return Tools(
            tools=tools, choice="named", name=_chosen(choice, names), parallel=wire.parallel_tool_calls
        )
    if choice is not None and choice not in _MODES:
        raise InvalidRequest(
            f"tool_choice must be {_MODES_IN_WORDS}.", param="tool_choice", allowed=_MODES_IN_WORDS
        )
    return Tools(
        tools=tools,
        choice=None if choice is None else _MODES[choice],
        parallel=wire.parallel_tool_calls,
    )


def check_function_type(given: str | None, where: str) -> None:
    """`type` beside a `function`. Required as documented."""
    if given == "custom":
        raise unsupported(where, "as custom by this version, which knows functions only")
    if given != "function":
        raise InvalidRequest(f"{where} must be function.", param=where, allowed="function")


def _tool(wire: ToolBody, where: str) -> Tool:
    check_function_type(wire.type, f"{where}.type")
    function, where = wire.function, f"{where}.function"
    if function is None:
        raise InvalidRequest(f"{where} is required.", param=where)
    return Tool(
        name=identifier(function.name, f"{where}.name"),
        description=function.description,
        parameters=_parameters(function, f"{where}.parameters"),
        strict=function.strict,
    )


def _parameters(function: FunctionBody, where: str) -> bytes | None:
    raw = function.parameters
    return schema_text(raw, where) if raw and bytes(raw) != b"null" else None


def _distinct_names(tools: Sequence[Tool]) -> set[str]:
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            where = f"tools[{index}].function.name"
            raise InvalidRequest(
                f"{where} is {tool.name}, as an earlier tool's; names must differ.",
                param=where,
                allowed="a name that no other tool has",
            )
        names.add(tool.name)
    return names


def _chosen(choice: ToolChoiceBody, names: set[str]) -> str:
    if choice.type in ("allowed_tools", "custom"):
        raise unsupported("tool_choice", f"as {choice.type} by this version; give {_MODES_IN_WORDS}")
    if choice.type != "function":
        raise InvalidRequest(
            "tool_choice.type must be function.", param="tool_choice.type", allowed="function"
        )
    name = choice.function.name if choice.function is not None else None
    if name is None or name not in names:
        where = "tool_choice.function.name"
        raise InvalidRequest(
            f"{where} must be the name of one of the tools.",
            param=where,
            allowed="the name of one of the tools",
        )
    return name
