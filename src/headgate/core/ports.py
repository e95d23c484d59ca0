"""The doors of the core: what the service needs from providers, stores and time."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from headgate.core.accounts import Balance, Hold, Kept, KeyRecord, Settlement, UsageRow
from headgate.core.completion import Chunk, Completion, IdempotencyKey, Job
from headgate.core.files import Owner, UploadedFile
from headgate.core.models import ModelSpec, TokenizerInfo


class Clock(Protocol):
    def time(self) -> float:
        """Unix time in seconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...


class Tokenizer(Protocol):
    """A model's tokenizer, for clients that ask for it by itself.

    Errors: InvalidRequest (ids outside the vocabulary, a text too long), Overloaded, UpstreamError.
    """

    async def tokenize(
        self, model: ModelSpec, text: str, *, add_special: bool, parse_special: bool
    ) -> tuple[int, ...]:
        """The text's token ids; `add_special`: with the start token where the model wants one; `parse_special`:
        special tokens written in the text become themselves."""
        ...

    async def detokenize(self, model: ModelSpec, ids: Sequence[int]) -> str:
        """The ids' text, special tokens as written; half characters become U+FFFD."""
        ...

    async def describe_tokenizer(self, model: ModelSpec) -> TokenizerInfo: ...


class Provider(Protocol):
    """How the core speaks to an upstream.

    `on_sent` is called once, when the request has left for the upstream: from then on its prompt is owed.
    Before that nothing is. Cancelling a call closes its upstream connection. Errors: UpstreamError, Overloaded,
    ModelUnavailable, and InvalidRequest for what this upstream cannot do.

    A job with `echo` has its prompt first in every choice: as an `echoed` chunk from `stream`, within the choice from
    `complete`. Where the job asks for `logprobs`, every choice has them, in the same pieces either way.
    """

    name: str
    stream_only: bool
    """True where `complete` has no cheaper way than collecting `stream`; the service then streams always."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where no tokenizer is at hand."""
        ...

    def unavailable(self, model: ModelSpec) -> str | None:
        """Why the model cannot be called at all (no key, broken file), or None."""
        ...

    async def count_prompt(self, job: Job) -> int | None:
        """Exact prompt tokens of the job, or None where no tokenizer is at hand.

        Called before anything is held: what this provider can refuse by looking, it refuses here (InvalidRequest).
        """
        ...

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion: ...

    def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        """Chunks as they arrive; what arrived together comes together, so that it can leave together."""
        ...

    async def aclose(self) -> None: ...


class Ledger(Protocol):
    """Durable money. Every method enqueues at once, in order; awaiting waits for the commit.

    A cancelled wait does not undo what was enqueued. LedgerUnavailable when nothing can be recorded.
    """

    def remembered(self, key: IdempotencyKey) -> Awaitable[Kept | None]:
        """What became of the request with this key; None when there was none. IdempotencyMismatch when it was another
        request, IdempotencyConflict while it is under way."""
        ...

    def hold(self, hold: Hold, key: IdempotencyKey | None = None) -> Awaitable[None]:
        """Set `hold.amount` aside, atomically. InsufficientFunds when available is less.

        With a key it is noted in the same transaction that the request is under way; IdempotencyConflict when it was
        known already.
        """
        ...

    def checkpoint(self, hold_id: str, rows: Sequence[UsageRow]) -> None:
        """Remember what to charge should we die. Not awaited; a resolved hold ignores it."""
        ...

    def settle(
        self,
        hold_id: str,
        rows: Sequence[UsageRow],
        *,
        keyed: bool = True,
        outcome: bytes | None = None,
    ) -> Awaitable[Settlement]:
        """Charge the rows' prices, free the rest of the hold, record the usage rows; one transaction.

        With prices summing to 0 this is a release. KeyError when the hold is already resolved. Of a request that is (or
        may be) `keyed` the outcome is kept in the same transaction; without one, and without a charge, it is forgotten.
        """
        ...

    def balance(self, account: str) -> Awaitable[Balance | None]: ...

    def ping(self) -> Awaitable[None]:
        """A real round trip to the database."""
        ...


class Files(Protocol):
    """Uploads, kept until they expire. Methods may be called from any thread, and wait for the disk."""

    def reserve(self, file_id: str, account: str, size: int) -> Path:
        """Keep room for an upload that is to come, for an hour at most. Overloaded when there is none.

        Returns the folder where its bytes may wait until then, in files without a name.
        """
        ...

    def release(self, file_id: str, account: str) -> None:
        """Give back the room of an upload that was not saved."""
        ...

    def save(self, file: UploadedFile, content: bytes) -> None:
        """In the room that was reserved under its id, or any other. Overloaded when there is none."""
        ...

    def load(self, file_id: str, owner: Owner) -> tuple[UploadedFile, bytes] | None:
        """None for what does not exist, has expired or belongs to somebody else."""
        ...


class ImageSource(Protocol):
    """Images by URL, which clients choose: no address of a private network is ever connected to.

    Each `caller` has a share of what can be done at once. Errors: InvalidRequest naming `param`, whatever went wrong
    out there, nothing is told of what answered; Overloaded when the caller's share is in use for too long.
    """

    async def check(self, url: str, param: str, *, caller: str = "") -> str:
        """Refuse what `fetch` would refuse by looking at the URL and its addresses alone. Returns the URL as read."""
        ...

    async def fetch(self, url: str, param: str, *, caller: str = "") -> bytes: ...

    async def aclose(self) -> None: ...


class AccountStore(Protocol):
    """Credentials and accounts, read on the way of a request."""

    async def key_by_digest(self, digest: bytes) -> KeyRecord | None:
        """The unrevoked key with this SHA-256, or None."""
        ...

    async def token_state(self, account: str, jti: str | None) -> bool:
        """True when the account exists and the token id is not revoked."""
        ...
