"""What can be mapped onto a model, and what cannot: the latter is refused by name, never quietly left out."""

from headgate.core.completion import CompletionRequest, Message, Shape
from headgate.core.errors import InvalidRequest
from headgate.core.models import ModelSpec


def shape_for(request: CompletionRequest, spec: ModelSpec) -> Shape:
    """How the model is spoken to: conversations chat where it can; prompts complete where it can."""
    wants_chat = request.messages is not None or request.chat_first
    if wants_chat:
        return "chat" if spec.chats else "completion"
    return "completion" if spec.completes else "chat"


def transcript(messages: tuple[Message, ...]) -> str:
    """A conversation as text, for models that only complete."""
    lines = [f"{message.role.capitalize()}: {message.content}" for message in messages]
    return "\n".join([*lines, "Assistant:"])


def check_mapping(request: CompletionRequest, spec: ModelSpec) -> None:
    """InvalidRequest naming the first parameter that this model cannot honour."""
    if not spec.logprobs:
        if request.logprobs is not None:
            raise _cannot("logprobs", spec, "gives no log probabilities")
        if request.best_of is not None:
            raise _cannot("best_of", spec, "gives no log probabilities to choose by")
    shape = shape_for(request, spec)
    if shape == "completion":
        if request.response_format is not None and not spec.constrains:
            raise _cannot("response_format", spec, "only completes text")
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


def _cannot(param: str, spec: ModelSpec, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} is not supported with the model {spec.name}: it {why}.",
        param=param,
        code="unsupported_parameter",
    )
