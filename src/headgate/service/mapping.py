"""What can be mapped onto a model, and what cannot: the latter is refused by name, never quietly left out."""

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import msgspec

from headgate.core.completion import CompletionRequest, Image, Message, Sampling, Shape
from headgate.core.errors import InvalidRequest
from headgate.core.models import ModelSpec, Template

NEUTRAL: Mapping[str, object] = MappingProxyType(
    {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "n": 1, "suffix": ""}
)
"""What asks for nothing. Clients send it out of habit, so it is left out where the parameter is refused."""
ASKED: Mapping[str, Callable[[CompletionRequest], object]] = MappingProxyType(
    {
        "n": lambda request: request.n,
        "best_of": lambda request: request.best_of,
        "logprobs": lambda request: request.logprobs,
        "echo": lambda request: request.echo,
        "suffix": lambda request: request.suffix,
        "response_format": lambda request: request.response_format,
        "prompt": lambda request: any(isinstance(prompt, tuple) for prompt in request.prompts or ()),
        "tools": lambda request: request.tools,
        "tool_choice": lambda request: (
            request.tools is not None and request.tools.choice not in (None, "auto")
        ),
        "parallel_tool_calls": lambda request: (
            request.tools is not None and request.tools.parallel is not None
        ),
        "detail": lambda request: any(image.detail not in (None, "auto") for image in _images(request)),
        "prefill": lambda request: _last_speaker(request) == "assistant",
        "temperature+top_p": lambda request: (
            not {None, 1} & {request.sampling.temperature, request.sampling.top_p}
        ),
    }
)
"""What else a request may ask for; all other parameters steer its sampling."""
_SHOWN = {"prefill": "messages", "temperature+top_p": "top_p"}
"""What clients call the two that are no parameters."""
_WHY = {
    "prompt": "takes no token ids",
    "detail": "takes no detail of an image",
    "prefill": "does not go on with what the assistant has begun to say",
    "temperature+top_p": "takes temperature or top_p, not both",
}
_MARK = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""What a template's special tokens look like."""


def shape_for(request: CompletionRequest, spec: ModelSpec) -> Shape:
    """How the model is spoken to: conversations chat where it can; prompts complete where it can."""
    wants_chat = request.messages is not None or request.chat_first
    if wants_chat:
        return "chat" if spec.chats else "completion"
    return "completion" if spec.completes else "chat"


def transcript(messages: tuple[Message, ...], template: Template | None = None) -> str:
    """A conversation as text, for models that only complete."""
    if template is None:
        lines = [f"{message.role.capitalize()}: {message.content}" for message in messages]
        return "\n".join([*lines, "Assistant:"])
    around = {"system": template.system, "user": template.user, "assistant": template.assistant}
    turns = [(around[message.role], message.content) for message in messages]
    written = "".join([f"{before}{content}{after}" for (before, after), content in turns])
    return template.start + written + template.answer


def sampling_for(sampling: Sampling, spec: ModelSpec) -> Sampling:
    """The sampling without the neutral values of what the model's upstream refuses to hear of at all."""
    silent: dict[str, object] = {
        name: None for name in spec.refuses if getattr(sampling, name, None) == NEUTRAL.get(name, ...)
    }
    if "temperature+top_p" in spec.refuses and None not in (sampling.temperature, sampling.top_p):
        silent["temperature" if sampling.temperature == NEUTRAL["temperature"] else "top_p"] = None
    return msgspec.structs.replace(sampling, **silent) if silent else sampling


def check_mapping(request: CompletionRequest, spec: ModelSpec) -> None:
    """InvalidRequest naming the first parameter that this model cannot honour."""
    if spec.refuses:
        _check_refusals(request, spec)
    if request.looks and not spec.vision:
        raise _cannot(_first_image(request), spec, "does not look at images")
    if not spec.tools:
        _check_no_tools(request, spec)
    if not spec.logprobs:
        if request.logprobs is not None:
            raise _cannot("logprobs", spec, "gives no log probabilities")
        if request.best_of is not None:
            raise _cannot("best_of", spec, "gives no log probabilities to choose by")
    shape = shape_for(request, spec)
    if shape == "completion":
        if request.looks:
            raise _cannot(_first_image(request), spec, "only completes text")
        if request.response_format is not None and not spec.constrains:
            raise _cannot("response_format", spec, "only completes text")
        if request.messages is not None and spec.template is not None:
            _check_template(request.messages, spec.template)
        return
    if request.suffix is not None:
        raise _cannot("suffix", spec, "only chats")
    if request.echo and request.best_of is not None:
        raise _cannot(
            "best_of", spec, "only chats, so it cannot choose among echoes: leave echo or best_of out"
        )
    if request.echo and request.logprobs is not None:
        raise _cannot("echo", spec, "only chats, so it cannot score a prompt: leave echo or logprobs out")
    if any(not isinstance(prompt, str) for prompt in request.prompts or ()):
        raise _cannot("prompt", spec, "only chats, so it takes text and no token ids")


def _check_refusals(request: CompletionRequest, spec: ModelSpec) -> None:
    """Parameters that the model's upstream has no ear for, unless their value asks for nothing."""
    for name in spec.refuses:
        asked = ASKED.get(name)
        given = getattr(request.sampling, name, None) if asked is None else asked(request)
        if given is None or given is False or given in ((), NEUTRAL.get(name)):
            continue
        raise _cannot(_SHOWN.get(name, name), spec, _WHY.get(name, "takes none"))


def _check_no_tools(request: CompletionRequest, spec: ModelSpec) -> None:
    if request.tools is not None:
        raise _cannot("tools", spec, "calls none")
    for index, message in enumerate(request.messages or ()):
        if message.tool_calls or message.role == "tool":
            param = "tool_calls" if message.tool_calls else "role"
            raise _cannot(f"messages[{index}].{param}", spec, "calls no tools")


def _last_speaker(request: CompletionRequest) -> str | None:
    """Whose turn is the last; system messages are nobody's."""
    turns = [message.role for message in request.messages or () if message.role != "system"]
    return turns[-1] if turns else None


def _images(request: CompletionRequest) -> Iterator[Image]:
    parts = (part for message in request.messages or () for part in message.parts)
    return (part for part in parts if isinstance(part, Image))


def _first_image(request: CompletionRequest) -> str:
    return next((image.param for image in _images(request)), "messages")


def _check_template(messages: tuple[Message, ...], template: Template) -> None:
    """Words of end users must not pass for the template's own marks."""
    written = (template.start, template.answer, *template.system, *template.user, *template.assistant)
    marks = set(_MARK.findall(" ".join(written)))
    for index, message in enumerate(messages):
        if any(mark in message.content for mark in marks):
            allowed = "text without the marks of the model's conversation template"
            raise InvalidRequest(
                f"messages[{index}].content must be {allowed}.",
                param=f"messages[{index}].content",
                allowed=allowed,
            )


def _cannot(param: str, spec: ModelSpec, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} is not supported with the model {spec.name}: it {why}.",
        param=param,
        code="unsupported_parameter",
    )
