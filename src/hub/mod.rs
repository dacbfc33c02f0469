//! Model names to model directories: a local directory, or a hub id that is looked up in the Hugging
//! Face cache and, where it is not there in full, fetched from the hub into it.
//!
//! The cache has the layout of Python's `huggingface_hub`, and its environment variables hold here
//! too: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`. What
//! the cache holds in full is used without asking the hub, so that workers which start after
//! the launcher's check touch no network and read the same revision. Free of torch.

mod cache;
mod client;
mod files;
mod id;
mod progress;
mod settings;

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

use cache::CachedModel;
use client::{Client, Failure};
use id::HubId;
use settings::Settings;

/// A model directory, and the hub's name for it where it came from there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelDir {
    /// The directory.
    pub path: PathBuf,
    /// The commit of the hub that the directory is a snapshot of; `None` for a local directory.
    pub revision: Option<String>,
}

/// Finds the model that `name` means: an existing directory, or a hub id (`name`, `org/name`, each
/// with `@revision` where it is not `main`), which is downloaded where the cache lacks it. Several
/// processes may do so at once; one downloads and the others wait.
///
/// # Errors
/// [`Error::Usage`] when there is neither, or the hub refuses or cannot be reached: it names the
/// places looked in. [`Error::Io`] when the cache cannot be written.
pub fn resolve(name: &str) -> Result<ModelDir> {
    let path = Path::new(name);
    if path.is_dir() {
        return Ok(ModelDir { path: path.to_owned(), revision: None });
    }
    if path.exists() {
        return Err(Error::Usage(format!("{name:?} is a file, expected a model directory")));
    }
    let Some(id) = HubId::parse(name) else {
        return Err(Error::Usage(format!(
            "no directory {name:?} here, and it does not read as a hub id; expected a directory with \
             config.json, model.safetensors and tokenizer.json, or an id like org/name"
        )));
    };
    let settings = Settings::from_env()?;
    let cached = CachedModel::new(&settings.cache, &id.name);
    if let Some((path, revision)) = cached.snapshot(&id.revision) {
        return Ok(ModelDir { path, revision: Some(revision) });
    }
    if settings.offline {
        return Err(Error::Usage(format!(
            "no directory {name:?} here, and the Hugging Face cache {} does not hold that model in \
             full, while HF_HUB_OFFLINE forbids fetching it; give a directory, or fetch the model \
             once without HF_HUB_OFFLINE",
            settings.cache.display()
        )));
    }
    fetch(&id, &settings, &cached).map_err(|failure| explain(failure, &id, &settings))
}

/// Brings every needed file into the cache, weights last: a snapshot with weights is complete.
fn fetch(id: &HubId, settings: &Settings, cached: &CachedModel) -> Result<ModelDir, Failure> {
    let client = Client::new(settings, id)?;
    let listing = client.listing(&id.revision)?;
    let has = |name: &str| listing.files.iter().any(|file| file == name);
    let get = |name: &str| cached.fetch(&client, &listing.commit, name);
    for name in files::SMALL.into_iter().flatten().filter(|name| has(name)) {
        get(name)?;
    }
    let weights = match files::WEIGHTS.into_iter().find(|(name, index)| has(name) || has(index)) {
        Some((name, _)) if has(name) => vec![name.to_owned()],
        Some((_, index)) => {
            let path = get(index)?;
            let names = std::fs::read_to_string(&path)
                .ok()
                .and_then(|text| files::shards(&serde_json::from_str::<Value>(&text).ok()?));
            names.ok_or_else(|| Failure::Protocol(format!("{index} lists no weight files")))?
        }
        None => {
            let expected = files::WEIGHTS.map(|(name, _)| name).join(" or ");
            return Err(Failure::Protocol(format!("no weights there; expected {expected}")));
        }
    };
    for name in &weights {
        get(name)?;
    }
    cached.write_ref(&id.revision, &listing.commit)?;
    Ok(ModelDir { path: cached.snapshot_dir(&listing.commit), revision: Some(listing.commit) })
}

/// The one line that a user reads.
fn explain(failure: Failure, id: &HubId, settings: &Settings) -> Error {
    let Settings { cache, endpoint, token, .. } = settings;
    let (name, revision) = (&id.name, &id.revision);
    let message = match failure {
        Failure::Disk(error) => return error,
        Failure::Refused { code, .. } if code == "RevisionNotFound" => {
            format!(
                "{endpoint} has no revision {revision:?} of {name}; expected a branch, tag or commit"
            )
        }
        Failure::Refused { status, code } if code == "GatedRepo" || status == 403 => format!(
            "{endpoint} refuses access to {name} (HTTP {status}); accept its terms at \
             {endpoint}/{name} and set HF_TOKEN to a token that may read it"
        ),
        Failure::Refused { status: status @ (401 | 404), .. } => format!(
            "no directory {name:?} here, and {endpoint} has no such model, or hides it from {} \
             (HTTP {status}); give a directory, check the name, or set HF_TOKEN to a token that may \
             read it",
            if token.is_some() { "your token" } else { "requests without a token" }
        ),
        Failure::Refused { status, .. } => {
            format!("{endpoint} does not hand out {name}: HTTP {status}; try again later")
        }
        Failure::Unreachable(reason) => format!(
            "no directory {name:?} here, the Hugging Face cache {} does not hold that model in full, \
             and fetching it from {endpoint} failed: {reason}; what has arrived is kept, so try \
             again, or give a directory",
            cache.display()
        ),
        Failure::Protocol(reason) => format!("{endpoint}, model {name}: {reason}"),
    };
    Error::Usage(message)
}
