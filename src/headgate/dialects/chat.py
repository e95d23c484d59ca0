"""OpenAI's chat: POST /v1/chat/completions.

https://platform.openai.com/docs/api-reference/chat/create
Text and images in, text and tool calls out. What else the API documents (audio, files, ...) is refused by name, but
for two hints that change no answer: `prompt_cache_key` and `safety_identifier` are taken, since many clients send them
with every request, and not passed on. They say which end user asks, as `user` does: that is no business of an upstream.
How the prompt is cached, and for how long, is refused: it changes prices, or promises that nothing is kept.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec

from headgate.core.completion import Answer, Choice, CompletionRequest
from headgate.core.errors import InvalidRequest
from headgate.dialects.base import (
    RequestContext,
    integer,
    token_limit,
    unsupported,
)
from headgate.dialects.chat_format import response_format
from headgate.dialects.chat_messages import messages_of
from headgate.dialects.chat_stream import ChatStream
from headgate.dialects.chat_tools import tools_of
from headgate.dialects.chat_wire import (
    COMPLETION,
    AnswerCall,
    AnswerMessage,
    CalledFunction,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    completion_id,
)
from headgate.dialects.openai import sampling_of
from headgate.dialects.openai_form import OpenAIForm
from headgate.dialects.openai_logprobs import chat_logprobs
from headgate.dialects.openai_wire import usage_object, whole_answer

ENDPOINT = "/v1/chat/completions"

_NOTHING_ASKED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (
            {},
            {"mode": "implicit"},
            {"ttl": "30m"},
            {"mode": "implicit", "ttl": "30m"},
        ),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
)
"""The documented parameters that are not honoured, and their values besides null that ask for nothing."""
_INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "functions": "by this version; give them as tools",
        "function_call": "by this version; give tools, and tool_choice with them",
    }
)

_encode = msgspec.json.Encoder().encode


class OpenAIChat(OpenAIForm[ChatBody]):
    name = "chat"
    endpoint = ENDPOINT
    body = ChatBody

    def _parse(self, wire: ChatBody, context: RequestContext) -> CompletionRequest:
        if not wire.model:
            raise InvalidRequest("model is required.", param="model")
        messages = messages_of(wire.messages)
        n = integer(wire.n, "n", 1, 128) or 1
        if n > self._caps.max_choices:
            allowed = f"at most {self._caps.max_choices} choices in all"
            raise InvalidRequest(f"n is {n}; {allowed}.", param="n", allowed=allowed)
        max_tokens, max_tokens_param = token_limit(
            wire.max_tokens, wire.max_completion_tokens, alias="max_completion_tokens", low=1
        )
        sampling = sampling_of(wire, self._caps)
        logprobs = _logprobs(wire)
        wanted_format = response_format(wire.response_format)
        tools = tools_of(wire)
        _refuse_unsupported(wire)
        return CompletionRequest(
            request_id=context.request_id,
            answer_id=context.answer_id,
            stream_id=context.stream_id,
            created=context.created,
            dialect=self.name,
            models=(wire.model,),
            messages=messages,
            n=n,
            logprobs=logprobs,
            response_format=wanted_format,
            tools=tools,
            looks=any([message.parts for message in messages]),
            max_tokens=max_tokens,
            max_tokens_param=max_tokens_param,
            sampling=sampling,
            stream=bool(wire.stream),
            include_usage=wire.includes_usage,
            user=wire.user,
            app=context.principal.app,
        )

    def render(self, answer: Answer) -> bytes:
        request = answer.request
        most = request.logprobs
        if most is not None:
            choices = [_encode(_choice(choice, most)) for choice in answer.choices]
            return whole_answer(answer, completion_id(request), COMPLETION, choices)
        return _encode(
            ChatCompletion(
                id=completion_id(request),
                created=request.created,
                model=answer.models[0].model,
                choices=tuple([_choice(choice, None) for choice in answer.choices]),
                usage=usage_object(answer.usage),
            )
        )

    def renderer(self, request: CompletionRequest, served: Sequence[str] | None = None) -> ChatStream:
        return ChatStream(request, (served or request.models)[0])


def _choice(choice: Choice, most: int | None) -> ChatChoice:
    return ChatChoice(
        index=choice.index,
        message=_calling(choice) if choice.tool_calls else AnswerMessage(content=choice.text),
        logprobs=None if most is None else chat_logprobs(choice.logprobs or (), most),
        finish_reason=choice.finish_reason,
    )


def _calling(choice: Choice) -> AnswerMessage:
    calls = [
        AnswerCall(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments))
        for call in choice.tool_calls
    ]
    return AnswerMessage(content=choice.text or None, tool_calls=tuple(calls))


def _logprobs(wire: ChatBody) -> int | None:
    """How many alternatives to show with each token; None: no log probabilities at all."""
    most = integer(wire.top_logprobs, "top_logprobs", 0, 20)
    if wire.logprobs:
        return most or 0
    if most:
        raise InvalidRequest(
            "top_logprobs needs logprobs to be true.", param="top_logprobs", allowed="0 without logprobs"
        )
    return None


def _refuse_unsupported(wire: ChatBody) -> None:
    """Documented, but not honoured: ignoring them would give another answer than the one asked for."""
    for name, neutral in _NOTHING_ASKED.items():
        value = getattr(wire, name)
        if value is not None and value not in neutral:
            raise unsupported(name, _INSTEAD.get(name, "by this version; leave it out"))
