//! Files that `torch.save` writes: a ZIP archive since PyTorch 1.6, a row of pickles before. Of both
//! only the pickles are read here; tensors stay in the file until they are asked for.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};

use tch::Kind;
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Id, Pickle, Value};
use super::{Element, Place};

/// What the first pickle of an older file holds.
const MAGIC: Value = Value::Int(0x1950_a86a_20f9_469c_fc6c);

/// Where a storage, the memory of one or more tensors, lies in the file.
#[derive(Debug, Clone, Copy)]
struct Storage {
    offset: u64,
    bytes: u64,
}

/// Where the tensors of `file`, which is `length` bytes long, lie in it, under their names in its
/// state dictionary.
///
/// # Errors
/// What is wrong with the file.
pub(super) fn places(file: &File, length: u64) -> Result<Vec<(String, Place)>, String> {
    let mut reader = BufReader::new(file);
    let (pickle, storages) = match reader.fill_buf().map_err(|error| error.to_string())? {
        [b'P', b'K', ..] => read_archive(reader)?,
        [0x80, ..] => read_older(reader, length)?,
        _ => return Err("not a file that torch.save wrote".into()),
    };
    let Value::Dict(items) = pickle.top() else {
        return Err("holds no dictionary of tensors".into());
    };
    let mut places = Vec::new();
    for &(key, value) in items {
        if let (Value::Text(name), Value::Call { .. }) = (pickle.get(key), pickle.get(value)) {
            let place = place_of(&pickle, value, &storages)
                .map_err(|message| format!("tensor {name}: {message}"))?;
            places.push((name.clone(), place));
        }
    }
    Ok(places)
}

fn read_archive(reader: BufReader<&File>) -> Result<(Pickle, HashMap<String, Storage>), String> {
    let damaged = |error| format!("truncated or damaged: {error}");
    let mut archive = ZipArchive::new(reader).map_err(damaged)?;
    let mut storages = HashMap::new();
    let mut pickle = None;
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(damaged)?;
        // All stand in one folder, whose name says nothing.
        let name = entry.name().split_once('/').map_or("", |(_, name)| name).to_owned();
        if entry.compression() != CompressionMethod::Stored {
            return Err(format!(
                "{name} is compressed, expected an archive as torch.save writes it"
            ));
        }
        let storage = Storage { offset: entry.data_start(), bytes: entry.size() };
        match name.strip_prefix("data/") {
            Some(key) => drop(storages.insert(key.to_owned(), storage)),
            None if name == "data.pkl" => pickle = Some(index),
            None => {}
        }
        if name == "byteorder" {
            drop(entry);
            let mut order = String::new();
            let mut entry = archive.by_index(index).map_err(damaged)?;
            entry.read_to_string(&mut order).map_err(|error| error.to_string())?;
            check_order(order == "little")?;
        }
    }
    let Some(index) = pickle else {
        return Err("the archive holds no data.pkl, expected weights that torch.save wrote".into());
    };
    let entry = archive.by_index(index).map_err(damaged)?;
    let pickle = read_pickle(&mut BufReader::new(entry))?;
    Ok((pickle, storages))
}

/// Five pickles (a magic number, the version, the machine, the object, the keys of the storages),
/// then each storage's number of elements and its elements.
fn read_older(
    mut reader: BufReader<&File>,
    length: u64,
) -> Result<(Pickle, HashMap<String, Storage>), String> {
    if *read_pickle(&mut reader)?.top() != MAGIC {
        return Err("a pickle, but none that torch.save wrote".into());
    }
    read_pickle(&mut reader)?;
    let machine = read_pickle(&mut reader)?;
    if let Value::Dict(items) = machine.top() {
        let little = |&(key, value): &(Id, Id)| match machine.key(key).as_deref() {
            Some("little_endian") => *machine.get(value) == Value::Bool(true),
            _ => true,
        };
        check_order(items.iter().all(little))?;
    }
    let pickle = read_pickle(&mut reader)?;
    let keys = read_pickle(&mut reader)?;
    let Value::List(keys_in_order) = keys.top() else {
        return Err("lists no storages".into());
    };
    let widths = storage_widths(&pickle);
    let mut storages = HashMap::new();
    for &id in keys_in_order {
        let key = keys.key(id).ok_or("a storage has no name")?;
        let width = *widths.get(&key).ok_or_else(|| format!("storage {key} is of no tensor"))?;
        let mut count = [0_u8; 8];
        reader.read_exact(&mut count).map_err(|_| "truncated: a storage is missing")?;
        let offset = reader.stream_position().map_err(|error| error.to_string())?;
        let bytes = u64::from_le_bytes(count).saturating_mul(width);
        let end = offset.saturating_add(bytes);
        if end > length {
            return Err(format!("truncated: {end} bytes expected, the file has {length}"));
        }
        reader.seek(SeekFrom::Start(end)).map_err(|error| error.to_string())?;
        storages.insert(key, Storage { offset, bytes });
    }
    Ok((pickle, storages))
}

/// Bytes of an element of each storage that the pickle names.
fn storage_widths(pickle: &Pickle) -> HashMap<String, u64> {
    let named = pickle.values().filter_map(|value| match value {
        Value::Persistent(id) => storage_of(pickle, *id),
        _ => None,
    });
    named.map(|(key, _, width)| (key, width)).collect()
}

/// Key, element and its bytes of the storage that `("storage", type, key, location, length, …)`
/// names.
fn storage_of(pickle: &Pickle, id: Id) -> Option<(String, Element, u64)> {
    let [_, class, key, ..] = pickle.tuple(id)[..] else { return None };
    let class = pickle.global(class)?.rsplit('.').next()?;
    let float = |kind: Kind| (Element::Float(kind), kind.elt_size_in_bytes() as u64);
    let (element, width) = match class {
        "FloatStorage" => float(Kind::Float),
        "HalfStorage" => float(Kind::Half),
        "BFloat16Storage" => float(Kind::BFloat16),
        "DoubleStorage" => float(Kind::Double),
        "LongStorage" => (Element::Other("int64".into()), 8),
        "IntStorage" => (Element::Other("int32".into()), 4),
        "ShortStorage" => (Element::Other("int16".into()), 2),
        "CharStorage" | "ByteStorage" | "BoolStorage" => (Element::Other("bytes".into()), 1),
        _ => return None,
    };
    Some((pickle.key(key)?, element, width))
}

/// Where the tensor that the call `id` makes lies.
fn place_of(
    pickle: &Pickle,
    mut id: Id,
    storages: &HashMap<String, Storage>,
) -> Result<Place, String> {
    loop {
        let Value::Call { function, arguments } = *pickle.get(id) else {
            return Err("is no tensor".into());
        };
        let name = pickle.global(function).unwrap_or_default();
        match (name, pickle.tuple(arguments)) {
            // A parameter holds its tensor as the first argument.
            ("torch._utils._rebuild_parameter", &[tensor, ..]) => id = tensor,
            (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                &[storage, offset, shape, strides, ..],
            ) => return strided(pickle, [storage, offset, shape, strides], storages),
            // Sparse or quantised, say: a complaint only if it is asked for.
            _ => return Ok(Place::contiguous(Element::Other(name.into()), vec![], 0)),
        }
    }
}

fn strided(
    pickle: &Pickle,
    [storage, offset, shape, strides]: [Id; 4],
    storages: &HashMap<String, Storage>,
) -> Result<Place, String> {
    let Value::Persistent(storage) = *pickle.get(storage) else {
        return Err("has no storage".into());
    };
    let (key, element, width) = storage_of(pickle, storage).ok_or("has an unknown storage")?;
    let storage = storages.get(&key).ok_or_else(|| format!("storage {key} is not in the file"))?;
    let sizes = |id: Id| pickle.tuple(id).iter().map(|&id| pickle.size(id)).collect::<Option<_>>();
    let (Some(shape), Some(strides), Some(offset)) =
        (sizes(shape), sizes(strides), pickle.size(offset))
    else {
        return Err("has a shape that is none".into());
    };
    let mut place = Place { element, shape, strides, offset: 0 };
    let begin = (offset as u64).checked_mul(width);
    let end = begin.and_then(|begin| begin.checked_add(place.span()?.checked_mul(width)?));
    match (begin, end) {
        (Some(begin), Some(end)) if end <= storage.bytes => {
            place.offset = storage.offset + begin;
            Ok(place)
        }
        _ => Err(format!("reaches beyond its storage {key} of {} bytes", storage.bytes)),
    }
}

fn check_order(little: bool) -> Result<(), String> {
    if little { Ok(()) } else { Err("written on a big-endian machine".into()) }
}

/// Reads a pickle of the file.
fn read_pickle(reader: &mut impl BufRead) -> Result<Pickle, String> {
    Pickle::read(reader)
        .map_err(|message| format!("truncated or damaged: in its pickle, {message}"))
}
