//! The plan as text for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::plan::Plan;

impl Plan {
    /// The plan under the YAML's own key names, for `reranker.json`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        // Every path in the plan came from UTF-8 text, and every number is finite, so that
        // serialization has nothing to fail on.
        serde_json::to_value(self).unwrap_or_default()
    }

    /// Every setting on a line of its own, with where it came from, for `--dry-run` and `check`.
    #[must_use]
    pub fn describe(&self) -> String {
        let json = self.to_json();
        let mut sections: Vec<(&str, Map<String, Value>)> = Vec::new();
        for name in ["model", "data", "training", "validation", "saving", "logging", "parallel"] {
            if let Some(Value::Object(fields)) = json.get(name) {
                sections.push((name, fields.clone()));
            }
        }
        if let (Some(loss), Some((_, training))) =
            (json.get("loss_type"), sections.iter_mut().find(|(name, _)| *name == "training"))
        {
            training.insert("loss_type".into(), loss.clone());
        }
        let rows: Vec<_> = sections
            .iter()
            .flat_map(|(_, fields)| fields.iter().map(|(key, value)| (key, show(value))))
            .collect();
        let key_width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
        // One long path must not push every origin off the screen.
        let value_width =
            rows.iter().map(|(_, value)| value.chars().count()).filter(|&w| w <= 40).max();
        let value_width = value_width.unwrap_or(0);
        let mut text = String::new();
        for (name, fields) in &sections {
            let _ = writeln!(text, "{name}");
            for (key, value) in fields {
                let origin = self.origins.get(key);
                let origin = origin.map_or("default".into(), |origin| origin.place.to_string());
                let value = show(value);
                let _ = writeln!(text, "  {key:key_width$}  {value:value_width$}  {origin}");
            }
        }
        text
    }
}

/// A value on one line, texts without quotes where they need none.
fn show(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) if !text.is_empty() && text.trim() == text && !text.contains('\n') => {
            text.clone()
        }
        Value::Array(items) if items.is_empty() => "none".into(),
        other => other.to_string(),
    }
}
