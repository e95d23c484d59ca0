"""Models x prompts x n -> jobs.

One job is one call to a provider. Choices are numbered models first, then prompts, then n, so
`index = prompt * n + j` within a model.
"""

from collections.abc import Iterator

import msgspec

from headgate.core.completion import CompletionRequest, Job, Message, Sampling, Shape
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


def jobs_for(request: CompletionRequest, spec: ModelSpec, first_index: int) -> Iterator[Job]:
    """The jobs of one model, in order of their choices. `max_tokens` is still open (0); see planning."""
    shape = shape_for(request, spec)
    prompts: tuple[str | None, ...]
    messages = request.messages
    plain = request.plain
    if messages is not None:
        prompts = (None,)
        if shape == "completion":
            # Words of end users: special tokens in them stay text here too.
            prompts, messages, plain = (transcript(messages),), None, True
    else:
        prompts = request.prompts or ()
    calls = 1 if spec.takes_n else request.n
    for prompt_index, prompt in enumerate(prompts):
        for call in range(calls):
            yield Job(
                request_id=request.request_id,
                model=spec,
                shape=shape,
                prompt=prompt,
                messages=messages,
                plain=plain or (shape == "chat" and prompt is not None),
                n=request.n if spec.takes_n else 1,
                max_tokens=0,
                sampling=_nth_seed(request.sampling, call),
                first_index=first_index + prompt_index * request.n + call,
                counts_prompt=call == 0 or spec.bills_prompt_per_call,
            )


def _nth_seed(sampling: Sampling, call: int) -> Sampling:
    """The same seed gives the same text, and the choices of one request differ."""
    if not call or sampling.seed is None:
        return sampling
    return msgspec.structs.replace(sampling, seed=sampling.seed + call)
