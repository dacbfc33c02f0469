//! Typed reading of a mapping that remembers which names were asked for.
//!
//! The set of known keys is exactly what the code reads: whatever is left over is an error that
//! names the nearest key that was asked for. One key may be looked up in several layers
//! (command line, then file); the first layer that has it wins, and the loss of the other is noted.

use std::collections::{BTreeMap, BTreeSet};

use super::other_names;
use super::tree::{Entry, Mapping, Node, Place, Value, entry};
use crate::error::{Error, Result};

/// A value that was written somewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// The key as it was written, with the names of the mappings around it.
    pub key: String,
    /// Where the value is.
    pub place: Place,
}

impl<T> Setting<T> {
    /// An error about this setting; `message` says what was expected and what was found.
    #[must_use]
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        self.origin().error(message)
    }

    /// Where the value came from.
    #[must_use]
    pub fn origin(&self) -> Origin {
        Origin { key: self.key.clone(), place: self.place.clone() }
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The key as it was written, with the names of the mappings around it.
    pub key: String,
    /// Where the value is.
    pub place: Place,
}

impl Origin {
    /// An error about the value that was given here.
    #[must_use]
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        self.place.error(format!("{}: {message}", self.key))
    }
}

/// A value, or `auto`: whatever the training YAML says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auto<T> {
    /// Take it from the training YAML.
    Auto,
    /// Take this.
    Value(T),
}

/// A text, or a list of texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OneOrMany {
    /// A text by itself.
    One(String),
    /// A list.
    Many(Vec<String>),
}

/// What reading left behind, beside the values.
#[derive(Debug, Default)]
pub struct Log {
    /// Every name that was asked for, dotted where nested.
    pub known: BTreeSet<String>,
    /// Where each given setting came from, by its canonical dotted name.
    pub origins: BTreeMap<String, Origin>,
    /// One line for each value that lost to a layer of higher precedence.
    pub notices: Vec<String>,
    /// Keys that are legal but mean nothing here.
    pub ignored: Vec<String>,
}

impl Log {
    fn absorb(&mut self, other: Self) {
        self.known.extend(other.known);
        self.origins.extend(other.origins);
        self.notices.extend(other.notices);
        self.ignored.extend(other.ignored);
    }
}

/// A reader over one mapping, seen through its layers.
pub struct Fields<'a> {
    /// From the highest precedence to the lowest.
    layers: Vec<&'a [Entry]>,
    /// The dotted name of the mapping itself, empty or ending in a dot.
    prefix: String,
    log: Log,
}

impl<'a> Fields<'a> {
    /// A reader over `layers`, from the highest precedence to the lowest.
    #[must_use]
    pub fn new(layers: Vec<&'a [Entry]>) -> Self {
        Self { layers, prefix: String::new(), log: Log::default() }
    }

    /// The winning entry under `names`, the first of which is canonical and the rest its aliases.
    fn find(&mut self, names: &[&'static str]) -> Result<Option<&'a Entry>> {
        for name in names {
            self.log.known.insert(format!("{}{name}", self.prefix));
        }
        let mut winner: Option<&'a Entry> = None;
        for &layer in &self.layers {
            let mut given = names.iter().filter_map(|name| entry(layer, name));
            let Some(found) = given.next() else { continue };
            if let Some(second) = given.next() {
                return Err(second.place.error(format!(
                    "{}: the same setting as {} on line {}; keep one of them",
                    second.key, found.key, found.place.line
                )));
            }
            match winner {
                None => winner = Some(found),
                Some(high) if same(&high.node, &found.node) => {}
                Some(high) => self.log.notices.push(overridden(
                    &format!("{}{}", self.prefix, names[0]),
                    &high.node,
                    &found.node,
                )),
            }
        }
        Ok(winner.filter(|entry| !entry.node.is_null()))
    }

    /// Finds a key and reads its value with `read`, which returns `None` for a wrong type.
    fn read<T>(
        &mut self,
        names: &[&'static str],
        expected: &str,
        read: impl FnOnce(&Node) -> Option<T>,
    ) -> Result<Option<Setting<T>>> {
        let Some(found) = self.find(names)? else { return Ok(None) };
        let place = found.node.place.clone();
        let key = format!("{}{}", self.prefix, found.key);
        let Some(value) = read(&found.node) else {
            let found = found.node.describe();
            return Err(place.error(format!("{key}: expected {expected}, found {found}")));
        };
        let setting = Setting { value, key, place };
        self.log.origins.insert(format!("{}{}", self.prefix, names[0]), setting.origin());
        Ok(Some(setting))
    }

    /// Text; any scalar will do.
    ///
    /// # Errors
    /// A list or a mapping.
    pub fn string(&mut self, key: &'static str) -> Result<Option<Setting<String>>> {
        self.read(&[key], "text", |node| node.verbatim().map(str::to_owned))
    }

    /// A finite number.
    ///
    /// # Errors
    /// Anything else.
    pub fn float(&mut self, key: &'static str) -> Result<Option<Setting<f64>>> {
        self.read(&[key], "a number", Node::float)
    }

    /// An integer, under `names[0]` or one of its aliases.
    ///
    /// # Errors
    /// Anything else, or two of the names at once.
    pub fn integer(&mut self, names: &[&'static str]) -> Result<Option<Setting<i64>>> {
        self.read(names, "an integer", Node::integer)
    }

    /// `true` or `false`, also spelled `yes`/`no` or `on`/`off`.
    ///
    /// # Errors
    /// Anything else.
    pub fn boolean(&mut self, key: &'static str) -> Result<Option<Setting<bool>>> {
        self.read(&[key], "true or false", Node::boolean)
    }

    /// A switch that `RAG-Retrieval` writes as 0 or 1.
    ///
    /// # Errors
    /// Anything but 0, 1 and the booleans.
    pub fn switch(&mut self, key: &'static str) -> Result<Option<Setting<bool>>> {
        self.read(&[key], "0, 1, true or false", |node| match node.integer() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => node.boolean(),
        })
    }

    /// `true`, `false` or `auto`.
    ///
    /// # Errors
    /// Anything else.
    pub fn boolean_or_auto(&mut self, key: &'static str) -> Result<Option<Setting<Auto<bool>>>> {
        self.read(&[key], "true, false or \"auto\"", |node| auto(node, Node::boolean))
    }

    /// An integer or `auto`.
    ///
    /// # Errors
    /// Anything else.
    pub fn integer_or_auto(&mut self, key: &'static str) -> Result<Option<Setting<Auto<i64>>>> {
        self.read(&[key], "an integer or \"auto\"", |node| auto(node, Node::integer))
    }

    /// A number or `auto`.
    ///
    /// # Errors
    /// Anything else.
    pub fn float_or_auto(&mut self, key: &'static str) -> Result<Option<Setting<Auto<f64>>>> {
        self.read(&[key], "a number or \"auto\"", |node| auto(node, Node::float))
    }

    /// One of a closed set of names, in any letter case; several names may mean the same.
    ///
    /// # Errors
    /// Any other value; the message lists the names.
    pub fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
    ) -> Result<Option<Setting<T>>> {
        self.choice_of(&[key], choices)
    }

    /// As [`Fields::choice`], under `keys[0]` or one of its aliases.
    ///
    /// # Errors
    /// As [`Fields::choice`], or two of the keys at once.
    pub fn choice_of<T: Copy>(
        &mut self,
        keys: &[&'static str],
        choices: &[(&str, T)],
    ) -> Result<Option<Setting<T>>> {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        self.read(keys, &one_of(&names), |node| {
            let text = node.text()?;
            choices
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(text) || is_same_boolean(node, name))
                .map(|(_, value)| *value)
        })
    }

    /// A list of texts; a single text is a list of one.
    ///
    /// # Errors
    /// A mapping, or a list that holds one.
    pub fn strings(&mut self, key: &'static str) -> Result<Option<Setting<Vec<String>>>> {
        let setting = self.one_or_many(key)?;
        Ok(setting.map(|Setting { value, key, place }| {
            let value = match value {
                OneOrMany::One(text) => vec![text],
                OneOrMany::Many(texts) => texts,
            };
            Setting { value, key, place }
        }))
    }

    /// A text or a list of texts, told apart.
    ///
    /// # Errors
    /// As [`Fields::strings`].
    pub fn one_or_many(&mut self, key: &'static str) -> Result<Option<Setting<OneOrMany>>> {
        self.read(&[key], "a list of texts", |node| match &node.value {
            Value::Sequence(items) => {
                let texts = items.iter().map(|item| item.text().map(str::to_owned));
                texts.collect::<Option<_>>().map(OneOrMany::Many)
            }
            _ => node.verbatim().map(|text| OneOrMany::One(text.to_owned())),
        })
    }

    /// A list of mappings, each read by `read`, which must ask for every legal key.
    ///
    /// # Errors
    /// Not such a list, an unknown key in it, or what `read` finds.
    pub fn sections<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Fields<'a>, &Place) -> Result<T>,
    ) -> Result<Option<Setting<Vec<T>>>> {
        let Some(found) = self.find(&[key])? else { return Ok(None) };
        let place = found.node.place.clone();
        let name = format!("{}{key}", self.prefix);
        let Value::Sequence(items) = &found.node.value else {
            let found = found.node.describe();
            return Err(place.error(format!("{name}: expected a list of mappings, found {found}")));
        };
        let mut value = Vec::with_capacity(items.len());
        for item in items {
            let Value::Mapping(mapping) = &item.value else {
                let found = item.describe();
                return Err(item.place.error(format!("{name}: expected a mapping, found {found}")));
            };
            let mut child = Fields::new(vec![mapping]);
            child.prefix = format!("{name}.");
            value.push(read(&mut child, &item.place)?);
            // A list belongs to one source as a whole, so that its keys are checked at once.
            check_known(mapping, &child.prefix, &child.log.known)?;
        }
        let setting = Setting { value, key: name.clone(), place };
        self.log.origins.insert(name, setting.origin());
        Ok(Some(setting))
    }

    /// A mapping inside this one, read by `read`, which must ask for every legal key. `read` runs
    /// also when the mapping is absent, so that its names are known to `--set`. `null` hides the
    /// mappings of lower layers.
    /// Returns what `read` made, and the place of the mapping when it holds anything.
    ///
    /// # Errors
    /// Not a mapping, an unknown key in it, or what `read` finds.
    pub fn section<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Fields<'a>) -> Result<T>,
    ) -> Result<(T, Option<Place>)> {
        let name = format!("{}{key}", self.prefix);
        self.log.known.insert(name.clone());
        let mut layers: Vec<&'a [Entry]> = Vec::new();
        let mut place = None;
        let mut null: Option<&'a Entry> = None;
        for &layer in &self.layers {
            let Some(found) = entry(layer, key) else { continue };
            if let Some(high) = null {
                // As of a scalar: what is above says that there is none.
                if !found.node.is_null() {
                    self.log.notices.push(overridden(&name, &high.node, &found.node));
                }
                continue;
            }
            if found.node.is_null() {
                null = Some(found);
                continue;
            }
            let Value::Mapping(mapping) = &found.node.value else {
                let what = found.node.describe();
                let message = format!("{name}: expected a mapping, found {what}");
                return Err(found.node.place.error(message));
            };
            if !mapping.is_empty() {
                place.get_or_insert_with(|| found.place.clone());
            }
            layers.push(mapping);
        }
        let mut child = Fields { layers, prefix: format!("{name}."), log: Log::default() };
        let value = read(&mut child)?;
        let log = child.finish()?;
        self.log.absorb(log);
        Ok((value, place))
    }

    /// As [`Fields::section`]; `None` where no layer has the mapping, or the highest that has the key
    /// says `null`. An empty one is there.
    ///
    /// # Errors
    /// As [`Fields::section`].
    pub fn optional_section<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Fields<'a>) -> Result<T>,
    ) -> Result<Option<T>> {
        let mut given = self.layers.iter().filter_map(|layer| entry(layer, key));
        let origin = given
            .next()
            .filter(|entry| !entry.node.is_null())
            .map(|entry| Origin { key: key.to_owned(), place: entry.place.clone() });
        let (value, _) = self.section(key, read)?;
        let is_given = origin.is_some();
        self.log.origins.extend(origin.map(|origin| (format!("{}{key}", self.prefix), origin)));
        Ok(is_given.then_some(value))
    }

    /// Keys that are legal but have no meaning here; those given are listed once.
    ///
    /// # Errors
    /// None today; the signature is that of its siblings.
    pub fn ignored(&mut self, keys: &[&'static str]) -> Result<()> {
        for key in keys {
            if let Some(found) = self.find(&[key])? {
                self.log.ignored.push(format!("{}{}", self.prefix, found.key));
            }
        }
        Ok(())
    }

    /// A scalar that asks for something this program does not do, unless it is `harmless`.
    ///
    /// # Errors
    /// Any other value; `reason` says why that cannot be done, or what to do instead.
    pub fn only(&mut self, key: &'static str, harmless: &str, reason: &str) -> Result<()> {
        let Some(found) = self.find(&[key])? else { return Ok(()) };
        let node = &found.node;
        let same = node.float().is_some_and(|value| harmless.parse() == Ok(value));
        if same || node.text() == Some(harmless) || is_same_boolean(node, harmless) {
            return Ok(());
        }
        let name = format!("{}{key}", self.prefix);
        let found = node.describe();
        Err(node.place.error(format!("{name}: expected {harmless}, found {found}: {reason}")))
    }

    /// A mapping that asks for something this program does not do: legal only when empty, or when
    /// it says `enabled: false`.
    ///
    /// # Errors
    /// It holds anything; `reason` says why that cannot be done.
    pub fn empty(&mut self, key: &'static str, reason: &str) -> Result<()> {
        let Some(found) = self.find(&[key])? else { return Ok(()) };
        let is_empty = match &found.node.value {
            Value::Mapping(mapping) => {
                let enabled = entry(mapping, "enabled").and_then(|entry| entry.node.boolean());
                mapping.is_empty() || enabled == Some(false)
            }
            Value::Sequence(items) => items.is_empty(),
            Value::Scalar { .. } => false,
        };
        if is_empty {
            return Ok(());
        }
        Err(found.place.error(format!("{}{key}: {reason}", self.prefix)))
    }

    /// Ends the reading: every key of every file layer must have been asked for.
    /// Command-line layers are checked by [`unknown_override`] once all files are read, because an
    /// option may belong to any of them.
    ///
    /// # Errors
    /// The first unknown key, with the nearest known name.
    pub fn finish(self) -> Result<Log> {
        let files = self.layers.iter().flat_map(|layer| layer.iter());
        let entries = files.filter(|entry| entry.place.option.is_none());
        check_known(entries, &self.prefix, &self.log.known)?;
        Ok(self.log)
    }
}

/// Refuses the first of `entries` that is not `known`.
fn check_known<'e>(
    entries: impl IntoIterator<Item = &'e Entry>,
    prefix: &str,
    known: &BTreeSet<String>,
) -> Result<()> {
    for entry in entries {
        let name = format!("{prefix}{}", entry.key);
        if !known.contains(&name) {
            return Err(unknown(&name, &entry.place, known));
        }
    }
    Ok(())
}

/// Refuses a command-line override that no file's reader asked for.
///
/// # Errors
/// The first unknown key, with the nearest name of all that are known.
pub fn unknown_override(overrides: &Mapping, prefix: &str, known: &BTreeSet<String>) -> Result<()> {
    check_known(overrides, prefix, known)?;
    for entry in overrides {
        let inner = format!("{prefix}{}.", entry.key);
        if let Value::Mapping(mapping) = &entry.node.value
            && known.iter().any(|known| known.starts_with(&inner))
        {
            unknown_override(mapping, &inner, known)?;
        }
    }
    Ok(())
}

/// Whether two layers say the same, however they spell it.
fn same(high: &Node, low: &Node) -> bool {
    high.show() == low.show()
        || (high.verbatim().is_some() && high.verbatim() == low.verbatim())
        || (high.float().is_some() && high.float() == low.float())
}

/// The notice about a value that lost.
#[must_use]
pub fn overridden(key: &str, high: &Node, low: &Node) -> String {
    format!(
        "{key}: {} from {} overrides {} from {}",
        high.show(),
        high.place,
        low.show(),
        low.place
    )
}

fn unknown(name: &str, place: &Place, known: &BTreeSet<String>) -> Error {
    let (prefix, last) = name
        .rsplit_once('.')
        .map_or(("", name), |(_, last)| (&name[..name.len() - last.len()], last));
    let siblings =
        known.iter().filter_map(|name| name.strip_prefix(prefix)).filter(|n| !n.contains('.'));
    let ours = other_names::ours(last).filter(|ours| known.contains(&format!("{prefix}{ours}")));
    let hint = ours.or_else(|| nearest(last, siblings));
    let hint = match hint {
        _ if last == "<<" => {
            Some("; YAML's merge keys are not read: write its keys out here".to_owned())
        }
        hint => hint.map(|near| format!("; did you mean {near}?")),
    };
    place.error(format!("{name}: unknown key{}", hint.unwrap_or_default()))
}

/// The nearest of `known` to `name`, when it is near enough to be a slip of the keyboard: at most
/// a third of the letters wrong (a swap counts as one), or the name begun and not finished.
pub fn nearest<'k>(name: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let name = name.to_ascii_lowercase().replace('-', "_");
    known
        .map(|known| (strsim::damerau_levenshtein(&name, &known.to_ascii_lowercase()), known))
        .filter(|(distance, known)| {
            *distance <= name.len().max(known.len()) / 3
                || (name.len() >= 4 && (known.starts_with(&name) || name.starts_with(known)))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

/// Whether `name` is a boolean, and `node` the same one in whatever spelling.
fn is_same_boolean(node: &Node, name: &str) -> bool {
    name.parse::<bool>().is_ok_and(|name| node.boolean() == Some(name))
}

fn auto<T>(node: &Node, read: impl FnOnce(&Node) -> Option<T>) -> Option<Auto<T>> {
    match node.text() {
        Some("auto") => Some(Auto::Auto),
        _ => read(node).map(Auto::Value),
    }
}

/// `a, b or c`.
fn one_of(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}
