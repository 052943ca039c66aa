"""Errors as OpenAI's API words them, and what may be written about errors in a log."""

from __future__ import annotations

import traceback
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a caller is told in place of an answer.

    Args:
        status: the HTTP status.
        message: a sentence for people.
        param: the field of the request that is wrong.
        code: a word for programs.
        retry_after: seconds after which to try again.
        retry: False tells OpenAI's client not to try again, where it otherwise would.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if not retry:
            self.headers["x-should-retry"] = "false"
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def where(error: BaseException) -> str:
    """The kind of an error and the line that it comes from. Not its message, which may hold a user's text."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{line}"
