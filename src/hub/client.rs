//! The hub over HTTP: the list of a model's files, what a file is, and its bytes.
//!
//! Requests are those of Python's `huggingface_hub`: `GET /api/models/ID/revision/REV`, then `HEAD`
//! and `GET /ID/resolve/COMMIT/FILE`, where a `HEAD` that leads away from the hub still tells the
//! file's size and its name in the cache (`X-Linked-Size`, `X-Linked-Etag`).

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::id::HubId;
use super::progress::Progress;
use super::settings::Settings;
use crate::error::Error;

/// The pause after the first failure; it doubles with each further one.
const PAUSE: Duration = Duration::from_millis(500);
/// Redirects on the hub itself (of a renamed model) that are followed.
const MOST_REDIRECTS: usize = 5;

/// How hard the hub is tried.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// The longest wait for a connection, an answer, or the next bytes.
    patience: Duration,
    /// Requests in a row that may bring nothing before one fails for good.
    attempts: u32,
}

impl Effort {
    /// For what nothing can be done without.
    pub(super) const NEEDED: Self = Self { patience: Duration::from_secs(30), attempts: 5 };
    /// For what can be done without: a hub out of reach delays nobody for long.
    pub(super) const OPTIONAL: Self = Self { patience: Duration::from_secs(3), attempts: 2 };
}

/// Why the hub did not give something.
#[derive(Debug)]
pub(super) enum Failure {
    /// It answered with an error, and perhaps with its own word for it (`X-Error-Code`).
    Refused { status: u16, code: String },
    /// No answer, or one that broke off.
    Unreachable(String),
    /// An answer that makes no sense.
    Protocol(String),
    /// The cache cannot be written.
    Disk(Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { status, .. } => write!(f, "HTTP {status}"),
            Self::Unreachable(reason) | Self::Protocol(reason) => f.write_str(reason),
            Self::Disk(error) => error.fmt(f),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Disk(error)
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        Self::Unreachable(error.to_string())
    }
}

impl Failure {
    /// Whether the same request may succeed a moment later.
    fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Refused { status, .. } => matches!(status, 408 | 429 | 500..=599),
            Self::Protocol(_) | Self::Disk(_) => false,
        }
    }
}

/// The files of a model at one commit.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// What a file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Remote {
    /// Its name in the cache: a hash of its contents.
    pub(super) etag: String,
    /// Its bytes.
    pub(super) size: u64,
}

/// Requests about one model.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    model: String,
    authorization: Option<String>,
    attempts: u32,
}

impl Client {
    /// # Errors
    /// The certificates that the settings name cannot be read.
    pub(super) fn new(settings: &Settings, id: &HubId, effort: Effort) -> Result<Self, Error> {
        let Effort { patience, attempts } = effort;
        let authorities = settings.authorities.as_ref();
        let roots =
            authorities.map_or(Ok(RootCerts::WebPki), |(variable, path)| roots(variable, path))?;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("reranker/", env!("CARGO_PKG_VERSION")))
            // Sizes are of the file itself.
            .accept_encoding("identity")
            .timeout_resolve(Some(patience))
            .timeout_connect(Some(patience))
            .timeout_recv_response(Some(patience))
            .timeout_per_read(Some(patience))
            .tls_config(TlsConfig::builder().root_certs(roots).build());
        Ok(Self {
            agent: config.build().new_agent(),
            endpoint: settings.endpoint.clone(),
            model: id.name.clone(),
            authorization: settings.token.as_ref().map(|token| format!("Bearer {token}")),
            attempts,
        })
    }

    /// The model's files at `revision`.
    pub(super) fn listing(&self, revision: &str) -> Result<Listing, Failure> {
        #[derive(Deserialize)]
        struct Model {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let revision = revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}", self.endpoint, self.model);
        let text = self.retry(|| {
            let mut response = accepted(self.get(&url, 0)?)?;
            Ok(response.body_mut().read_to_string()?)
        })?;
        let model: Model = serde_json::from_str(&text)
            .map_err(|error| Failure::Protocol(format!("{url} is not a list of files: {error}")))?;
        let files = model.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(Listing { commit: file_name(&model.sha)?, files })
    }

    /// What the file `name` is at `commit`.
    pub(super) fn head(&self, commit: &str, name: &str) -> Result<Remote, Failure> {
        self.retry(|| {
            let mut url = self.url(commit, name);
            for _ in 0..MOST_REDIRECTS {
                let request = self.agent.head(&url).config().max_redirects(0).build();
                let request = match &self.authorization {
                    Some(token) => request.header("Authorization", token),
                    None => request,
                };
                let response = request.call()?;
                match header(response.headers(), "location") {
                    // A place on the hub itself: the answer is there. Elsewhere: it is here.
                    Some(place) if response.status().is_redirection() && place.starts_with('/') => {
                        url = format!("{}{place}", origin(&self.endpoint));
                    }
                    _ => return remote(&accepted(response)?, name),
                }
            }
            Err(Failure::Protocol(format!("{name}: too many redirects")))
        })
    }

    /// Completes the file `to`, which holds the first bytes of `name` or is not there.
    pub(super) fn download(
        &self,
        commit: &str,
        name: &str,
        size: u64,
        to: &Path,
    ) -> Result<(), Failure> {
        let io = |action| move |source| Error::Io { path: to.to_owned(), action, source };
        let mut file =
            OpenOptions::new().create(true).append(true).open(to).map_err(io("create"))?;
        let mut progress = Progress::new(format!("{} {name}", self.model), size);
        let (mut best, mut failures) = (0, 0);
        loop {
            let mut have = file.metadata().map_err(io("read"))?.len();
            if have > size {
                file.set_len(0).map_err(io("truncate"))?;
                have = 0;
            }
            progress.at(have);
            if have == size {
                return Ok(file.sync_all().map_err(io("flush"))?);
            }
            let result = self.append(commit, name, (have, size), (&mut file, to), &mut progress);
            let reason = match result {
                Err(failure) if !failure.is_passing() => return Err(failure),
                result => result.err(),
            };
            let arrived = file.metadata().map_err(io("read"))?.len();
            failures = if arrived > best { 0 } else { failures + 1 };
            best = best.max(arrived);
            if failures == self.attempts {
                let broke_off =
                    || Failure::Unreachable(format!("{name} breaks off again and again"));
                return Err(reason.unwrap_or_else(broke_off));
            }
            if arrived < size {
                progress.say(&format!("{name}: broke off at {arrived} of {size} bytes, going on"));
                std::thread::sleep(PAUSE * 2_u32.pow(failures));
            }
        }
    }

    /// Asks for the bytes from `have` to `size` and appends what comes.
    fn append(
        &self,
        commit: &str,
        name: &str,
        (have, size): (u64, u64),
        (file, path): (&mut File, &Path),
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        let io = |source| Error::Io { path: path.to_owned(), action: "write", source };
        let response = accepted(self.get(&self.url(commit, name), have)?)?;
        let range = header(response.headers(), "content-range").unwrap_or_default();
        let mut at = have;
        if have > 0 && !range.starts_with(&format!("bytes {have}-")) {
            // A server that knows no ranges sends all of it.
            file.set_len(0).map_err(io)?;
            at = 0;
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0_u8; 1 << 18];
        loop {
            let bytes = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(bytes) => bytes,
                Err(error) => return Err(Failure::Unreachable(error.to_string())),
            };
            at += bytes as u64;
            if at > size {
                return Err(Failure::Protocol(format!("{name} is longer than {size} bytes")));
            }
            file.write_all(&buffer[..bytes]).map_err(io)?;
            progress.at(at);
        }
    }

    /// Tries a small request again where that may help.
    fn retry<T>(&self, mut request: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut failures = 0;
        loop {
            match request() {
                Err(failure @ Failure::Refused { .. })
                    if failure.is_passing() && failures + 1 < self.attempts =>
                {
                    std::thread::sleep(PAUSE * 2_u32.pow(failures));
                    failures += 1;
                }
                result => return result,
            }
        }
    }

    fn url(&self, commit: &str, name: &str) -> String {
        format!("{}/{}/resolve/{commit}/{name}", self.endpoint, self.model)
    }

    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.authorization {
            request = request.header("Authorization", token);
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        Ok(request.call()?)
    }
}

/// The certificates of the file that `variable` names, or of the files of that directory. There, as for
/// OpenSSL, one that cannot be read is passed over, such as a link that leads nowhere.
fn roots(variable: &str, path: &Path) -> Result<RootCerts, Error> {
    let useless = |why: &dyn fmt::Display| {
        Error::Usage(format!(
            "{variable} names {}: {why}; expected a file, or a directory of files, with the certificates of \
             the authorities to trust, in PEM form",
            path.display()
        ))
    };
    let unread = |error| useless(&format_args!("cannot read: {error}"));
    let texts: Vec<_> = if path.is_dir() {
        let files =
            fs::read_dir(path).map_err(unread)?.filter_map(|entry| Some(entry.ok()?.path()));
        files.filter(|file| file.is_file()).filter_map(|file| fs::read(file).ok()).collect()
    } else {
        vec![fs::read(path).map_err(unread)?]
    };
    let items = texts.iter().flat_map(|text| parse_pem(text));
    let found: Vec<_> = items
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        return Err(useless(&"no certificate there"));
    }
    Ok(found.into())
}

/// The response, unless it is an error's.
fn accepted(response: Response<Body>) -> Result<Response<Body>, Failure> {
    let status = response.status();
    if status.is_success() || status.is_redirection() {
        return Ok(response);
    }
    let code = header(response.headers(), "x-error-code").unwrap_or_default().to_owned();
    Err(Failure::Refused { status: status.as_u16(), code })
}

fn remote(response: &Response<Body>, name: &str) -> Result<Remote, Failure> {
    let either = |linked: &str, plain: &str| {
        header(response.headers(), linked).or_else(|| header(response.headers(), plain))
    };
    let missing = |what: &str| Failure::Protocol(format!("{name} comes without {what}"));
    let etag = either("x-linked-etag", "etag").ok_or_else(|| missing("an ETag"))?;
    let size = either("x-linked-size", "content-length").and_then(|size| size.parse().ok());
    Ok(Remote {
        etag: file_name(etag.trim_start_matches("W/").trim_matches('"'))?,
        size: size.ok_or_else(|| missing("its size"))?,
    })
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// What becomes a file's name must not lead anywhere else.
fn file_name(text: &str) -> Result<String, Failure> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if text.is_empty() || text.starts_with('.') || !text.chars().all(is_plain) {
        return Err(Failure::Protocol(format!("{text:?} is not a hash")));
    }
    Ok(text.to_owned())
}

/// Scheme and host of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    url[host..].find('/').map_or(url, |slash| &url[..host + slash])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn authorities_are_read_from_a_file_or_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one.pem"), dir.path().join("other"));
        let pem = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        fs::write(&one, format!("# ours\n{pem}{pem}")).unwrap();
        let count = |path: &Path| match roots("SSL_CERT_FILE", path) {
            Ok(RootCerts::Specific(found)) => Ok(found.len()),
            Ok(_) => Ok(0),
            Err(error) => Err(error.to_string()),
        };
        assert_eq!((count(&one), count(dir.path())), (Ok(2), Ok(2)));
        let missing = count(&other).unwrap_err();
        let expected =
            format!("SSL_CERT_FILE names {}: cannot read: No such file", other.display());
        assert!(missing.starts_with(&expected), "{missing}");
        // As a removed package leaves it.
        std::os::unix::fs::symlink("nowhere", dir.path().join("link.pem")).unwrap();
        fs::write(&other, "nothing").unwrap();
        assert_eq!(count(dir.path()), Ok(2));
        assert!(count(&other).unwrap_err().contains("no certificate there"));
    }

    #[test]
    fn origins_and_names() {
        assert_eq!(origin("https://a.b:1/c/d"), "https://a.b:1");
        assert_eq!(origin("http://a"), "http://a");
        assert_eq!(file_name("abc-1.z").ok().as_deref(), Some("abc-1.z"));
        for bad in ["", "../x", "a/b", ".x"] {
            assert!(file_name(bad).is_err(), "{bad:?}");
        }
    }
}
