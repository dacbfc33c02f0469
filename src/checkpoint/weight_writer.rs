//! Weight files written a tensor at a time, so that nobody holds a model to save it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::json;
use tch::Tensor;

use super::growing::GrowingFile;
use crate::atomic::write_synced;
use crate::error::{Error, Result};
use crate::model::lora::peft;
use crate::model::stage::TensorSpec;
use crate::model::weights::{INDEX_FILE, SINGLE_FILE};

/// Bytes of an fp32 element.
const ELEMENT: usize = 4;

/// How weight files are called and split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightForm {
    /// The name of a file that holds everything.
    pub file: &'static str,
    /// What tensor names begin with, before the model's own.
    pub prefix: &'static str,
    /// Files are split above this many bytes.
    pub max_bytes: usize,
}

impl WeightForm {
    /// A whole model in files of at most `max_bytes`.
    #[must_use]
    pub fn model(max_bytes: usize) -> Self {
        Self { file: SINGLE_FILE, prefix: "", max_bytes }
    }

    /// An adapter, in one file.
    #[must_use]
    pub fn adapter() -> Self {
        Self { file: peft::WEIGHTS_FILE, prefix: peft::PREFIX, max_bytes: usize::MAX }
    }
}

/// The weight files of a model, filled in the order in which its tensors were announced.
#[derive(Debug)]
pub struct WeightWriter {
    dir: PathBuf,
    form: WeightForm,
    /// Files not begun yet, with their tensors.
    planned: VecDeque<(String, Vec<TensorSpec>)>,
    current: Option<OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    out: BufWriter<GrowingFile>,
    left: VecDeque<TensorSpec>,
}

impl WeightWriter {
    /// Plans files of `form` for `specs` in `dir`, and writes the index where there are several. A
    /// tensor larger than a file may be gets one of its own.
    ///
    /// # Errors
    /// [`Error::Io`] when the index cannot be written.
    pub fn new(dir: &Path, specs: Vec<TensorSpec>, form: WeightForm) -> Result<Self> {
        let mut files: Vec<Vec<TensorSpec>> = vec![Vec::new()];
        let (mut bytes, mut total) = (0, 0);
        for spec in specs {
            let size = spec.elements() * ELEMENT;
            if bytes > 0 && bytes + size > form.max_bytes {
                files.push(Vec::new());
                bytes = 0;
            }
            bytes += size;
            total += size;
            files.last_mut().expect("there is always a file").push(spec);
        }
        let count = files.len();
        let name = |index: usize| match count {
            1 => form.file.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let planned: VecDeque<_> =
            files.into_iter().enumerate().map(|(index, specs)| (name(index), specs)).collect();
        if count > 1 {
            let places = planned.iter().flat_map(|(file, specs)| {
                specs.iter().map(move |spec| (spec.name.as_str(), file.as_str()))
            });
            let weight_map: BTreeMap<&str, &str> = places.collect();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            let text = serde_json::to_string_pretty(&index).unwrap_or_default();
            write_synced(&dir.join(INDEX_FILE), text.as_bytes())?;
        }
        Ok(Self { dir: dir.to_owned(), form, planned, current: None })
    }

    /// Writes the next tensor, which must be the next one announced: fp32, of any shape.
    ///
    /// # Errors
    /// [`Error::Io`] with the file, [`Error::Torch`] from libtorch.
    pub fn write(&mut self, spec: &TensorSpec, values: &Tensor) -> Result<()> {
        let mut file = match self.current.take() {
            Some(file) => file,
            None => self.begin_file()?,
        };
        let expected = file.left.pop_front();
        assert_eq!(expected.as_ref(), Some(spec), "tensors come in the announced order");
        let values = values.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
        let mut bytes = vec![0_u8; spec.elements() * ELEMENT];
        values.f_copy_data_u8(&mut bytes, spec.elements())?;
        file.out.write_all(&bytes).map_err(io(&file.path, "write"))?;
        if !file.left.is_empty() {
            self.current = Some(file);
            return Ok(());
        }
        let OpenFile { path, out, .. } = file;
        let inner = out.into_inner().map_err(|error| io(&path, "write")(error.into_error()))?;
        inner.sync().map_err(io(&path, "flush"))
    }

    fn begin_file(&mut self) -> Result<OpenFile> {
        let (name, specs) = self.planned.pop_front().expect("a tensor that was not announced");
        let path = self.dir.join(name);
        let file = GrowingFile::create(&path).map_err(io(&path, "create"))?;
        let mut out = BufWriter::new(file);
        let named: Vec<TensorSpec> = specs
            .iter()
            .map(|spec| TensorSpec::new(format!("{}{}", self.form.prefix, spec.name), &spec.shape))
            .collect();
        out.write_all(&header(&named, &path)?).map_err(io(&path, "write"))?;
        Ok(OpenFile { path, out, left: specs.into() })
    }
}

/// Length and JSON header of a safetensors file whose data follows in the order of `specs`.
pub(super) fn header(specs: &[TensorSpec], path: &Path) -> Result<Vec<u8>> {
    let mut offset = 0;
    let tensors = specs
        .iter()
        .map(|spec| {
            let begin = offset;
            offset += spec.elements() * ELEMENT;
            let shape = spec.shape.iter().map(|&d| d as usize).collect();
            (
                spec.name.clone(),
                TensorInfo { dtype: Dtype::F32, shape, data_offsets: (begin, offset) },
            )
        })
        .collect();
    // transformers looks for the framework under this key.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let broken = |message: String| Error::File { path: path.to_owned(), message };
    let metadata =
        Metadata::new(Some(format), tensors).map_err(|error| broken(error.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| broken(error.to_string()))?;
    // The data begins at a multiple of eight bytes.
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, action, source }
}
