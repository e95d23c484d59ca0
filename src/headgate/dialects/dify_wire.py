"""What Dify clients send and get, field by field; OpenAPI schemas come from the same structs."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from headgate.dialects.dify_usage import DifyUsage


class WireFile(Struct, frozen=True, kw_only=True):
    """An image to look at, by URL or by the id of an earlier upload."""

    type: str
    transfer_method: str
    url: str | None = None
    upload_file_id: str | None = None


class WireRequest(Struct, frozen=True, kw_only=True):
    """The body of `POST /completion-messages`."""

    inputs: dict[str, Any]
    response_mode: Annotated[str, Meta(extra_json_schema={"enum": ["streaming", "blocking"]})] | None = None
    user: str | None = None
    files: tuple[WireFile, ...] | None = None


class UploadResponse(Struct, frozen=True, kw_only=True):
    """The answer to `POST /files/upload`. `created_by` stands for the end user; `created_at` in Unix seconds."""

    id: str
    name: str
    size: int
    extension: str
    mime_type: str
    created_by: str
    created_at: int


class StopRequest(Struct, frozen=True, kw_only=True):
    """The body of `POST /completion-messages/{task_id}/stop`."""

    user: str | None = None


class Metadata(Struct, frozen=True, kw_only=True):
    usage: DifyUsage
    retriever_resources: tuple[()] = ()


class MessageResponse(Struct, frozen=True, kw_only=True):
    """A blocking answer."""

    event: Literal["message"] = "message"
    task_id: str
    id: str
    message_id: str
    mode: Literal["completion"] = "completion"
    answer: str
    metadata: Metadata
    created_at: int


class MessageEvent(Struct, frozen=True, kw_only=True):
    """A piece of a streamed answer."""

    event: Literal["message"] = "message"
    task_id: str
    message_id: str
    id: str
    created_at: int
    answer: str


class MessageEndEvent(Struct, frozen=True, kw_only=True):
    """The last event of an answer, complete or stopped by its client."""

    event: Literal["message_end"] = "message_end"
    task_id: str
    message_id: str
    id: str
    created_at: int
    metadata: Metadata


class ErrorEvent(Struct, frozen=True, kw_only=True):
    """The last event of a stream that failed."""

    event: Literal["error"] = "error"
    task_id: str
    message_id: str
    created_at: int
    code: str
    message: str
    status: int
