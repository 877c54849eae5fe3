"""Failures: how an error of the tree is answered."""

from typing import Final

from isopod.net.http.messages import HttpError, Response
from isopod.net.http.status import status_of
from isopod.world.errors import IsopodError

RETRY_AFTER_S: Final = 1


def answer_error(error: IsopodError, retry_after_s: int = RETRY_AFTER_S) -> Response | None:
    """Return the answer to an error that is the client's business, None for one that is only ours (a bug, damaged data).

    Args:
        error: Raised by a handler.
        retry_after_s: What a 503 tells the client.
    """
    status, headers = (error.status, error.headers) if isinstance(error, HttpError) else (status_of(error), ())
    if status == 500 and not isinstance(error, HttpError):
        return None
    if status == 503 and not any(name.lower() == "retry-after" for name, _ in headers):
        headers = (*headers, ("retry-after", str(retry_after_s)))
    return Response.error(status, error.message, error.hint, code=error.code, headers=headers)
