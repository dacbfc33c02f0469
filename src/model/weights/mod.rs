//! Weights of a Hugging Face model directory: one file or the shards that an index lists, as
//! safetensors or as `torch.save` writes them. Tensors are read one at a time, so that no more than
//! one is held beside the model.

mod adapter;
mod pickle;
mod safetensors;
mod torch_file;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::stage::{Init, TensorSpec};
use crate::error::{Error, Result};
use crate::seed;

/// The file of an unsharded model.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The list of files of a sharded one.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Files and lists of files with weights; the first that is there counts, as in transformers.
const SOURCES: [(&str, bool); 4] = [
    (SINGLE_FILE, false),
    (INDEX_FILE, true),
    ("pytorch_model.bin", false),
    ("pytorch_model.bin.index.json", true),
];

/// What trunks' parameter names begin with; the checkpoint of a bare trunk leaves it out.
const TRUNK_PREFIXES: [&str; 3] = ["bert.", "roberta.", "model."];

/// What a file begins with that stands for another one, elsewhere.
const LFS_POINTER: [u8; 20] = *b"version https://git-";

/// What a tensor on disk consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Element {
    /// Floating-point numbers of this kind.
    Float(Kind),
    /// Something else, by its name.
    Other(String),
}

/// Where and how a tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    element: Element,
    shape: Vec<i64>,
    /// Elements from one index of a dimension to the next.
    strides: Vec<i64>,
    /// Bytes before the first element.
    offset: u64,
}

impl Place {
    /// A tensor whose elements lie row by row without gaps.
    fn contiguous(element: Element, shape: Vec<i64>, offset: u64) -> Self {
        let mut strides = vec![1_i64; shape.len()];
        for d in (1..shape.len()).rev() {
            strides[d - 1] = strides[d].saturating_mul(shape[d]);
        }
        Self { element, shape, strides, offset }
    }

    /// Row `index` of a table `[rows, H]`, as `[1, H]`.
    fn row(&self, index: i64, kind: Kind) -> Self {
        let elements = (index * self.strides[0]) as usize;
        let offset = self.offset + (elements * kind.elt_size_in_bytes()) as u64;
        let (mut shape, strides) = (self.shape.clone(), self.strides.clone());
        shape[0] = 1;
        Self { element: self.element.clone(), shape, strides, offset }
    }

    /// Elements from the first to the last, gaps included; `None` where that is no 64-bit number.
    fn span(&self) -> Option<u64> {
        if self.strides.len() != self.shape.len() {
            return None;
        }
        let mut last = 0_u64;
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            let Some(steps) = (size as u64).checked_sub(1) else { return Some(0) };
            last = last.checked_add(steps.checked_mul(stride as u64)?)?;
        }
        last.checked_add(1)
    }
}

/// The tensors of a model directory, by name, with headers checked and data left on disk.
#[derive(Debug)]
pub struct WeightFiles {
    dir: PathBuf,
    files: Vec<(PathBuf, File)>,
    /// File and place of each tensor.
    entries: BTreeMap<String, (usize, Place)>,
    /// Rank and scaling of the adapter of each module that has one.
    scalings: BTreeMap<String, (i64, f64)>,
}

impl WeightFiles {
    /// Opens the weight files of `dir` and checks that each is whole.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] for a directory without weights, a file that is missing,
    /// truncated or of another format.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut this = Self {
            dir: dir.to_owned(),
            files: Vec::new(),
            entries: BTreeMap::new(),
            scalings: BTreeMap::new(),
        };
        let Some((name, is_index)) = SOURCES.iter().find(|(name, _)| dir.join(name).exists())
        else {
            let names: Vec<_> = SOURCES.iter().map(|(name, _)| *name).collect();
            return Err(Error::File {
                path: dir.to_owned(),
                message: format!("no weights here; expected one of {}", names.join(", ")),
            });
        };
        if *is_index {
            for shard in shard_names(&dir.join(name))? {
                this.add_file(&dir.join(shard))?;
            }
        } else {
            this.add_file(&dir.join(name))?;
        }
        Ok(this)
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let io = |source| Error::Io { path: path.to_owned(), action: "read", source };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let places = if path.extension().is_some_and(|extension| extension == "safetensors") {
            safetensors::places(&file, length)
        } else {
            torch_file::places(&file, length)
        };
        let places = places.map_err(|message| {
            let mut start = [0_u8; LFS_POINTER.len()];
            let pointer = file.read_exact_at(&mut start, 0).is_ok() && start == LFS_POINTER;
            Error::File {
                path: path.to_owned(),
                message: if pointer {
                    "a Git LFS pointer, not the weights; get them with git lfs pull".into()
                } else {
                    message
                },
            }
        })?;
        let index = self.files.len();
        self.entries.extend(places.into_iter().map(|(name, place)| (name, (index, place))));
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
            (Some((file, place, kind)), _) => {
                self.merge(spec, self.read_place(file, place, kind)?).map(Some)
            }
            (None, Init::TokenRows { positive, negative, .. }) => {
                let (file, table, kind) = self.token_table(spec)?;
                let row = |row| self.read_place(file, &table.row(row, kind), kind);
                let positive = row(positive)?;
                Ok(Some(match negative {
                    Some(negative) => positive.f_sub(&row(negative)?)?,
                    None => positive,
                }))
            }
            (None, _) => Ok(None),
        }
    }

    /// The table that `spec`, of [`Init::TokenRows`], takes its rows from.
    fn token_table(&self, spec: &TensorSpec) -> Result<(usize, &Place, Kind)> {
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

    /// A tensor as fp32 on the CPU.
    fn read_place(&self, file: usize, place: &Place, kind: Kind) -> Result<Tensor> {
        let (path, file) = &self.files[file];
        // Checked against the file when it was opened.
        let span = place.span().unwrap_or(0) as usize;
        let mut bytes = vec![0_u8; span * kind.elt_size_in_bytes()];
        file.read_exact_at(&mut bytes, place.offset).map_err(|source| Error::Io {
            path: path.clone(),
            action: "read",
            source,
        })?;
        let flat = Tensor::f_from_data_size(&bytes, &[span as i64], kind)?;
        let tensor = flat.f_as_strided(&place.shape[..], &place.strides[..], None)?;
        Ok(tensor.f_to_kind(Kind::Float)?.f_contiguous()?)
    }

    fn find(&self, spec: &TensorSpec) -> Result<Option<(usize, &Place, Kind)>> {
        let found = spellings(&spec.name).into_iter().find_map(|name| self.entries.get(&name));
        let Some((file, place)) = found else {
            if spec.init != Init::FromCheckpoint {
                return Ok(None);
            }
            let count = self.entries.len();
            return Err(Error::File {
                path: self.dir.clone(),
                message: format!(
                    "tensor {} is missing from the weights ({count} tensors here)",
                    spec.name
                ),
            });
        };
        let unfit = |what: String| Error::File {
            path: self.files[*file].0.clone(),
            message: format!("tensor {} {what}", spec.name),
        };
        match &place.element {
            Element::Other(name) => Err(unfit(format!("holds {name}, expected floats"))),
            Element::Float(_) if place.shape != spec.shape => Err(unfit(format!(
                "has shape {:?}, expected {:?} from config.json",
                place.shape, spec.shape
            ))),
            Element::Float(kind) => Ok(Some((*file, place, *kind))),
        }
    }
}

/// The names under which checkpoints hold the same tensor: as it is, without the prefix of the trunk
/// (a bare trunk), and TensorFlow's names for normalisation.
fn spellings(name: &str) -> Vec<String> {
    let mut all = vec![name.to_owned()];
    all.extend(
        TRUNK_PREFIXES.iter().filter_map(|prefix| name.strip_prefix(prefix)).map(Into::into),
    );
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

/// A name without the prefix of the trunk, where it has one.
#[must_use]
pub fn without_trunk(name: &str) -> &str {
    let inside = TRUNK_PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix));
    inside.unwrap_or(name)
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
    let normal = |std: f64, cutoff: f64| -> Result<Tensor> {
        let draws = seed::normals(seed::of_name(seed, &spec.name));
        let kept = draws.filter(|draw| draw.abs() <= cutoff);
        let values: Vec<f32> = kept.take(spec.elements()).map(|draw| (draw * std) as f32).collect();
        Ok(Tensor::f_from_slice(&values)?.f_reshape(&spec.shape[..])?)
    };
    match spec.init {
        Init::Uniform(bound) => {
            let draws = seed::uniforms(seed::of_name(seed, &spec.name)).take(spec.elements());
            let values: Vec<f32> = draws.map(|draw| ((2.0 * draw - 1.0) * bound) as f32).collect();
            Ok(Tensor::f_from_slice(&values)?.f_reshape(&spec.shape[..])?)
        }
        Init::Zeros => Ok(Tensor::f_zeros(&spec.shape[..], options)?),
        Init::Ones => Ok(Tensor::f_ones(&spec.shape[..], options)?),
        Init::Normal(std) => normal(std, f64::INFINITY),
        Init::TruncatedNormal { std, cutoff } => normal(std, cutoff),
        Init::FromCheckpoint | Init::TokenRows { .. } => {
            unreachable!("{} has no initial value", spec.name)
        }
    }
}
