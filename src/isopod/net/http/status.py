"""Status codes: their reason phrases, their ready-made status lines, and which failure of the error tree is which code.

Source: RFC 9110 section 15, RFC 6585 (428, 429, 431), RFC 4918 (507).
"""

from typing import Final

from isopod.world import errors

REASONS: Final[dict[int, str]] = {
    100: "Continue",
    101: "Switching Protocols",
    103: "Early Hints",
    200: "OK",
    201: "Created",
    202: "Accepted",
    203: "Non-Authoritative Information",
    204: "No Content",
    205: "Reset Content",
    206: "Partial Content",
    300: "Multiple Choices",
    301: "Moved Permanently",
    302: "Found",
    303: "See Other",
    304: "Not Modified",
    307: "Temporary Redirect",
    308: "Permanent Redirect",
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    406: "Not Acceptable",
    407: "Proxy Authentication Required",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    411: "Length Required",
    412: "Precondition Failed",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    417: "Expectation Failed",
    418: "I'm a teapot",
    421: "Misdirected Request",
    422: "Unprocessable Content",
    423: "Locked",
    424: "Failed Dependency",
    425: "Too Early",
    426: "Upgrade Required",
    428: "Precondition Required",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    451: "Unavailable For Legal Reasons",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
    508: "Loop Detected",
    511: "Network Authentication Required",
}

# Looked up along an error's classes, the nearest first.
_BY_ERROR: Final[dict[type[errors.IsopodError], int]] = {
    errors.UsageError: 400,
    errors.Unsupported: 501,
    errors.RefusedError: 403,
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.WrongState: 409,
    errors.InUse: 409,
    errors.Exhausted: 503,
    errors.CommandNotRunnable: 422,
    errors.PeerError: 502,
    errors.DeadlineExceeded: 504,
    errors.Cancelled: 503,
    errors.UnavailableError: 503,
    errors.DiskFull: 507,
    errors.RuntimeFailed: 502,
    errors.CorruptError: 500,
    errors.BadArchive: 422,
    errors.DigestMismatch: 422,
    errors.BugError: 500,
}


def reason(status: int) -> str:
    """Return the reason phrase, "Unknown" for a code without one."""
    return REASONS.get(status, "Unknown")


def code_of(status: int) -> str:
    """Return the word that stands for a status in an error's JSON body: "not_found" for 404."""
    return "".join(c for c in reason(status).lower().replace(" ", "_").replace("-", "_") if c.isalpha() or c == "_")


def status_of(error: errors.IsopodError) -> int:
    """Return the status code that a failure of the error tree is answered with."""
    for cls in type(error).__mro__:
        found = _BY_ERROR.get(cls)
        if found is not None:
            return found
    return 500


STATUS_LINES: Final[dict[int, bytes]] = {status: f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii") for status, phrase in REASONS.items()}


def status_line(status: int) -> bytes:
    """Return "HTTP/1.1 CODE REASON" with its line end."""
    found = STATUS_LINES.get(status)
    return found if found is not None else f"HTTP/1.1 {status} {reason(status)}\r\n".encode("ascii")
