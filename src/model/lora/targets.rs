//! Which modules of a model get adapters, and which are trained whole: peft's rules for names.

use std::collections::BTreeSet;

use regex::Regex;

use super::{Lora, module_of};
use crate::config::{ALL_LINEAR, LoraPlan, TargetModules};
use crate::model::stage::{Init, Parameter};
use crate::model::weights::without_trunk;
use crate::model::{ModelConfig, bare_stages};

/// What peft adapts in each family where nothing is said; for ModernBERT, of which it knows none,
/// the layer that holds the same projections.
const DEFAULTS: &[(&[&str], &[&str])] = &[
    (&["bert", "roberta", "xlm-roberta"], &["query", "value"]),
    (&["modernbert"], &["Wqkv"]),
    (&["gemma", "llama", "mistral", "qwen2", "qwen3"], &["q_proj", "v_proj"]),
];

/// What is wrong with a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadModules {
    /// The setting's name.
    pub key: &'static str,
    /// What is wrong with it.
    pub message: String,
}

/// The modules of a model, by whole name.
struct Modules {
    parameters: Vec<Parameter>,
    /// Of linear layers.
    linear: BTreeSet<String>,
    /// All with a parameter of their own.
    all: BTreeSet<String>,
    /// What is called by the head's name, as in `classifier`; a checkpoint may lack it.
    heads: BTreeSet<String>,
}

impl Modules {
    fn of(config: &ModelConfig) -> Self {
        let parameters: Vec<Parameter> =
            bare_stages(config).iter().flat_map(|stage| stage.parameters()).collect();
        let modules = |wanted: &dyn Fn(&Parameter) -> bool| -> BTreeSet<String> {
            let parts = parameters.iter().filter(|p| wanted(p)).flat_map(|p| &p.parts);
            parts.map(|part| module_of(&part.name).to_owned()).collect()
        };
        let is_new = |p: &Parameter| p.parts.iter().any(|part| part.init != Init::FromCheckpoint);
        let first = |module: &String| {
            let inside = without_trunk(module);
            inside.split('.').next().unwrap_or(inside).to_owned()
        };
        Self {
            linear: modules(&|p| p.linear),
            all: modules(&|_| true),
            heads: modules(&is_new).iter().map(first).collect(),
            parameters,
        }
    }

    /// The modules whose name ends in `name`, and those inside them.
    fn inside<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a String> {
        self.all.iter().filter(move |module| {
            let ends = module.match_indices('.').map(|(end, _)| end).chain([module.len()]);
            ends.into_iter().any(|end| module[..end].ends_with(name))
        })
    }

    /// The last names of linear layers that are not in `saved`.
    fn known(&self, saved: &BTreeSet<String>) -> String {
        let last = |module: &'_ String| module.rsplit('.').next().unwrap_or_default().to_owned();
        let names: BTreeSet<String> = self.linear.difference(saved).map(last).collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    }
}

/// Finds the modules that `plan` names in the model of `config`.
///
/// # Errors
/// The setting that names a module that is not there, or cannot be adapted, with those that can.
pub fn resolve(plan: &LoraPlan, config: &ModelConfig) -> Result<Lora, BadModules> {
    let modules = Modules::of(config);
    let saved = saved(plan, &modules)?;
    let targets = targets(plan, config, &modules, &saved)
        .map_err(|message| BadModules { key: "lora.target_modules", message })?;
    let mut saved_names = modules.heads;
    saved_names.extend(plan.modules_to_save.iter().cloned());
    Ok(Lora {
        r: plan.r as i64,
        alpha: plan.alpha,
        dropout: plan.dropout,
        target_names: target_names(plan, &targets),
        targets,
        saved,
        saved_names,
    })
}

/// The head, and what `modules_to_save` names.
fn saved(plan: &LoraPlan, modules: &Modules) -> Result<BTreeSet<String>, BadModules> {
    let bad = |message| BadModules { key: "lora.modules_to_save", message };
    let mut saved: BTreeSet<String> = BTreeSet::new();
    for name in modules.heads.iter().chain(&plan.modules_to_save) {
        let found: Vec<_> = modules.inside(name).cloned().collect();
        if found.is_empty() {
            let examples: BTreeSet<&str> =
                modules.all.iter().filter_map(|module| module.rsplit('.').next()).collect();
            let examples: Vec<&str> = examples.into_iter().collect();
            return Err(bad(format!(
                "no module's name ends in {name:?}, known are {}",
                examples.join(", ")
            )));
        }
        saved.extend(found);
    }
    // What is one product here is one parameter, which learns as a whole or not at all.
    for parameter in &modules.parameters {
        let names: Vec<&str> = parameter.parts.iter().map(|part| module_of(&part.name)).collect();
        let (inside, outside): (Vec<&str>, Vec<&str>) =
            names.into_iter().partition(|&name| saved.contains(name));
        if let (Some(inside), Some(outside)) = (inside.first(), outside.first()) {
            return Err(bad(format!(
                "{inside} is computed together with {outside}; name both, or give {inside} an \
                 adapter by target_modules"
            )));
        }
    }
    Ok(saved)
}

/// The linear layers that get adapters.
fn targets(
    plan: &LoraPlan,
    config: &ModelConfig,
    modules: &Modules,
    saved: &BTreeSet<String>,
) -> Result<BTreeSet<String>, String> {
    let free = || modules.linear.difference(saved).cloned();
    let known = || modules.known(saved);
    match &plan.target_modules {
        Some(TargetModules::Text(text)) if text.eq_ignore_ascii_case(ALL_LINEAR) => {
            Ok(free().collect())
        }
        Some(TargetModules::Text(text)) => {
            let pattern = Regex::new(&format!("^(?:{text})$")).map_err(|error| {
                let error = error.to_string();
                let reason = error.lines().last().unwrap_or_default().trim();
                format!("{text:?} is no regular expression known here: {reason}")
            })?;
            let found: BTreeSet<String> = free().filter(|name| pattern.is_match(name)).collect();
            if found.is_empty() {
                return Err(format!(
                    "no linear layer is called {text:?}; a text by itself is a regular expression \
                     over whole names (as in peft), a list has the ends of names: [{}], or \
                     all-linear",
                    known()
                ));
            }
            Ok(found)
        }
        Some(TargetModules::Names(names)) => by_names(names, modules, saved),
        None => {
            let family = |(families, _): &&(&[&str], &[&str])| {
                families.contains(&config.model_type.as_str())
            };
            let Some((_, names)) = DEFAULTS.iter().find(family) else {
                return Err(format!("needed for {} models: {}", config.model_type, known()));
            };
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            by_names(&names, modules, saved)
        }
    }
}

/// How peft is told of `targets`: as they were given, or by the last parts of their names.
fn target_names(plan: &LoraPlan, targets: &BTreeSet<String>) -> TargetModules {
    match &plan.target_modules {
        Some(given @ TargetModules::Names(_)) => given.clone(),
        Some(TargetModules::Text(text)) if !text.eq_ignore_ascii_case(ALL_LINEAR) => {
            TargetModules::Text(text.clone())
        }
        _ => {
            let last = |module: &String| module.rsplit('.').next().unwrap_or_default().to_owned();
            let names: BTreeSet<String> = targets.iter().map(last).collect();
            TargetModules::Names(names.into_iter().collect())
        }
    }
}

fn by_names(
    names: &[String],
    modules: &Modules,
    saved: &BTreeSet<String>,
) -> Result<BTreeSet<String>, String> {
    let mut targets = BTreeSet::new();
    for name in names {
        let end = format!(".{name}");
        let is_called = |module: &&String| *module == name || module.ends_with(&end);
        let found: Vec<&String> = modules.all.iter().filter(is_called).collect();
        let free = found
            .iter()
            .filter(|module| modules.linear.contains(**module) && !saved.contains(**module));
        let before = targets.len();
        targets.extend(free.map(|module| (*module).clone()));
        if targets.len() > before || targets.iter().any(|module| is_called(&module)) {
            continue;
        }
        let known = modules.known(saved);
        return Err(match found.first() {
            None => format!("no module is called {name:?}, known are {known}, and all-linear"),
            Some(module) if saved.contains(*module) => {
                format!("{module} is trained whole (the head always is); known are {known}")
            }
            Some(module) => format!(
                "{module} is no linear layer; known are {known}; other modules may be trained whole, \
                 by modules_to_save"
            ),
        });
    }
    Ok(targets)
}
