//! Where the hub and its cache are, from the environment as Python's `huggingface_hub` reads it.

use std::path::PathBuf;

use crate::error::{Error, Result};

/// The public hub.
const ENDPOINT: &str = "https://huggingface.co";

/// What the environment says.
pub(super) struct Settings {
    /// The directory of cached models: `HF_HUB_CACHE`, else `hub` inside `HF_HOME`.
    pub(super) cache: PathBuf,
    /// The hub's address, without a slash at its end: `HF_ENDPOINT`.
    pub(super) endpoint: String,
    /// The access token: `HF_TOKEN`, else what `hf auth login` has left in a file.
    pub(super) token: Option<String>,
    /// The certificates of authorities to trust in place of the built-in ones, a file of them or a directory of
    /// files, with the variable that names it: `REQUESTS_CA_BUNDLE`, else `CURL_CA_BUNDLE`, else `SSL_CERT_FILE`.
    pub(super) authorities: Option<(&'static str, PathBuf)>,
    /// Whether no request may be made: `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`.
    pub(super) offline: bool,
}

impl Settings {
    /// Reads the environment.
    pub(super) fn from_env() -> Result<Self> {
        Self::read(&|name| std::env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    /// Reads variables through `var`, which has no empty ones.
    fn read(var: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let user_home = var("HOME").map(PathBuf::from);
        let path = |name: &str| {
            let text = expanded(&var(name)?, var);
            Some(match (text.strip_prefix("~/"), &user_home) {
                (Some(rest), Some(user_home)) => user_home.join(rest),
                _ => PathBuf::from(text),
            })
        };
        let caches = path("XDG_CACHE_HOME").or_else(|| Some(user_home.as_ref()?.join(".cache")));
        let home = path("HF_HOME").or_else(|| Some(caches?.join("huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .ok_or_else(|| {
                Error::Usage(
                    "none of HF_HUB_CACHE, HF_HOME and HOME is set, so there is no place for models \
                     of the hub; set HF_HOME to a directory"
                        .into(),
                )
            })?;
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
        let token = var("HF_TOKEN")
            .or_else(|| var("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| std::fs::read_to_string(token_file?).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let is_on = |name: &str| {
            var(name).is_some_and(|value| {
                ["1", "on", "yes", "true"].contains(&value.trim().to_ascii_lowercase().as_str())
            })
        };
        Ok(Self {
            cache,
            endpoint: endpoint.trim().trim_end_matches('/').to_owned(),
            token,
            authorities: ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"]
                .into_iter()
                .find_map(|name| Some((name, PathBuf::from(var(name)?)))),
            offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
        })
    }
}

/// A path with the values of variables in place of `$NAME` and `${NAME}`. Those that are not set stay, as in
/// Python.
fn expanded(path: &str, var: &dyn Fn(&str) -> Option<String>) -> String {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (mut whole, mut rest) = (String::new(), path);
    while let Some((before, after)) = rest.split_once('$') {
        whole.push_str(before);
        let braced = after.strip_prefix('{').and_then(|inside| inside.split_once('}'));
        let (name, behind) = braced.unwrap_or_else(|| {
            after.split_at(after.find(|c: char| !is_of_name(c)).unwrap_or(after.len()))
        });
        let written = &rest[before.len()..rest.len() - behind.len()];
        whole.push_str(&var(name).unwrap_or_else(|| written.to_owned()));
        rest = behind;
    }
    whole + rest
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Settings> {
        let find = |name: &str| vars.iter().find(|(key, _)| *key == name);
        Settings::read(&|name| find(name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_cache_is_where_python_puts_it() {
        for (vars, expected) in [
            (&[("HOME", "/u")][..], "/u/.cache/huggingface/hub"),
            (&[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HOME", "/u"), ("HF_HOME", "~/hf")], "/u/hf/hub"),
            (&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")], "/c"),
            (&[("HF_HOME", "$A/${A}x$B/$"), ("A", "/a")], "/a//ax$B/$/hub"),
            (&[("HOME", "/u"), ("HF_HUB_CACHE", "~/${A-}/$A.b"), ("A", "c")], "/u/${A-}/c.b"),
        ] {
            assert_eq!(read(vars).unwrap().cache, PathBuf::from(expected), "{vars:?}");
        }
        let error = read(&[]).err().unwrap().to_string();
        assert!(error.contains("set HF_HOME"), "{error}");
    }

    #[test]
    fn endpoint_token_and_offline() {
        let plain = read(&[("HF_HOME", "/nowhere")]).unwrap();
        assert_eq!((&*plain.endpoint, &plain.token, plain.offline), (ENDPOINT, &None, false));
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        let set = read(&[
            ("HF_HOME", home),
            ("HF_ENDPOINT", "http://mirror/path/"),
            ("HF_HUB_OFFLINE", "Yes"),
        ]);
        let set = set.unwrap();
        assert_eq!((&*set.endpoint, set.offline), ("http://mirror/path", true));
        assert_eq!(set.token.as_deref(), Some("hf_file"));
        let set = read(&[("HF_HOME", home), ("HF_TOKEN", " hf_env "), ("HF_HUB_OFFLINE", "0")]);
        let set = set.unwrap();
        assert_eq!((set.token.as_deref(), set.offline), (Some("hf_env"), false));
        let both = [("HF_HOME", home), ("SSL_CERT_FILE", "/a"), ("REQUESTS_CA_BUNDLE", "/b")];
        let authorities = |vars| read(vars).unwrap().authorities;
        assert_eq!(authorities(&both), Some(("REQUESTS_CA_BUNDLE", PathBuf::from("/b"))));
        assert_eq!(authorities(&both[..2]), Some(("SSL_CERT_FILE", PathBuf::from("/a"))));
    }
}
