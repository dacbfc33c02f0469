//! Python's pickle format as data: calls are recorded, never carried out, so that a weight file
//! cannot run code. Protocols 2 to 5, as far as `torch.save` uses them.
//!
//! Values live in one arena and refer to each other by index: what a pickle memoises and changes
//! later stays one value, and no nesting, however deep, makes anything here recurse.

use std::collections::HashMap;
use std::io::{BufRead, Read};

/// A value's index in its [`Pickle`].
pub type Id = usize;

/// A value of a pickle.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number of up to 16 bytes.
    Int(i128),
    /// `True` or `False`.
    Bool(bool),
    /// Text.
    Text(String),
    /// A tuple.
    Tuple(Vec<Id>),
    /// A list.
    List(Vec<Id>),
    /// A dictionary, ordered ones included.
    Dict(Vec<(Id, Id)>),
    /// A class or function by its full name, `torch._utils._rebuild_tensor_v2` for example.
    Global(String),
    /// What a function would return, or a class construct.
    Call {
        /// The function or class.
        function: Id,
        /// Its arguments, a tuple.
        arguments: Id,
    },
    /// Something outside the pickle, under this identifier.
    Persistent(Id),
    /// `None`, or a value that no weights are made of: a float, bytes.
    Other,
}

/// The values of a pickle.
#[derive(Debug, Default)]
pub struct Pickle {
    values: Vec<Value>,
    top: Id,
}

impl Pickle {
    /// Reads one pickle and nothing behind it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(reader: &mut impl BufRead) -> Result<Self, String> {
        let mut machine = Machine::new(reader);
        while machine.step()? {}
        let top = machine.pop()?;
        Ok(Self { values: machine.values, top })
    }

    /// The outermost value.
    #[must_use]
    pub fn top(&self) -> &Value {
        self.get(self.top)
    }

    /// All values, in no telling order.
    pub fn values(&self) -> impl Iterator<Item = &Value> {
        self.values.iter()
    }

    /// The value `id`, which must come from this pickle.
    #[must_use]
    pub fn get(&self, id: Id) -> &Value {
        &self.values[id]
    }

    /// The elements of a tuple; none of anything else.
    #[must_use]
    pub fn tuple(&self, id: Id) -> &[Id] {
        if let Value::Tuple(items) = self.get(id) { items } else { &[] }
    }

    /// A whole number that is not negative.
    #[must_use]
    pub fn size(&self, id: Id) -> Option<i64> {
        match *self.get(id) {
            Value::Int(value) if value >= 0 => i64::try_from(value).ok(),
            _ => None,
        }
    }

    /// Text, or a number as text: how storages are called.
    #[must_use]
    pub fn key(&self, id: Id) -> Option<String> {
        match self.get(id) {
            Value::Text(text) => Some(text.clone()),
            Value::Int(value) => Some(value.to_string()),
            _ => None,
        }
    }

    /// The full name of a class or function.
    #[must_use]
    pub fn global(&self, id: Id) -> Option<&str> {
        if let Value::Global(name) = self.get(id) { Some(name) } else { None }
    }
}

/// The stack machine that a pickle is a program for.
struct Machine<'a, R> {
    reader: &'a mut R,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at its marks.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl<'a, R: BufRead> Machine<'a, R> {
    fn new(reader: &'a mut R) -> Self {
        Self { reader, values: vec![], stack: vec![], marks: vec![], memo: HashMap::new() }
    }

    /// Carries out one instruction; false after the last.
    fn step(&mut self) -> Result<bool, String> {
        let [code] = self.bytes()?;
        match code {
            b'.' => return Ok(false),
            0x80 => self.skip(1)?,
            0x95 => self.skip(8)?,
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Value::Other),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'G' => {
                self.skip(8)?;
                self.push(Value::Other);
            }
            b'J' | b'K' | b'M' | 0x8a => self.push_number(code)?,
            b'X' | b'T' | b'U' | 0x8c | 0x8d => self.push_text(code)?,
            b'B' | b'C' => {
                let length = self.unsigned(if code == b'B' { 4 } else { 1 })?;
                self.skip(length)?;
                self.push(Value::Other);
            }
            b']' => self.push(Value::List(vec![])),
            b'}' => self.push(Value::Dict(vec![])),
            b')' => self.push(Value::Tuple(vec![])),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items));
            }
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(code - 0x84))?;
                self.push(Value::Tuple(items));
            }
            b'a' | b'e' | b's' | b'u' => self.fill(code)?,
            b'c' | 0x93 => self.push_global(code)?,
            b'R' | 0x81 => self.call()?,
            // The state of an object, `_metadata` of a state dictionary for example.
            b'b' | b'0' => {
                self.pop()?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id));
            }
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memoise(code)?,
            _ => return Err(format!("instruction 0x{code:02x} is not one that torch.save writes")),
        }
        Ok(true)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn push_number(&mut self, code: u8) -> Result<(), String> {
        let value = match code {
            b'J' => i32::from_le_bytes(self.bytes()?).into(),
            b'K' => self.unsigned(1)?.into(),
            b'M' => self.unsigned(2)?.into(),
            _ => {
                let length = self.unsigned(1)? as usize;
                let mut bytes = [0; 16];
                let Some(low) = bytes.get_mut(..length) else {
                    return Err(format!("it holds a number of {length} bytes"));
                };
                self.reader.read_exact(low).map_err(|error| ends_early(&error))?;
                let unused = 8 * (16 - length as u32);
                // Shifted up and down again, which spreads the sign.
                if length == 0 { 0 } else { (i128::from_le_bytes(bytes) << unused) >> unused }
            }
        };
        self.push(Value::Int(value));
        Ok(())
    }

    fn push_text(&mut self, code: u8) -> Result<(), String> {
        let length = self.unsigned(match code {
            b'U' | 0x8c => 1,
            0x8d => 8,
            _ => 4,
        })?;
        let mut bytes = Vec::new();
        // Not allocated at once: a damaged length must not ask for all memory.
        self.reader.take(length).read_to_end(&mut bytes).map_err(|error| ends_early(&error))?;
        if bytes.len() as u64 != length {
            return Err("it ends early".into());
        }
        self.push(Value::Text(String::from_utf8_lossy(&bytes).into_owned()));
        Ok(())
    }

    fn push_global(&mut self, code: u8) -> Result<(), String> {
        let (module, name) = if code == b'c' {
            (self.line()?, self.line()?)
        } else {
            let [module, name] = self.pop_many(2)?[..] else { return Err(underflow()) };
            match (&self.values[module], &self.values[name]) {
                (Value::Text(module), Value::Text(name)) => (module.clone(), name.clone()),
                _ => return Err("a class has a name that is no text".into()),
            }
        };
        self.push(Value::Global(format!("{module}.{name}")));
        Ok(())
    }

    /// Puts values into the list or dictionary below them.
    fn fill(&mut self, code: u8) -> Result<(), String> {
        let items = match code {
            b'a' => self.pop_many(1)?,
            b's' => self.pop_many(2)?,
            _ => self.pop_to_mark()?,
        };
        let id = *self.stack.last().ok_or_else(underflow)?;
        match (&mut self.values[id], code) {
            (Value::List(list), b'a' | b'e') => list.extend(items),
            (Value::Dict(dict), b's' | b'u') => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err("it puts values into what is no list or dictionary".into()),
        }
        Ok(())
    }

    fn call(&mut self) -> Result<(), String> {
        let arguments = self.pop()?;
        let function = self.pop()?;
        let ordered_dict = Value::Global("collections.OrderedDict".into());
        self.push(if self.values[function] == ordered_dict {
            Value::Dict(vec![])
        } else {
            Value::Call { function, arguments }
        });
        Ok(())
    }

    fn memoise(&mut self, code: u8) -> Result<(), String> {
        let key = match code {
            b'q' | b'h' => self.unsigned(1)?,
            b'r' | b'j' => self.unsigned(4)?,
            _ => self.memo.len() as u64,
        };
        if matches!(code, b'h' | b'j') {
            let id =
                self.memo.get(&key).ok_or_else(|| format!("it recalls {key}, which is unset"))?;
            self.stack.push(*id);
        } else {
            let id = *self.stack.last().ok_or_else(underflow)?;
            self.memo.insert(key, id);
        }
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.stack.pop().ok_or_else(underflow)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, String> {
        let from = self.stack.len().checked_sub(count).ok_or_else(underflow)?;
        Ok(self.stack.split_off(from))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len());
        Ok(self.stack.split_off(mark.ok_or_else(underflow)?))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(|error| ends_early(&error))?;
        Ok(bytes)
    }

    /// A little-endian number of `width` bytes, at most 8.
    fn unsigned(&mut self, width: usize) -> Result<u64, String> {
        let mut bytes = [0; 8];
        self.reader.read_exact(&mut bytes[..width]).map_err(|error| ends_early(&error))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn skip(&mut self, count: u64) -> Result<(), String> {
        let skipped = std::io::copy(&mut self.reader.take(count), &mut std::io::sink());
        match skipped.map_err(|error| ends_early(&error))? {
            done if done == count => Ok(()),
            _ => Err("it ends early".into()),
        }
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        self.reader.read_line(&mut line).map_err(|error| ends_early(&error))?;
        line.strip_suffix('\n').map(str::to_owned).ok_or_else(|| "it ends early".into())
    }
}

fn ends_early(error: &std::io::Error) -> String {
    format!("it ends early: {error}")
}

fn underflow() -> String {
    "it takes more values than it made".into()
}
