//! A server on the loopback interface that speaks the Hugging Face hub's protocol: the list of a
//! model's files, `HEAD` with `ETag`, `X-Repo-Commit` and `X-Linked-Size`, weights on another host,
//! ranges, refusals, and connections that break off.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// The commit of every model here.
pub const COMMIT: &str = "5f3c8a1e0b7d42964c1fa83e6d92b05747ce18aa";

/// What the server does beside the ordinary.
#[derive(Debug, Clone, Default)]
pub struct Manner {
    /// Requests without this token are refused.
    pub token: Option<String>,
    /// The first download of a weight file ends after so many bytes.
    pub cut_at: Option<usize>,
    /// Ranges are not understood: every download is of the whole file.
    pub ignores_ranges: bool,
    /// An answer to every request: a status line and `X-Error-Code`.
    pub refuses: Option<(&'static str, &'static str)>,
    /// An answer to every request for a file: a status line.
    pub keeps: Option<&'static str>,
}

/// A hub with one model, `org/name`.
pub struct HubServer {
    pub url: String,
    seen: Arc<Mutex<Vec<String>>>,
}

impl HubServer {
    /// Serves `files`, by name, until the test ends.
    pub fn start(files: BTreeMap<String, Vec<u8>>, manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let hub = Hub { files, manner, port, seen: Arc::clone(&seen) };
        std::thread::spawn(move || {
            let hub = Arc::new(hub);
            for stream in listener.incoming() {
                let hub = Arc::clone(&hub);
                // A client that goes away in the middle is part of some tests.
                std::thread::spawn(move || drop(hub.answer(&stream.unwrap())));
            }
        });
        Self { url: format!("http://127.0.0.1:{port}"), seen }
    }

    /// Requests so far, as `METHOD path range`; paths end at the commit's file or the listing.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    /// How many requests so far begin with `start`.
    pub fn count(&self, start: &str) -> usize {
        self.seen().iter().filter(|line| line.starts_with(start)).count()
    }
}

struct Hub {
    files: BTreeMap<String, Vec<u8>>,
    manner: Manner,
    port: u16,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn answer(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream).lines();
        let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
        let mut headers = BTreeMap::new();
        for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':').unwrap();
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let mut words = first.split(' ');
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let range = headers.get("range").map_or("", |range| range);
        let is_repeated = {
            let mut seen = self.seen.lock().unwrap();
            let line = format!("{method} {path} {range}").trim_end().to_owned();
            let is_repeated = seen.iter().any(|seen| seen.starts_with(&format!("{method} {path}")));
            seen.push(line);
            is_repeated
        };
        let is_cdn = path.starts_with("/cdn/");
        let token = headers.get("authorization").and_then(|value| value.strip_prefix("Bearer "));
        assert!(!is_cdn || token.is_none(), "the token went to another host");
        if let Some((status, code)) = self.manner.refuses {
            return reply(stream, status, &format!("X-Error-Code: {code}\r\n"), b"", method);
        }
        if !is_cdn && self.manner.token.as_deref().is_some_and(|wanted| token != Some(wanted)) {
            let code = "X-Error-Code: RepoNotFound\r\n";
            return reply(stream, "401 Unauthorized", code, b"", method);
        }
        if let Some(revision) = path.strip_prefix("/api/models/org/name/revision/") {
            return self.listing(stream, revision, method);
        }
        if let Some(status) = self.manner.keeps {
            return reply(stream, status, "", b"", method);
        }
        let at = format!("/org/name/resolve/{COMMIT}/");
        let name = path.strip_prefix(&at).or_else(|| path.strip_prefix("/cdn/")).unwrap_or("");
        let Some(bytes) = self.files.get(name) else {
            let code = "X-Error-Code: RepoNotFound\r\n";
            return reply(stream, "404 Not Found", code, b"", method);
        };
        let etag = etag(bytes);
        if is_weights(name) && !is_cdn {
            let head = format!(
                "X-Repo-Commit: {COMMIT}\r\nX-Linked-Size: {}\r\nX-Linked-Etag: \"{etag}\"\r\n\
                 ETag: \"of-the-pointer\"\r\nLocation: http://localhost:{}/cdn/{name}\r\n",
                bytes.len(),
                self.port
            );
            return reply(stream, "302 Found", &head, b"", method);
        }
        let mut head = format!("X-Repo-Commit: {COMMIT}\r\nETag: \"{etag}\"\r\n");
        let from = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        let (mut status, mut begin) = ("200 OK", 0);
        if let (Some(from), false) = (from, self.manner.ignores_ranges) {
            begin = from.parse::<usize>().unwrap();
            status = "206 Partial Content";
            let (last, size) = (bytes.len() - 1, bytes.len());
            let _ = write!(head, "Content-Range: bytes {begin}-{last}/{size}\r\n");
        }
        match self.manner.cut_at {
            Some(end) if is_cdn && !is_repeated => {
                let length = bytes.len() - begin;
                write!(stream, "HTTP/1.1 {status}\r\n{head}Content-Length: {length}\r\n\r\n")?;
                stream.write_all(&bytes[begin..end])
            }
            _ => reply(stream, status, &head, &bytes[begin..], method),
        }
    }

    fn listing(&self, stream: &TcpStream, revision: &str, method: &str) -> std::io::Result<()> {
        if !["main", "v1", COMMIT].contains(&revision) {
            let code = "X-Error-Code: RevisionNotFound\r\n";
            return reply(stream, "404 Not Found", code, b"", method);
        }
        let files = self.files.keys().map(|name| serde_json::json!({"rfilename": name}));
        let files: Vec<_> = files.collect();
        let body = serde_json::json!({"id": "org/name", "sha": COMMIT, "siblings": files});
        reply(stream, "200 OK", "", body.to_string().as_bytes(), method)
    }
}

fn is_weights(name: &str) -> bool {
    [".safetensors", ".bin", ".onnx"].iter().any(|ending| name.ends_with(ending))
}

/// A name made from the contents, as the hub's are.
pub fn etag(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn reply(
    mut stream: &TcpStream,
    status: &str,
    head: &str,
    body: &[u8],
    method: &str,
) -> std::io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{head}Content-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    if method == "HEAD" { Ok(()) } else { stream.write_all(body) }
}
