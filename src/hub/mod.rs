//! Model names to model directories: a local directory, or a hub id that is looked up in the Hugging
//! Face cache and, where it is not there in full, fetched from the hub into it.
//!
//! The cache has the layout of Python's `huggingface_hub`, and its environment variables hold here
//! too: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`. What
//! the cache holds in full is used without asking the hub, so that workers which start after
//! the launcher's check touch no network and read the same revision. What scoring reads beside a model
//! that another program fetched is asked for separately ([`settle`]), and done without where the hub or
//! the cache do not help. Free of torch.

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
use client::{Client, Effort, Failure, Listing};
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
    if let Some(Snapshot { path, commit, .. }) = cached.snapshot(&id.revision) {
        return Ok(ModelDir { path, revision: Some(commit) });
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

/// The directory that [`resolve`] finds for `name` without the hub.
#[must_use]
pub fn cached(name: &str) -> Option<PathBuf> {
    find(name).map(|(path, _)| path)
}

/// Completes the model `name`, where the cache holds it in full, by what scoring reads beside it and
/// another program, which asks for nothing that it does not know, has not fetched: `reranker.json`, the
/// settings of sentence-transformers, an adapter's tokenizer. The hub is asked once, as long as the answer
/// can be kept. The model can be used without: where the hub does not answer soon, or the cache cannot be
/// written, it stays as it is, and a line says so. Where processes share a cache, one calls this while the
/// others wait, so that all of them find the same.
pub fn settle(name: &str) {
    let Some((_, Some(Cached { id, settings, model, snapshot }))) = find(name) else { return };
    if snapshot.is_settled || settings.offline {
        return;
    }
    if let Err((missing, why, failure)) = complete_beside(&id, &settings, &model, &snapshot) {
        tell(format_args!(
            "note: the Hugging Face cache holds {} without {missing}, and {} {why} ({failure}); it is used \
             without; HF_HUB_OFFLINE=1 spares the question",
            id.name, settings.endpoint
        ));
    }
}

/// A model of the hub that the cache holds in full.
struct Cached {
    id: HubId,
    settings: Settings,
    model: CachedModel,
    snapshot: Snapshot,
}

/// Where `name` is, if it is on the disk.
fn find(name: &str) -> Option<(PathBuf, Option<Cached>)> {
    let path = Path::new(name);
    if path.exists() {
        return Some((path.to_owned(), None));
    }
    let (id, settings) = (HubId::parse(name)?, Settings::from_env().ok()?);
    let model = CachedModel::new(&settings.cache, &id.name);
    let snapshot = model.snapshot(&id.revision)?;
    Some((snapshot.path.clone(), Some(Cached { id, settings, model, snapshot })))
}

/// Brings what is read beside a whole model into the cache, or says what is missing, why, and for which
/// reason.
fn complete_beside(
    id: &HubId,
    settings: &Settings,
    model: &CachedModel,
    snapshot: &Snapshot,
) -> Result<(), (&'static str, &'static str, Failure)> {
    let unknown = |failure| (files::SIDECAR, "does not tell whether it has one", failure);
    let client = Client::new(settings, id, Effort::OPTIONAL);
    let client = client.map_err(|error| unknown(error.into()))?;
    let listing = client.listing(&snapshot.commit).map_err(unknown)?;
    for name in files::beside(&snapshot.path) {
        if listing.files.iter().any(|file| file == name) {
            let fetched = model.fetch(&client, &snapshot.commit, name);
            fetched.map_err(|failure| (name, "has one, which cannot be fetched", failure))?;
        }
    }
    note_absent(model, &listing);
    Ok(())
}

/// Notes where a listed commit has no `reranker.json`. A cache that cannot be written is asked about again.
fn note_absent(model: &CachedModel, listing: &Listing) {
    if !listing.files.iter().any(|file| file == files::SIDECAR) {
        let _ = model.write_absent(&listing.commit, files::SIDECAR);
    }
}

/// Brings every needed file into the cache.
fn fetch(id: &HubId, settings: &Settings, cached: &CachedModel) -> Result<ModelDir, Failure> {
    let client = Client::new(settings, id, Effort::NEEDED)?;
    let listing = client.listing(&id.revision)?;
    complete(&client, cached, &listing)?;
    cached.write_ref(&id.revision, &listing.commit)?;
    Ok(ModelDir { path: cached.snapshot_dir(&listing.commit), revision: Some(listing.commit) })
}

/// Brings what is missing of a listed commit into the cache, weights last: a snapshot with weights is
/// complete.
fn complete(client: &Client, cached: &CachedModel, listing: &Listing) -> Result<(), Failure> {
    let has = |name: &str| listing.files.iter().any(|file| file == name);
    let get = |name: &str| cached.fetch(client, &listing.commit, name);
    for name in files::SMALL.into_iter().flatten().filter(|name| has(name)) {
        get(name)?;
    }
    note_absent(cached, listing);
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
