"""Files that clients upload, to be looked at by a model later."""

from msgspec import Struct


class Owner(Struct, frozen=True, kw_only=True):
    """Whose a file is: it exists for the same account, app and end user alone."""

    account: str
    app: str | None
    user: str | None


class UploadedFile(Struct, frozen=True, kw_only=True):
    """One upload. `size` in bytes, `created` and `expires` in Unix seconds, `extension` without a dot."""

    id: str
    owner: Owner
    name: str
    extension: str
    media_type: str
    size: int
    created: int
    expires: int
