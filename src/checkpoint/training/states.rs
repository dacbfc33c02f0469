//! Files of states: a rank's part of every unit's fp32 weights and moments.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::manifest::{FileRecord, Manifest, UnitRecord};
use super::{damaged, io};
use crate::checkpoint::growing::{GrowingFile, count_read};
use crate::checkpoint::weight_writer::header;
use crate::error::Result;
use crate::model::stage::TensorSpec;
use crate::shard::{FlatUnit, UnitLayout};

/// Bytes of an fp32 element.
const ELEMENT: usize = 4;

/// Bytes that are read or written at once.
const BLOCK: usize = 1 << 20;

/// What a unit holds for each of its elements, in file order.
const STATES: [&str; 3] = ["weights", "exp_avg", "exp_avg_sq"];

/// A rank's part of one unit's states, fp32 in the host's memory: weights, first and second
/// moments.
#[derive(Debug)]
pub struct UnitStates(pub [Tensor; 3]);

impl UnitStates {
    /// Room for `length` elements.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] when there is none.
    pub fn zeros(length: usize) -> Result<Self> {
        let zeros = || Tensor::f_zeros([length as i64], (Kind::Float, Device::Cpu));
        Ok(Self([zeros()?, zeros()?, zeros()?]))
    }
}

/// Bytes of a rank's file of states, its header left out.
pub(super) fn bytes_per_rank(units: &[FlatUnit]) -> u64 {
    units.iter().map(|unit| (unit.own_part().len() * ELEMENT * STATES.len()) as u64).sum()
}

/// The name of the file of rank `rank` of `count`.
pub(super) fn file_name(rank: usize, count: usize) -> String {
    format!("rank-{rank:05}-of-{count:05}.safetensors")
}

/// A writer that notes length and checksum.
struct Summed<W> {
    inner: W,
    bytes: u64,
    crc32: crc32fast::Hasher,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.bytes += written as u64;
        self.crc32.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a rank's states to `dir` and flushes them to the disk.
///
/// # Errors
/// [`crate::Error::Io`] with the file.
pub(super) fn write(dir: &Path, name: &str, units: &[UnitStates]) -> Result<FileRecord> {
    let path = dir.join(name);
    let specs: Vec<TensorSpec> = units
        .iter()
        .enumerate()
        .flat_map(|(index, UnitStates(states))| {
            STATES.iter().zip(states).map(move |(state, values)| {
                TensorSpec::new(format!("unit.{index}.{state}"), &[values.numel() as i64])
            })
        })
        .collect();
    let file = GrowingFile::create(&path).map_err(io(&path, "create"))?;
    let mut out = Summed {
        inner: BufWriter::with_capacity(BLOCK, file),
        bytes: 0,
        crc32: crc32fast::Hasher::new(),
    };
    out.write_all(&header(&specs, &path)?).map_err(io(&path, "write"))?;
    let mut block = vec![0_u8; BLOCK];
    for values in units.iter().flat_map(|UnitStates(states)| states) {
        let mut start = 0;
        while start < values.numel() {
            let length = (values.numel() - start).min(BLOCK / ELEMENT);
            let part = values.f_narrow(0, start as i64, length as i64)?;
            part.f_copy_data_u8(&mut block[..length * ELEMENT], length)?;
            out.write_all(&block[..length * ELEMENT]).map_err(io(&path, "write"))?;
            start += length;
        }
    }
    let Summed { inner, bytes, crc32 } = out;
    let file = inner.into_inner().map_err(|error| io(&path, "write")(error.into_error()))?;
    file.sync().map_err(io(&path, "flush"))?;
    Ok(FileRecord { name: name.to_owned(), bytes, crc32: crc32.finalize() })
}

/// The record of a file that is there already.
///
/// # Errors
/// [`crate::Error::Io`] with the file.
pub(super) fn record(dir: &Path, name: &str) -> Result<FileRecord> {
    let path = dir.join(name);
    let file = File::open(&path).map_err(io(&path, "read"))?;
    let mut reader = BufReader::with_capacity(BLOCK, file);
    let mut crc32 = crc32fast::Hasher::new();
    let (mut block, mut bytes) = (vec![0_u8; BLOCK], 0);
    loop {
        let length = reader.read(&mut block).map_err(io(&path, "read"))?;
        if length == 0 {
            break;
        }
        crc32.update(&block[..length]);
        bytes += length as u64;
        count_read(length);
    }
    Ok(FileRecord { name: name.to_owned(), bytes, crc32: crc32.finalize() })
}

/// Reads all of a file and compares it with its record.
///
/// # Errors
/// [`crate::Error::Io`] or [`crate::Error::File`] that names the file and says what is wrong.
pub(super) fn verify(dir: &Path, expected: &FileRecord) -> Result<()> {
    let found = record(dir, &expected.name)?;
    let path = dir.join(&expected.name);
    if found.bytes != expected.bytes {
        let message = format!("damaged: {} bytes, {} were written", found.bytes, expected.bytes);
        return Err(damaged(&path, message));
    }
    if found.crc32 != expected.crc32 {
        let message = format!(
            "damaged: its checksum is {:08x}, not {:08x} as written",
            found.crc32, expected.crc32
        );
        return Err(damaged(&path, message));
    }
    Ok(())
}

/// The states in a checkpoint's files, by tensor name.
#[derive(Debug)]
pub struct StateFiles {
    files: Vec<(PathBuf, File, u64)>,
    units: Vec<UnitRecord>,
    /// Unit, and place in its buffer, of each tensor.
    places: HashMap<String, (usize, Range<usize>)>,
}

impl StateFiles {
    /// Opens the files of the checkpoint `dir`.
    ///
    /// # Errors
    /// [`crate::Error::Io`] or [`crate::Error::File`] with the file.
    pub fn open(dir: &Path, manifest: &Manifest) -> Result<Self> {
        let files = (0..manifest.rank_files)
            .map(|rank| {
                let path = dir.join(file_name(rank, manifest.rank_files));
                let file = File::open(&path).map_err(io(&path, "read"))?;
                let mut prefix = [0_u8; 8];
                file.read_exact_at(&mut prefix, 0).map_err(io(&path, "read"))?;
                Ok((path, file, 8 + u64::from_le_bytes(prefix)))
            })
            .collect::<Result<_>>()?;
        let parts = manifest.units.iter().enumerate().flat_map(|(index, unit)| {
            unit.parts.iter().map(move |part| {
                let elements = part.shape.iter().product::<i64>() as usize;
                (part.name.clone(), (index, part.start..part.start + elements))
            })
        });
        Ok(Self { files, units: manifest.units.clone(), places: parts.collect() })
    }

    /// The states of elements `slice` of a buffer laid out as `layout`, whatever the layout was
    /// when they were written. Padding is 0.
    ///
    /// # Errors
    /// [`crate::Error::File`] for a tensor that is missing or of another size.
    pub fn read(&self, layout: &UnitLayout, slice: &Range<usize>) -> Result<UnitStates> {
        let states = UnitStates::zeros(slice.len())?;
        for (spec, range) in layout.places.iter().flat_map(|place| &place.parts) {
            let (start, end) = (range.start.max(slice.start), range.end.min(slice.end));
            if start >= end {
                continue;
            }
            let path = &self.files[0].0;
            let Some((unit, there)) = self.places.get(&spec.name) else {
                return Err(damaged(path, format!("{} is not in this checkpoint", spec.name)));
            };
            if there.len() != range.len() {
                let message = format!(
                    "{} has {} elements here, expected {}",
                    spec.name,
                    there.len(),
                    range.len()
                );
                return Err(damaged(path, message));
            }
            let from = there.start + (start - range.start);
            for (state, target) in states.0.iter().enumerate() {
                let values = self.elements(*unit, state, from..from + (end - start))?;
                let place = (start - slice.start) as i64;
                let mut target = target.f_narrow(0, place, (end - start) as i64)?;
                target.f_copy_(&values)?;
            }
        }
        Ok(states)
    }

    /// The fp32 weights of the tensor `name`, flat.
    ///
    /// # Errors
    /// [`crate::Error::File`] when it is missing.
    pub(super) fn weights(&self, name: &str) -> Result<Tensor> {
        match self.places.get(name) {
            Some((unit, range)) => self.elements(*unit, 0, range.clone()),
            None => Err(damaged(&self.files[0].0, format!("{name} is not in this checkpoint"))),
        }
    }

    /// Elements of a unit's buffer, which may lie in several ranks' files.
    fn elements(&self, unit: usize, state: usize, range: Range<usize>) -> Result<Tensor> {
        let ranks = self.files.len();
        let part = |unit: &UnitRecord| unit.length / ranks;
        let before: usize = self.units[..unit].iter().map(part).sum();
        let own = part(&self.units[unit]);
        let mut bytes = vec![0_u8; range.len() * ELEMENT];
        let mut next = range.start;
        while next < range.end {
            let rank = next / own;
            let end = range.end.min((rank + 1) * own);
            let (path, file, data) = &self.files[rank];
            let element = before * STATES.len() + own * state + (next - rank * own);
            let into = (next - range.start) * ELEMENT..(end - range.start) * ELEMENT;
            file.read_exact_at(&mut bytes[into], data + (element * ELEMENT) as u64)
                .map_err(io(path, "read"))?;
            next = end;
        }
        Ok(Tensor::f_from_data_size(&bytes, &[range.len() as i64], Kind::Float)?)
    }
}
