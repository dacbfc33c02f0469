//! Model names to model directories: a local directory, or a hub id that is looked up in the Hugging
//! Face cache and, where it is not there in full, fetched from the hub into it.
//!
//! The cache has the layout of Python's `huggingface_hub`, and its environment variables hold here
//! too: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`. What
//! the cache holds in full is used without asking the hub, so that workers which start after
//! the launcher's check touch no network and read the same revision. Of a model that another program
//! fetched, the hub is asked once whether it has a `reranker.json`. Free of torch.

mod cache;
mod client;
mod files;
mod id;
mod progress;
mod settings;

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result, tell};

use cache::{CachedModel, Snapshot};
use client::{Client, Failure, Listing};
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
    if let Some(snapshot) = cached.snapshot(&id.revision) {
        if !snapshot.is_settled && !settings.offline {
            settle(&id, &settings, &cached, &snapshot)
                .map_err(|failure| explain(failure, &id, &settings))?;
        }
        return Ok(ModelDir { path: snapshot.path, revision: Some(snapshot.commit) });
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

/// Brings every needed file into the cache.
fn fetch(id: &HubId, settings: &Settings, cached: &CachedModel) -> Result<ModelDir, Failure> {
    let client = Client::new(settings, id)?;
    let listing = client.listing(&id.revision)?;
    complete(&client, cached, &listing)?;
    cached.write_ref(&id.revision, &listing.commit)?;
    Ok(ModelDir { path: cached.snapshot_dir(&listing.commit), revision: Some(listing.commit) })
}

/// Completes a snapshot of which another program fetched what it needed itself. A hub that does not
/// answer leaves it as it is, as it always was for that program.
fn settle(
    id: &HubId,
    settings: &Settings,
    cached: &CachedModel,
    snapshot: &Snapshot,
) -> Result<(), Failure> {
    let client = Client::new(settings, id)?;
    match client.listing(&snapshot.commit) {
        Ok(listing) => complete(&client, cached, &listing),
        Err(failure) => {
            tell(format_args!(
                "note: the Hugging Face cache holds {} without {}, and {} does not tell whether it has \
                 one ({failure}); it is used without; HF_HUB_OFFLINE=1 spares the question",
                id.name,
                files::SIDECAR,
                settings.endpoint
            ));
            Ok(())
        }
    }
}

/// Brings what is missing of a listed commit into the cache, weights last: a snapshot with weights is
/// complete.
fn complete(client: &Client, cached: &CachedModel, listing: &Listing) -> Result<(), Failure> {
    let has = |name: &str| listing.files.iter().any(|file| file == name);
    let get = |name: &str| cached.fetch(client, &listing.commit, name);
    for name in files::SMALL.into_iter().flatten().filter(|name| has(name)) {
        get(name)?;
    }
    if !has(files::SIDECAR) {
        // A cache that cannot be written is asked about again.
        let _ = cached.write_absent(&listing.commit, files::SIDECAR);
    }
    if files::has_weights(&cached.snapshot_dir(&listing.commit)) {
        return Ok(());
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
    weights.iter().try_for_each(|name| get(name).map(drop))
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
