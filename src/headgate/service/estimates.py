"""Token counts where no tokenizer is at hand: a floor, a ceiling and a likely value, from UTF-8 bytes.

A prompt of token ids has as many tokens as ids, and perhaps a start token.

Byte-pair vocabularies hold every byte, so a text never has more tokens than bytes. Typical text has a token per
four bytes; the longest tokens in common vocabularies (runs of blanks) are far longer, so the floor is cautious.
"""

from headgate.core.completion import Image, Job, Message

BYTES_PER_TOKEN = 4
CAUTIOUS_BYTES_PER_TOKEN = 16
TOKENS_PER_MESSAGE = 16
"""What a chat template adds around one message, at most."""
TOKENS_OF_TOOLS = 1024
"""What upstreams write about the use of tools in general, at most; and around each of them, TOKENS_PER_MESSAGE."""


def at_most(job: Job) -> int:
    """An upper bound of the prompt's tokens."""
    most = _ids(job) + _bytes(job) + TOKENS_PER_MESSAGE * _messages(job) + (1 if _ids(job) else 0)
    if job.tools is not None:
        most += TOKENS_OF_TOOLS + TOKENS_PER_MESSAGE * len(job.tools.tools)
    return most + _images(job) * job.model.image_tokens


def at_least(job: Job) -> int:
    """A lower bound of the prompt's tokens."""
    return _ids(job) + _bytes(job) // CAUTIOUS_BYTES_PER_TOKEN


def likely(job: Job) -> int:
    """What the prompt probably comes to."""
    images = _images(job) * (job.model.image_tokens // 4)
    return _ids(job) - (-_bytes(job) // BYTES_PER_TOKEN) + 4 * _messages(job) + images


def likely_in_text(size: int) -> int:
    """What a text of `size` UTF-8 bytes probably comes to; at least 1 for any text at all."""
    return -(-size // BYTES_PER_TOKEN)


def _messages(job: Job) -> int:
    if job.messages is not None:
        return len(job.messages)
    return 1 if job.shape == "chat" else 0


def _bytes(job: Job) -> int:
    size = 0
    if job.response_format is not None:
        size = len(job.response_format.schema or b"") + len((job.response_format.description or "").encode())
    if job.tools is not None:
        size += sum(
            len(tool.parameters or b"") + len(f"{tool.name}{tool.description or ''}".encode())
            for tool in job.tools.tools
        )
    if job.messages is not None:
        return size + sum(map(_message_bytes, job.messages))
    prompt = job.prompt if isinstance(job.prompt, str) else ""
    return size + len(prompt.encode()) + len((job.suffix or "").encode())


def _message_bytes(message: Message) -> int:
    size = len(message.content.encode())
    for call in message.tool_calls:
        size += len(f"{call.id}{call.name}{call.arguments}".encode()) + TOKENS_PER_MESSAGE
    return size + len((message.tool_call_id or "").encode())


def _images(job: Job) -> int:
    if job.messages is None:
        return 0
    return sum(isinstance(part, Image) for message in job.messages for part in message.parts)


def _ids(job: Job) -> int:
    return len(job.prompt) if isinstance(job.prompt, tuple) else 0
