//! What a worker's lines begin with: a template such as `[{rank}] `.

use std::str::FromStr;

use super::Clock;

/// What may stand between braces.
const FIELDS: &[(&str, Field)] = &[
    ("rank", Field::Rank),
    ("local_rank", Field::LocalRank),
    ("host", Field::Host),
    ("time", Field::Time),
    ("stream", Field::Stream),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Rank,
    LocalRank,
    Host,
    Time,
    Stream,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(Field),
}

/// A prefix with fields in braces; `{{` and `}}` stand for braces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

/// What the fields of one stream are, but for the time.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a> {
    /// Over all hosts.
    pub rank: usize,
    /// On this host.
    pub local_rank: usize,
    /// The host's name.
    pub host: &'a str,
    /// `stdout` or `stderr`.
    pub stream: &'a str,
}

impl Template {
    /// Fills in all but the time.
    pub fn fill(&self, fields: Fields<'_>) -> Prefix {
        let mut texts = vec![String::new()];
        for part in &self.parts {
            let text = match part {
                Part::Text(text) => text.clone(),
                Part::Field(Field::Rank) => fields.rank.to_string(),
                Part::Field(Field::LocalRank) => fields.local_rank.to_string(),
                Part::Field(Field::Host) => fields.host.to_owned(),
                Part::Field(Field::Stream) => fields.stream.to_owned(),
                Part::Field(Field::Time) => {
                    texts.push(String::new());
                    continue;
                }
            };
            if let Some(last) = texts.last_mut() {
                last.push_str(&text);
            }
        }
        Prefix { texts, whole: String::new() }
    }
}

impl Default for Template {
    fn default() -> Self {
        let (open, close) = (Part::Text("[".to_owned()), Part::Text("] ".to_owned()));
        Self { parts: vec![open, Part::Field(Field::Rank), close] }
    }
}

impl FromStr for Template {
    type Err = String;

    fn from_str(template: &str) -> Result<Self, String> {
        if template.contains(['\n', '\r']) {
            return Err(
                "a prefix stands in front of a line; it cannot hold a line break".to_owned()
            );
        }
        let mut parts = Vec::new();
        let mut rest = template;
        while let Some(at) = rest.find(['{', '}']) {
            let (text, behind) = rest.split_at(at);
            let brace = &behind[..1];
            parts.push(Part::Text(text.to_owned()));
            if behind[1..].starts_with(brace) {
                parts.push(Part::Text(brace.to_owned()));
                rest = &behind[2..];
                continue;
            }
            let inside = behind[1..].split_once('}').filter(|_| brace == "{");
            let (name, behind) = inside.ok_or_else(|| {
                format!("`{brace}` has no partner; write `{brace}{brace}` for the character itself")
            })?;
            let field = FIELDS.iter().find(|(known, _)| *known == name);
            let (_, field) = field.ok_or_else(|| {
                let known: Vec<_> = FIELDS.iter().map(|(name, _)| format!("{{{name}}}")).collect();
                format!("there is no {{{name}}}; there are {}", known.join(", "))
            })?;
            parts.push(Part::Field(*field));
            rest = behind;
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Self { parts })
    }
}

/// A template of which only the time is open.
#[derive(Debug)]
pub struct Prefix {
    /// The time stands between each two of them.
    texts: Vec<String>,
    whole: String,
}

impl Prefix {
    /// The prefix as it is now.
    pub fn now(&mut self, clock: &mut Clock) -> &[u8] {
        if let [text] = self.texts.as_slice() {
            return text.as_bytes();
        }
        let time = clock.now();
        self.whole.clear();
        for (number, text) in self.texts.iter().enumerate() {
            if number > 0 {
                self.whole.push_str(time);
            }
            self.whole.push_str(text);
        }
        self.whole.as_bytes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use super::*;

    fn filled(template: &str) -> String {
        let fields = Fields { rank: 9, local_rank: 1, host: "node7", stream: "stderr" };
        let template: Template = template.parse().unwrap();
        String::from_utf8(template.fill(fields).now(&mut Clock::default()).to_vec()).unwrap()
    }

    #[test]
    fn fields_are_filled_in() {
        assert_eq!(filled(""), "");
        assert_eq!(filled("{host}:{local_rank} {rank}/{stream}| "), "node7:1 9/stderr| ");
        assert_eq!(filled("{{{rank}}}"), "{9}");
        let timed = filled("{time} {rank} {time}>");
        let (time, rest) = timed.split_once(' ').unwrap();
        assert!(time.ends_with('Z') && time.len() == 24, "{timed}");
        assert_eq!(rest, format!("9 {time}>"));
        let default: Template = "[{rank}] ".parse().unwrap();
        let fields = Fields { rank: 0, local_rank: 0, host: "", stream: "" };
        let mut clock = Clock::default();
        let own = Template::default().fill(fields).now(&mut clock).to_vec();
        assert_eq!(default.fill(fields).now(&mut clock), own);
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for (template, expected) in [
            ("{rang}", "there is no {rang}; there are {rank}, {local_rank}"),
            ("{}", "there is no {}"),
            ("{rank", "`{` has no partner"),
            ("rank}", "`}` has no partner"),
            ("a\nb", "line break"),
        ] {
            let error = template.parse::<Template>().unwrap_err();
            assert!(error.contains(expected), "{template}: {error}");
        }
    }
}
