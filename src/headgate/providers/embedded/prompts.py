"""What a job becomes for the engine: token ids and a grammar. Everything that can be refused is refused here, and the
jobs of one request share the work."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import msgspec

from headgate.core.completion import Job, Message, Prompt, Shape
from headgate.core.errors import InvalidRequest, Overloaded, UpstreamFailed
from headgate.core.models import ModelSpec, TokenizerInfo
from headgate.providers.embedded.admission import Admission
from headgate.providers.embedded.client import EngineGone, EngineRefusal
from headgate.providers.embedded.gguf import ModelFile
from headgate.providers.embedded.remembered import Remembered
from headgate.providers.embedded.schemas import Schemas
from headgate.providers.embedded.side_door import SideDoor
from headgate.providers.embedded.tokenizer import Post, Segment, TokenIds, Tokenizer

TOKENIZING_AT_ONCE = 4
TOKENIZING_QUEUE = 4096
REMEMBERED_PROMPTS = 512
REMEMBERED_TOKENS = 250_000
MAX_TEXT = 1024 * 1024
MAX_IDS = 1 << 18
RESTARTING = "The embedded engine stopped; it is being restarted."
NOT_UNDERSTOOD = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
ANY_OBJECT = b'{"type":"object"}'

_PromptKey = tuple[str, Shape, Prompt | None, str | None, tuple[Message, ...] | None, bool]


class Prompts:
    """One model file's prompts."""

    def __init__(self, model: ModelFile, context: int, post: Post, side: SideDoor, schemas: Schemas) -> None:
        self._start = model.start_token
        self._has_start = model.bos_id is not None
        self._tokenizer = Tokenizer(model, context, post)
        self._side = side
        # The engine has a fixed number of HTTP threads, and a short queue of connections.
        self._asking = Admission(TOKENIZING_AT_ONCE, TOKENIZING_QUEUE)
        self._ids: Remembered[_PromptKey, TokenIds] = Remembered(REMEMBERED_PROMPTS, REMEMBERED_TOKENS)
        self._schemas = schemas
        self._any_object: str | None = None

    async def check(self, job: Job) -> None:
        """Refuse what the job's ids and grammar do not show. InvalidRequest."""
        _refuse_mixtures(job)
        if job.logprobs is not None:
            # They cannot do without the side door; better said now than in the middle of an answer.
            async with self._ask("look up its vocabulary"):
                await self._side.vocabulary()
        if job.sampling.logit_bias:
            await self._known([token for token, _ in job.sampling.logit_bias], job.model, "logit_bias")

    async def ids(self, job: Job) -> TokenIds:
        """The prompt's ids, at least one. InvalidRequest for what cannot fit or is not in the vocabulary."""
        key = (job.request_id, job.shape, job.prompt, job.suffix, job.messages, job.plain)
        ids = self._ids.get(key)
        if ids is None:
            if isinstance(job.prompt, tuple):
                await self._known(job.prompt, job.model, "prompt")
            if job.suffix:
                ids = await self._infill(job, job.suffix)
            elif isinstance(job.prompt, tuple):
                ids = job.prompt or (self._start,)
            else:
                async with self._ask("tokenize the prompt"):
                    ids = await self._tokenizer.encode(job)
            self._ids.put(key, ids, len(ids))
        return ids

    async def grammar(self, job: Job) -> str | None:
        """The grammar of the job's answers; None: they are free."""
        wanted = job.response_format
        if wanted is None:
            return None
        if wanted.schema is not None:
            return await self._schemas.grammar(wanted.schema)
        if self._any_object is None:
            self._any_object = await self._schemas.grammar(ANY_OBJECT)
        return self._any_object

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids: without special tokens and without half a character at the end."""
        return await self._tokenizer.decode(ids)

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> TokenIds:
        size = len(text.encode())
        if size > MAX_TEXT:
            raise InvalidRequest(
                f"The text has {size} bytes; at most {MAX_TEXT} are tokenized at once.",
                param="prompt",
                allowed=f"at most {MAX_TEXT} bytes of UTF-8",
            )
        async with self._ask("tokenize the text"):
            return await self._tokenizer.tokenize(Segment(text, plain=not parse_special), special=add_special)

    async def detokenize(self, model: ModelSpec, ids: Sequence[int]) -> str:
        if len(ids) > MAX_IDS:
            raise InvalidRequest(
                f"There are {len(ids)} token ids; at most {MAX_IDS} are detokenized at once.",
                param="tokens",
                allowed=f"at most {MAX_IDS} token ids",
            )
        await self._known(ids, model, "tokens")
        async with self._ask("detokenize the tokens"):
            return b"".join(await self._side.pieces(ids)).decode("utf-8", "replace")

    async def describe(self, model: ModelSpec) -> TokenizerInfo:
        async with self._ask("describe its tokenizer"):
            vocabulary = await self._side.vocabulary()
            # The engine makes up a start token for a model that names none.
            start = vocabulary.start if self._has_start or vocabulary.adds_start else -1
            return TokenizerInfo(
                vocabulary_size=vocabulary.size,
                context_window=model.context_window,
                start_token=await self._name(start),
                start_token_id=start if start >= 0 else None,
                end_token=await self._name(vocabulary.end),
                end_token_id=vocabulary.end if vocabulary.end >= 0 else None,
                adds_start_token=vocabulary.adds_start,
            )

    async def _name(self, token: int) -> str | None:
        """The token's name, if writing it gives the token."""
        if token < 0:
            return None
        (piece,) = await self._side.pieces((token,))
        name = piece.decode("utf-8", "replace")
        ids = await self._tokenizer.tokenize(Segment(name, plain=False), special=False)
        return name if ids == (token,) else None

    async def _infill(self, job: Job, suffix: str) -> TokenIds:
        """Fill-in-the-middle: the two texts around the tokens that mark them, in the order models are trained on."""
        async with self._ask("tokenize the prompt"):
            vocabulary = await self._side.vocabulary()
            if not vocabulary.infills:
                raise InvalidRequest(
                    f"The model {job.model.name} has no tokens to fill in text before a suffix.",
                    param="suffix",
                    code="unsupported_parameter",
                )
            prompt = job.prompt or ""
            texts = (prompt, suffix) if isinstance(prompt, str) else (suffix,)
            self._tokenizer.refuse_hopeless(texts, job)
            *before, after = [
                await self._tokenizer.tokenize(Segment(text, plain=True), special=False) for text in texts
            ]
            start = (vocabulary.start,) if vocabulary.adds_start and vocabulary.start >= 0 else ()
            return (
                *start,
                vocabulary.infill_prefix,
                *(before[0] if isinstance(prompt, str) else prompt),
                vocabulary.infill_suffix,
                *after,
                vocabulary.infill_middle,
            )

    async def _known(self, ids: Sequence[int], model: ModelSpec, param: str) -> None:
        """Refuse ids that are not in the vocabulary. None at all is always known."""
        if not ids:
            return
        async with self._ask("look up its vocabulary"):
            size = (await self._side.vocabulary()).size
        if min(ids) < 0 or max(ids) >= size:
            stranger = next(token for token in ids if not 0 <= token < size)
            raise InvalidRequest(
                f"{param} names the token id {stranger}; the vocabulary of the model {model.name} has {size} tokens.",
                param=param,
                allowed=f"0 to {size - 1}",
            )

    @asynccontextmanager
    async def _ask(self, what: str) -> AsyncGenerator[None, None]:
        """A turn to ask the engine something small."""
        await self._asking.enter()
        try:
            yield
        except EngineGone as gone:
            raise Overloaded(RESTARTING, retry_after=1) from gone
        except (EngineRefusal, *NOT_UNDERSTOOD) as error:
            raise UpstreamFailed(f"The embedded engine could not {what}.") from error
        finally:
            self._asking.leave()


def _refuse_mixtures(job: Job) -> None:
    """What the fields of a job do not mean together."""
    if job.shape == "chat":
        if isinstance(job.prompt, tuple):
            raise InvalidRequest(
                f"The model {job.model.name} answers conversations; it takes no token ids.", param="prompt"
            )
        if job.suffix:
            raise InvalidRequest(
                f"The model {job.model.name} answers conversations; it takes no suffix.",
                param="suffix",
                code="unsupported_parameter",
            )
    if job.echo and job.logprobs is not None and (job.suffix or job.shape == "chat"):
        raise InvalidRequest(
            "echo with logprobs needs a prompt that is completed as it is: without a suffix, and not as a message.",
            param="echo",
            code="unsupported_parameter",
        )
