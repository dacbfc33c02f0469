//! Weights of a Hugging Face model directory: `model.safetensors`, or the shards that
//! `model.safetensors.index.json` lists. Tensors are read one at a time, so that no more than one
//! is held beside the model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use tch::{Kind, Tensor};

use super::stage::{Init, TensorSpec};
use crate::error::{Error, Result};
use crate::seed;

/// The file of an unsharded model.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The list of files of a sharded one.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The format's own bound on headers.
const MAX_HEADER_BYTES: u64 = 100_000_000;

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    offset: u64,
    bytes: usize,
}

/// The tensors of a model directory, by name, with headers checked and data left on disk.
#[derive(Debug)]
pub struct WeightFiles {
    dir: PathBuf,
    files: Vec<(PathBuf, File)>,
    entries: BTreeMap<String, Entry>,
}

impl WeightFiles {
    /// Opens the weight files of `dir` and checks that each is as long as its header says.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] for a directory without weights, a file that is missing,
    /// truncated or not safetensors.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut this = Self { dir: dir.to_owned(), files: Vec::new(), entries: BTreeMap::new() };
        if dir.join(SINGLE_FILE).exists() {
            this.add_file(&dir.join(SINGLE_FILE))?;
        } else if dir.join(INDEX_FILE).exists() {
            for name in shard_names(&dir.join(INDEX_FILE))? {
                this.add_file(&dir.join(name))?;
            }
        } else {
            return Err(Error::File {
                path: dir.to_owned(),
                message: format!("no weights here; expected {SINGLE_FILE} or {INDEX_FILE}"),
            });
        }
        Ok(this)
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let io = |source| Error::Io { path: path.to_owned(), action: "read", source };
        let broken = |message: String| Error::File { path: path.to_owned(), message };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut prefix = [0_u8; 8];
        file.read_exact_at(&mut prefix, 0)
            .map_err(|_| broken(format!("truncated: {length} bytes are no safetensors file")))?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > length.saturating_sub(8).min(MAX_HEADER_BYTES) {
            return Err(broken(format!(
                "truncated or not safetensors: the header says {header_bytes} bytes, the file has \
                 {length}"
            )));
        }
        let mut header = vec![0_u8; header_bytes as usize];
        file.read_exact_at(&mut header, 8).map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|error| broken(format!("not a safetensors file: {error}")))?;
        let data = header_bytes + 8;
        let expected = data + metadata.data_len() as u64;
        if expected != length {
            return Err(broken(format!(
                "truncated or damaged: its header promises {expected} bytes, the file has {length}"
            )));
        }
        let index = self.files.len();
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            let entry = Entry {
                file: index,
                dtype: info.dtype,
                shape: info.shape.iter().map(|&d| d as i64).collect(),
                offset: data + begin as u64,
                bytes: end - begin,
            };
            self.entries.insert(name, entry);
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }

    /// Whether a tensor of this name is here, under any of its spellings.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        spellings(name).iter().any(|name| self.entries.contains_key(name))
    }

    /// Checks that every tensor of `specs` is here, or can be initialised, in the right shape and
    /// as floats, without reading any data. Returns the names that will be initialised.
    ///
    /// # Errors
    /// [`Error::File`] that names the tensor.
    pub fn check<'a>(&self, specs: impl Iterator<Item = &'a TensorSpec>) -> Result<Vec<String>> {
        let mut initialised = Vec::new();
        for spec in specs {
            match (self.find(spec)?, spec.init) {
                (Some(_), _) => {}
                (None, Init::TokenRows { .. }) => drop(self.token_table(spec)?),
                (None, _) => initialised.push(spec.name.clone()),
            }
        }
        Ok(initialised)
    }

    /// The values of `spec` as fp32 on the CPU, or `None` where it is to be initialised.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] that names the tensor or the file.
    pub fn read(&self, spec: &TensorSpec) -> Result<Option<Tensor>> {
        match (self.find(spec)?, spec.init) {
            (Some((entry, kind)), _) => Ok(Some(self.read_rows(
                entry,
                kind,
                0,
                entry.shape.first().copied().unwrap_or(1),
            )?)),
            (None, Init::TokenRows { positive, negative, .. }) => {
                let (table, kind) = self.token_table(spec)?;
                let row = self.read_rows(table, kind, positive, 1)?;
                Ok(Some(match negative {
                    Some(negative) => row.f_sub(&self.read_rows(table, kind, negative, 1)?)?,
                    None => row,
                }))
            }
            (None, _) => Ok(None),
        }
    }

    /// `count` rows of a tensor from `first` on, as fp32.
    fn read_rows(&self, entry: &Entry, kind: Kind, first: i64, count: i64) -> Result<Tensor> {
        let (path, file) = &self.files[entry.file];
        let mut shape = entry.shape.clone();
        let rows = shape.first().copied().unwrap_or(1).max(1);
        if let Some(rows) = shape.first_mut() {
            *rows = count;
        }
        let row_bytes = entry.bytes / rows as usize;
        let mut bytes = vec![0_u8; row_bytes * count as usize];
        let offset = entry.offset + (row_bytes * first as usize) as u64;
        file.read_exact_at(&mut bytes, offset).map_err(|source| Error::Io {
            path: path.clone(),
            action: "read",
            source,
        })?;
        Ok(Tensor::f_from_data_size(&bytes, &shape, kind)?.f_to_kind(Kind::Float)?)
    }

    /// The table that `spec`, of [`Init::TokenRows`], takes its rows from.
    fn token_table(&self, spec: &TensorSpec) -> Result<(&Entry, Kind)> {
        let Init::TokenRows { tables, rows, .. } = spec.init else {
            unreachable!("only token rows come from a table")
        };
        let shape = [rows, spec.shape[1]];
        let find = |name: &str| self.find(&TensorSpec::new(name, &shape).or_init(Init::Zeros));
        match find(tables[0])? {
            Some(found) => Ok(found),
            None => find(tables[1])?.ok_or_else(|| Error::File {
                path: self.dir.clone(),
                message: format!("neither {} nor {} is in the weights", tables[0], tables[1]),
            }),
        }
    }

    fn find(&self, spec: &TensorSpec) -> Result<Option<(&Entry, Kind)>> {
        let found = spellings(&spec.name).into_iter().find_map(|name| self.entries.get(&name));
        let unfit = |entry: &Entry, what: String| Error::File {
            path: self.files[entry.file].0.clone(),
            message: format!("tensor {} {what}", spec.name),
        };
        match found {
            Some(entry) if entry.shape != spec.shape => Err(unfit(
                entry,
                format!("has shape {:?}, expected {:?} from config.json", entry.shape, spec.shape),
            )),
            Some(entry) => match float_kind(entry.dtype) {
                Some(kind) => Ok(Some((entry, kind))),
                None => Err(unfit(entry, format!("holds {:?}, expected floats", entry.dtype))),
            },
            None if spec.init == Init::FromCheckpoint => Err(Error::File {
                path: self.dir.clone(),
                message: format!(
                    "tensor {} is missing from the weights ({} tensors here)",
                    spec.name,
                    self.entries.len()
                ),
            }),
            None => Ok(None),
        }
    }
}

fn float_kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F64 => Some(Kind::Double),
        _ => None,
    }
}

/// The names under which checkpoints hold the same tensor: as it is, without the `bert.` or
/// `model.` prefix (a bare trunk), and TensorFlow's names for normalisation.
fn spellings(name: &str) -> Vec<String> {
    let mut all = vec![name.to_owned()];
    if let Some((_, bare)) = name.split_once("bert.").or_else(|| name.split_once("model.")) {
        all.push(bare.to_owned());
    }
    let old: Vec<String> = all
        .iter()
        .filter(|name| name.contains("LayerNorm."))
        .map(|name| {
            name.replace("LayerNorm.weight", "LayerNorm.gamma")
                .replace("LayerNorm.bias", "LayerNorm.beta")
        })
        .collect();
    all.extend(old);
    all
}

fn shard_names(path: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        action: "read",
        source,
    })?;
    let broken = |message: String| Error::File { path: path.to_owned(), message };
    let index: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| broken(format!("not valid JSON: {error}")))?;
    let map = index
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| broken("expected an object \"weight_map\"".into()))?;
    map.values()
        .map(|file| match file.as_str() {
            Some(name) if !name.contains('/') => Ok(name.to_owned()),
            _ => Err(broken(format!("weight_map names {file}, expected a file in this directory"))),
        })
        .collect()
}

/// Fresh values for a tensor that no checkpoint holds, the same on every rank for one `seed`.
///
/// # Errors
/// [`Error::Torch`] from libtorch.
///
/// # Panics
/// When asked for a tensor that must come from a checkpoint; [`WeightFiles::read`] refuses those.
pub fn initialise(spec: &TensorSpec, seed: u64) -> Result<Tensor> {
    let options = (Kind::Float, tch::Device::Cpu);
    match spec.init {
        Init::Zeros => Ok(Tensor::f_zeros(&spec.shape[..], options)?),
        Init::Normal(std) => {
            let draws = seed::normals(seed::of_name(seed, &spec.name));
            let values: Vec<f32> =
                draws.take(spec.elements()).map(|draw| (draw * std) as f32).collect();
            Ok(Tensor::f_from_slice(&values)?.f_reshape(&spec.shape[..])?)
        }
        Init::FromCheckpoint | Init::TokenRows { .. } => {
            unreachable!("{} has no initial value", spec.name)
        }
    }
}
