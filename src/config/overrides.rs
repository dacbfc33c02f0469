//! Settings from the command line: `--set lr=2e-5`, `--set deepspeed_config.zero_stage=2`.

use super::reader::overridden;
use super::tree::{Entry, Mapping, Node, Place, Value, parse};
use crate::error::{Error, Result};

/// The overrides as one mapping of the highest precedence, and a notice for each that is
/// overridden by a later one.
#[derive(Debug, Default)]
pub struct Overrides {
    /// The settings, nested where their keys have dots.
    pub mapping: Mapping,
    /// What a repeated key lost.
    pub notices: Vec<String>,
}

impl Overrides {
    /// Reads `key=value` arguments; of a repeated key the last one wins.
    ///
    /// # Errors
    /// An argument without `=` or without a key.
    pub fn parse(arguments: &[String]) -> Result<Self> {
        let mut overrides = Self::default();
        for argument in arguments {
            let Some((key, value)) = argument.split_once('=') else {
                return Err(Error::Usage(format!(
                    "--set {argument}: expected key=value, as in --set lr=2e-5"
                )));
            };
            if key.split('.').any(|part| part.trim().is_empty()) {
                return Err(Error::Usage(format!("--set {argument}: the key is missing")));
            }
            overrides.set("--set", key.trim(), value, key.chars().count() + 2)?;
        }
        Ok(overrides)
    }

    /// Adds the setting `key` with the YAML text `value` of the command-line option `option`;
    /// `column` is where the value starts in what the user typed after the option.
    ///
    /// # Errors
    /// `key` names both a value and a mapping.
    pub fn set(
        &mut self,
        option: &'static str,
        key: &str,
        value: &str,
        column: usize,
    ) -> Result<()> {
        let shown = match option {
            "--set" => format!("--set {key}={value}"),
            _ => format!("{option} {value}"),
        };
        let place = Place::in_option(option, &shown, column);
        let key_place = Place { column: 1, ..place.clone() };
        let node = value_node(value, place);
        let notice = insert(&mut self.mapping, key, key, node, &key_place)?;
        self.notices.extend(notice);
        Ok(())
    }
}

/// The value as YAML. A value that is not YAML (`query_format=[Q] {}`) is the text it is.
fn value_node(value: &str, place: Place) -> Node {
    let typed = Some(value.to_owned());
    match parse(value, &place) {
        Ok(Some(node)) => Node { place, typed, ..node },
        // White space or a comment is nothing to YAML, but somebody has typed it.
        Ok(None) => {
            let plain = value.is_empty();
            Node { value: Value::Scalar { text: value.into(), plain }, typed, place }
        }
        Err(_) => Node { value: Value::Scalar { text: value.into(), plain: false }, typed, place },
    }
}

/// Puts `node` under the dotted `key` of `mapping`; returns a notice when it replaces another.
fn insert(
    mapping: &mut Mapping,
    full: &str,
    key: &str,
    node: Node,
    place: &Place,
) -> Result<Option<String>> {
    let (head, rest) = key.split_once('.').map_or((key, None), |(head, rest)| (head, Some(rest)));
    let position = mapping.iter().position(|entry| entry.key == head);
    match (position, rest) {
        (Some(at), None) => {
            let notice = overridden(full, &node, &mapping[at].node);
            mapping[at].node = node;
            Ok(Some(notice))
        }
        (None, None) => {
            mapping.push(Entry { key: head.into(), place: place.clone(), node });
            Ok(None)
        }
        (Some(at), Some(rest)) => match &mut mapping[at].node.value {
            Value::Mapping(inner) => insert(inner, full, rest, node, place),
            _ => Err(place.error(format!("{head}: set to a value and to a mapping at once"))),
        },
        (None, Some(rest)) => {
            let mut inner = Mapping::new();
            insert(&mut inner, full, rest, node, place)?;
            let node = Node { place: place.clone(), value: Value::Mapping(inner), typed: None };
            mapping.push(Entry { key: head.into(), place: place.clone(), node });
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use crate::config::tree::entry;

    fn overrides(arguments: &[&str]) -> Result<Overrides> {
        Overrides::parse(&arguments.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn values_are_yaml_or_else_text() {
        let set = overrides(&[
            "lr=2e-5",
            "seed=",
            "query_format={}",
            "document_format=[D] {}",
            "seq=a=b",
            "special_lr_groups=[{keywords: [score], lr: 1}]",
        ])
        .unwrap();
        let node = |key| &entry(&set.mapping, key).unwrap().node;
        assert_eq!(node("lr").float(), Some(2e-5));
        assert!(node("seed").is_null());
        assert_eq!(node("query_format").text(), Some("{}"));
        assert_eq!(node("document_format").text(), Some("[D] {}"));
        assert_eq!(node("seq").text(), Some("a=b"));
        assert!(
            matches!(&node("special_lr_groups").value, Value::Sequence(items) if items.len() == 1)
        );
    }

    #[test]
    fn a_text_is_what_was_typed() {
        for (typed, text) in [
            ("runs/exp #3", "runs/exp #3"),
            (" ", " "),
            (" a ", " a "),
            ("a\nb", "a\nb"),
            ("# a", "# a"),
            ("&a b", "&a b"),
            ("' a'", " a"),
            ("\"a\\nb\"", "a\nb"),
            ("{}", "{}"),
            ("[D] {}", "[D] {}"),
        ] {
            let set = overrides(&[&format!("seq={typed}")]).unwrap();
            let node = &entry(&set.mapping, "seq").unwrap().node;
            assert!(!node.is_null(), "{typed:?}");
            assert_eq!(node.verbatim(), Some(text), "{typed:?}");
        }
        let set = overrides(&["seq= null", "special_token=''", "lr= 1e-5 # less"]).unwrap();
        let node = |key| &entry(&set.mapping, key).unwrap().node;
        assert!(node("seq").is_null());
        assert_eq!(node("special_token").verbatim(), Some(""));
        assert_eq!(node("lr").float(), Some(1e-5));
    }

    #[test]
    fn dotted_keys_nest_and_the_last_of_a_repeated_key_wins() {
        let set = overrides(&["a.b=1", "a.c=2", "a.b=3"]).unwrap();
        assert_eq!(set.mapping.len(), 1);
        assert_eq!(entry(&set.mapping, "a").unwrap().node.show(), "{b: 3, c: 2}");
        assert_eq!(set.notices, ["a.b: 3 from --set overrides 1 from --set"]);
    }

    #[test]
    fn malformed_arguments_are_refused() {
        let table = [
            ("lr", "--set lr: expected key=value, as in --set lr=2e-5"),
            ("=3", "--set =3: the key is missing"),
            ("a..b=3", "--set a..b=3: the key is missing"),
        ];
        for (argument, message) in table {
            assert_eq!(overrides(&[argument]).unwrap_err().to_string(), message);
        }
        let error = overrides(&["a=1", "a.b=2"]).unwrap_err().to_string();
        assert_eq!(error, "--set a.b=2: a: set to a value and to a mapping at once");
    }
}
