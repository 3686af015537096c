"""What a client did wrong, in the shape in which OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from rmse_edge.errors import ArgumentError, UserError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RequestError(UserError):
    """A request is refused; `str` of it is one line that names the field and the fix."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def document(self) -> dict[str, Any]:
        """As it is sent."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refused(error: UserError, param: str | None = None) -> RequestError:
    """A failure of the library as an answer to a request: what a user can mend, a client can."""
    if isinstance(error, RequestError):
        return error
    return RequestError(str(error), param=error.name if isinstance(error, ArgumentError) else param)
