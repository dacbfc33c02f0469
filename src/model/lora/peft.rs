//! Adapters on disk, as peft writes and reads them: `adapter_config.json` and
//! `adapter_model.safetensors`.

use std::path::Path;

use serde_json::{Value, json};

use super::Lora;
use crate::error::{Error, Result};

/// The configuration's name inside an adapter directory.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The weights' name inside an adapter directory.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What tensor names begin with in the weights, before the model's own.
pub const PREFIX: &str = "base_model.model.";

/// Settings that change what an adapter computes, by the value that is known here; null and absent
/// mean the same as that.
const KNOWN: [(&str, Value); 12] = [
    ("use_dora", Value::Bool(false)),
    ("fan_in_fan_out", Value::Bool(false)),
    ("lora_bias", Value::Bool(false)),
    ("use_qalora", Value::Bool(false)),
    ("alpha_pattern", Value::Null),
    ("layer_replication", Value::Null),
    ("trainable_token_indices", Value::Null),
    ("alora_invocation_tokens", Value::Null),
    ("arrow_config", Value::Null),
    ("kasa_config", Value::Null),
    ("monteclora_config", Value::Null),
    ("use_bdlora", Value::Null),
];

/// Ways of initialising an adapter that leave the base's weights as they are, beside true and false.
/// With the others peft changes those weights whenever it loads the adapter.
const PLAIN_INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// What an `adapter_config.json` says, as far as computing with the adapter needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The model under the adapter: a directory or a hub id, with `@revision` where one is given.
    pub base: String,
    alpha: f64,
    /// Whether products are divided by the root of the rank (Kalajdzievski, 2023).
    by_root: bool,
}

impl AdapterConfig {
    /// Reads the configuration in `dir`; `None` where there is none, or where the directory is a
    /// model by itself.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] when it cannot be read, or is of a kind not known here.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(CONFIG_FILE);
        if dir.join("config.json").exists() || !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(|source| Error::Io {
            path: path.clone(),
            action: "read",
            source,
        })?;
        let file = |message: String| Error::File { path: path.clone(), message };
        let value: Value = serde_json::from_str(&text)
            .map_err(|error| file(format!("not valid JSON: {error}")))?;
        Self::from_json(&value).map(Some).map_err(file)
    }

    fn from_json(value: &Value) -> Result<Self, String> {
        let kind = &value["peft_type"];
        if kind != "LORA" {
            return Err(format!("peft_type is {kind}, expected \"LORA\""));
        }
        for (key, known) in KNOWN {
            let found = &value[key];
            let is_empty = found.as_object().is_some_and(serde_json::Map::is_empty);
            if !(found.is_null() || *found == known || is_empty) {
                return Err(format!("{key} is {found}, which is not supported, expected {known}"));
            }
        }
        let init = &value["init_lora_weights"];
        let is_plain = match init.as_str() {
            Some(name) => PLAIN_INITS.contains(&name.to_lowercase().as_str()),
            None => init.is_null() || init.is_boolean(),
        };
        if !is_plain {
            return Err(format!(
                "init_lora_weights is {init}, with which peft changes the base model's weights as it \
                 loads the adapter; give one that is converted to plain LoRA (peft's save_pretrained \
                 with path_initial_model_for_weight_conversion), or the merged model"
            ));
        }
        let base = value["base_model_name_or_path"].as_str().filter(|base| !base.is_empty());
        let base = base.ok_or("base_model_name_or_path is missing: which model is it for?")?;
        let base = match value["revision"].as_str().filter(|_| !Path::new(base).is_dir()) {
            Some(revision) => format!("{base}@{revision}"),
            None => base.to_owned(),
        };
        let alpha = value["lora_alpha"].as_f64().ok_or("lora_alpha is missing")?;
        Ok(Self { base, alpha, by_root: value["use_rslora"] == true })
    }

    /// What the product of an adapter of rank `r` is multiplied by.
    #[must_use]
    pub fn scaling(&self, r: i64) -> f64 {
        let r = r as f64;
        self.alpha / if self.by_root { r.sqrt() } else { r }
    }
}

impl Lora {
    /// The `adapter_config.json` of these adapters on the model `base`, which is a directory or a hub
    /// id, at a commit of the hub.
    #[must_use]
    pub fn adapter_config(&self, base: &str, revision: Option<&str>) -> Value {
        // An adapter is loaded from anywhere, and so is its base.
        let base = if Path::new(base).is_dir() {
            let absolute = std::path::absolute(base).unwrap_or_else(|_| base.into());
            absolute.to_string_lossy().into_owned()
        } else {
            base.split('@').next().unwrap_or(base).to_owned()
        };
        json!({
            "base_model_name_or_path": base,
            "revision": revision,
            "peft_type": "LORA",
            "task_type": "SEQ_CLS",
            "inference_mode": true,
            "r": self.r,
            "lora_alpha": number(self.alpha),
            "lora_dropout": self.dropout,
            "target_modules": self.target_names,
            "modules_to_save": self.saved_names,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "use_rslora": false,
            "use_dora": false,
        })
    }
}

/// Whole numbers as integers, as peft declares them.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 { json!(value as i64) } else { json!(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_refused() {
        let good = json!({"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4,
            "lora_alpha": 6, "use_dora": false, "alpha_pattern": {}, "revision": "abc"});
        let config = AdapterConfig::from_json(&good);
        let expected = AdapterConfig { base: "org/base@abc".into(), alpha: 6.0, by_root: false };
        assert_eq!(config.as_ref(), Ok(&expected));
        assert_eq!(expected.scaling(4), 1.5);
        for init in [json!(true), json!(false), Value::Null, json!("gaussian"), json!("eva")] {
            let mut plain = good.clone();
            plain["init_lora_weights"] = init;
            assert_eq!(AdapterConfig::from_json(&plain).as_ref(), Ok(&expected), "{plain}");
        }
        assert_eq!(AdapterConfig { by_root: true, ..expected }.scaling(4), 3.0);
        for (key, value, says) in [
            ("peft_type", json!("LOHA"), "peft_type is \"LOHA\""),
            ("use_dora", json!(true), "use_dora is true"),
            ("alpha_pattern", json!({"query": 3}), "alpha_pattern is {\"query\":3}"),
            ("alora_invocation_tokens", json!([7]), "alora_invocation_tokens is [7], which is not"),
            (
                "init_lora_weights",
                json!("pissa_niter_4"),
                "init_lora_weights is \"pissa_niter_4\", ",
            ),
            (
                "init_lora_weights",
                json!("loftq"),
                "init_lora_weights is \"loftq\", with which peft",
            ),
            ("base_model_name_or_path", Value::Null, "base_model_name_or_path is missing"),
        ] {
            let mut bad = good.clone();
            bad[key] = value;
            let error = AdapterConfig::from_json(&bad).err().unwrap_or_default();
            assert!(error.starts_with(says), "{error}");
        }
    }
}
