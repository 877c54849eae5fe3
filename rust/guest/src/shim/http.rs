//! The little of HTTP/1.1 that a monitor needs: requests without bodies in, answers with a length out. No I/O here.
//!
//! Rules: a request's head is at most 8 KiB. A body is not read: a request that has one is answered and the connection closed.
//! Source: RFC 9112.

/// Longest head of a request.
pub const HEAD_BYTES_MAX: usize = 8192;

/// What a client wants.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// GET, HEAD, or another.
    pub method: String,
    /// The path, without its query.
    pub path: String,
    /// Whether more requests may follow on this connection.
    pub keeps_alive: bool,
}

/// What the bytes so far are.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Not yet a whole head.
    More,
    /// A request of so many bytes.
    Whole(Request, usize),
    /// No request: that status, and the end.
    Bad(u16),
}

/// Look at what came.
pub fn parse(buffer: &[u8]) -> Parsed {
    let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else {
        return if buffer.len() > HEAD_BYTES_MAX { Parsed::Bad(431) } else { Parsed::More };
    };
    if end > HEAD_BYTES_MAX {
        return Parsed::Bad(431);
    }
    let Ok(head) = std::str::from_utf8(&buffer[..end]) else { return Parsed::Bad(400) };
    match parse_head(head) {
        Some(request) => Parsed::Whole(request, end + 4),
        None => Parsed::Bad(400),
    }
}

fn parse_head(head: &str) -> Option<Request> {
    let mut lines = head.split("\r\n");
    let mut words = lines.next()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let is_token =
        |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte));
    if words.next().is_some() || !is_token(method) || !(version == "HTTP/1.1" || version == "HTTP/1.0") {
        return None;
    }
    let mut keeps_alive = version == "HTTP/1.1";
    for line in lines {
        let (name, value) = line.split_once(':')?;
        let value = value.trim();
        if !is_token(name) {
            return None;
        }
        if name.eq_ignore_ascii_case("connection") {
            let mut words = value.split(',').map(str::trim);
            keeps_alive = if keeps_alive {
                !words.any(|word| word.eq_ignore_ascii_case("close"))
            } else {
                words.any(|word| word.eq_ignore_ascii_case("keep-alive"))
            };
        }
        if name.eq_ignore_ascii_case("transfer-encoding") || name.eq_ignore_ascii_case("content-length") && value != "0" {
            keeps_alive = false;
        }
    }
    // The absolute form: http://host/path.
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |start| &rest[start..]),
        None if target.starts_with('/') => target,
        None => return None,
    };
    let path = path.split('?').next().unwrap_or_default().to_owned();
    Some(Request { method: method.to_owned(), path, keeps_alive })
}

/// Write an answer; `is_head` leaves its body out.
pub fn answer(status: u16, content_type: &str, body: &str, is_head: bool, keeps_alive: bool) -> Vec<u8> {
    let reason = match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        431 => "Request Header Fields Too Large",
        _ => "Internal Server Error",
    };
    let allow = if status == 405 { "Allow: GET, HEAD\r\n" } else { "" };
    let connection = if keeps_alive { "keep-alive" } else { "close" };
    let head = format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n{allow}Connection: {connection}\r\n\r\n",
        body.len()
    );
    let mut bytes = head.into_bytes();
    if !is_head {
        bytes.extend_from_slice(body.as_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::{Parsed, Request, answer, parse};

    fn whole(text: &str) -> Option<Request> {
        match parse(text.as_bytes()) {
            Parsed::Whole(request, n_bytes) => {
                assert_eq!(n_bytes, text.len());
                Some(request)
            }
            _ => None,
        }
    }

    #[test]
    fn requests_are_read() {
        let request = whole("GET /metrics?x=1 HTTP/1.1\r\nHost: shim\r\n\r\n").expect("it is one");
        assert_eq!(request, Request { method: "GET".into(), path: "/metrics".into(), keeps_alive: true });
        assert!(!whole("GET / HTTP/1.1\r\nConnection: x, Close\r\n\r\n").expect("it is one").keeps_alive);
        assert!(!whole("GET / HTTP/1.0\r\n\r\n").expect("it is one").keeps_alive);
        assert!(whole("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n").expect("it is one").keeps_alive);
        assert!(!whole("POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n").expect("it is one").keeps_alive);
        assert_eq!(whole("GET http://shim/agent-url HTTP/1.1\r\n\r\n").expect("it is one").path, "/agent-url");
        assert_eq!(parse(b"GET / HTTP/1.1\r\n"), Parsed::More);
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in [
            "\r\n\r\n",
            "GET /\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "GET x HTTP/1.1\r\n\r\n",
            "G(T / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nno colon\r\n\r\n",
            "GET / HTTP/1.1\r\n : x\r\n\r\n",
        ] {
            assert_eq!(parse(text.as_bytes()), Parsed::Bad(400), "{text:?}");
        }
        assert_eq!(parse(b"GET / HTTP/1.1\r\nx: \xff\r\n\r\n"), Parsed::Bad(400));
        assert_eq!(parse(&[b'x'; 9000]), Parsed::Bad(431));
    }

    #[test]
    fn answers_have_a_length() {
        let text = String::from_utf8(answer(405, "text/plain", "no", true, false)).expect("it is text");
        assert!(text.starts_with("HTTP/1.1 405 Method Not Allowed\r\n") && text.contains("Allow: GET, HEAD\r\n"));
        assert!(text.contains("Content-Length: 2\r\n") && text.ends_with("Connection: close\r\n\r\n"));
    }
}
