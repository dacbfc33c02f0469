//! Rotary position embeddings (Su et al., "RoFormer", 2021) on packed tokens, with the scalings of
//! transformers' `rope_parameters` (older files: `rope_scaling` and `rope_theta`).

use std::cell::RefCell;

use serde::Deserialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::torch_ext::storage::upload;

/// What turns positions into angles: the frequency of every pair of dimensions.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Radians for each position, `[dim / 2]`.
    frequencies: Vec<f32>,
    /// Factor on cosines and sines; 1 except with yarn.
    magnitude: f64,
}

/// The angles of a batch's tokens, as cosines and sines `[T, 1, dim / 2]`.
#[derive(Debug)]
pub struct Angles {
    cos: Tensor,
    sin: Tensor,
}

/// The angles of one batch, by what gave them. Layers share them, and on a GPU the host would have to wait
/// in each layer for the frequencies to be there.
#[derive(Debug, Default)]
pub(super) struct AngleCache(RefCell<Vec<(Rotary, Kind, Angles)>>);

/// `rope_parameters` or `rope_scaling` of a `config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawRope {
    rope_type: Option<String>,
    /// What older files call it; transformers saves such a file with both.
    #[serde(rename = "type")]
    older_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    partial_rotary_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
}

impl Rotary {
    /// Without scaling: the frequency of pair `i` is `theta^(-2 i / dim)`; `dim` is even.
    ///
    /// # Errors
    /// What is wrong with `dim` or `theta`.
    pub fn unscaled(dim: i64, theta: f64) -> Result<Self, String> {
        if dim < 2 || dim % 2 != 0 {
            return Err(format!("rotary embeddings need an even head dimension, found {dim}"));
        }
        if !(theta.is_finite() && theta > 0.0) {
            return Err(format!("rope_theta is {theta}, expected a number above 0"));
        }
        // In libtorch's fp32: another rounding of a frequency grows with the position.
        let powers = || -> std::result::Result<Vec<f32>, tch::TchError> {
            let exponents = Tensor::f_arange_start_step(0, dim, 2, (Kind::Float, Device::Cpu))?
                .f_div_scalar(dim as f64)?;
            Vec::try_from(Tensor::f_pow_scalar(theta, &exponents)?.f_reciprocal()?)
        };
        let frequencies = powers().map_err(|error| format!("rotary frequencies: {error}"))?;
        Ok(Self { frequencies, magnitude: 1.0 })
    }

    /// The embedding that `config`, a `config.json` of a decoder, asks for. Inputs never exceed
    /// `max_positions` tokens, so that the dynamic scaling, which begins there, scales nothing.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(config: &Value, dim: i64, max_positions: i64) -> Result<Self, String> {
        let given = ["rope_scaling", "rope_parameters"].into_iter().find_map(|key| {
            let value = config.get(key)?;
            value.is_object().then_some((key, value))
        });
        let (key, raw) = match given {
            Some((key, value)) => {
                let raw = RawRope::deserialize(value).map_err(|error| format!("{key}: {error}"))?;
                (key, raw)
            }
            None => ("rope_parameters", RawRope::default()),
        };
        let partial = raw
            .partial_rotary_factor
            .or_else(|| config.get("partial_rotary_factor").and_then(Value::as_f64));
        if let Some(partial) = partial.filter(|&partial| (partial - 1.0).abs() > 0.0) {
            return Err(format!("partial_rotary_factor {partial} is not supported, expected 1"));
        }
        let theta = raw
            .rope_theta
            .or_else(|| config.get("rope_theta").and_then(Value::as_f64))
            .unwrap_or(10_000.0);
        let plain = Self::unscaled(dim, theta)?;
        let original = config
            .get("original_max_position_embeddings")
            .and_then(Value::as_f64)
            .or(raw.original_max_position_embeddings)
            .unwrap_or(max_positions as f64);
        match raw.kind() {
            "default" | "dynamic" => Ok(plain),
            "linear" => {
                let factor = raw.needed(key, "factor", raw.factor)?;
                Ok(plain.map(|frequency| frequency / factor as f32))
            }
            "llama3" => raw.llama3(key, plain, original),
            "yarn" => raw.yarn(key, &plain, theta, original, max_positions as f64),
            other => Err(format!(
                "{key}: rope_type {other:?} is not supported, expected default, linear, dynamic, \
                 llama3 or yarn"
            )),
        }
    }

    fn map(mut self, change: impl Fn(f32) -> f32) -> Self {
        for frequency in &mut self.frequencies {
            *frequency = change(*frequency);
        }
        self
    }

    /// Cosines and sines for `position_ids` `[T]`, computed in fp32 and rounded to `kind`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn angles(&self, position_ids: &Tensor, kind: Kind) -> Result<Angles> {
        let frequencies = Tensor::f_from_slice(&self.frequencies)?;
        let frequencies = upload(&frequencies, position_ids.device())?;
        let positions = position_ids.f_to_kind(Kind::Float)?.f_view([-1, 1, 1])?;
        let angles = positions.f_mul(&frequencies)?;
        let table = |values: Tensor| -> Result<Tensor> {
            Ok(values.f_mul_scalar(self.magnitude)?.f_to_kind(kind)?)
        };
        Ok(Angles { cos: table(angles.f_cos()?)?, sin: table(angles.f_sin()?)? })
    }
}

impl AngleCache {
    /// [`Rotary::angles`], computed where it has not been.
    pub(super) fn get(&self, rotary: &Rotary, position_ids: &Tensor, kind: Kind) -> Result<Angles> {
        let mut known = self.0.borrow_mut();
        let is_it = |(of, in_kind, _): &&(Rotary, Kind, Angles)| of == rotary && *in_kind == kind;
        if let Some((_, _, angles)) = known.iter().find(is_it) {
            return Ok(angles.share());
        }
        let angles = rotary.angles(position_ids, kind)?;
        known.push((rotary.clone(), kind, angles.share()));
        Ok(angles)
    }
}

impl Angles {
    fn share(&self) -> Self {
        Self { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone() }
    }

    /// Rotates every head of `x` `[T, heads, dim]`: dimension `i` together with `i + dim / 2`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let halves = x.f_chunk(2, -1)?;
        let [low, high] = [&halves[0], &halves[1]];
        let turned = [
            low.f_mul(&self.cos)?.f_sub(&high.f_mul(&self.sin)?)?,
            high.f_mul(&self.cos)?.f_add(&low.f_mul(&self.sin)?)?,
        ];
        Ok(Tensor::f_cat(&turned, -1)?)
    }
}

impl RawRope {
    /// The scaling; where a file has both names, transformers goes by the newer.
    fn kind(&self) -> &str {
        self.rope_type.as_ref().or(self.older_type.as_ref()).map_or("default", String::as_str)
    }

    fn needed(&self, key: &str, name: &str, value: Option<f64>) -> Result<f64, String> {
        value
            .filter(|value| *value > 0.0)
            .ok_or_else(|| format!("{key}: {} needs {name}, a number above 0", self.kind()))
    }

    /// Llama 3.1's: long wavelengths are stretched, short ones kept, those between blended.
    fn llama3(&self, key: &str, plain: Rotary, original: f64) -> Result<Rotary, String> {
        let factor = self.needed(key, "factor", self.factor)? as f32;
        let low = self.needed(key, "low_freq_factor", self.low_freq_factor)? as f32;
        let high = self.needed(key, "high_freq_factor", self.high_freq_factor)? as f32;
        let original = original as f32;
        Ok(plain.map(|frequency| {
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            if wavelength < original / high {
                frequency
            } else if wavelength > original / low {
                frequency / factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }))
    }

    /// Peng et al., "`YaRN`", 2023: a ramp over the dimensions between the stretched frequencies and
    /// the plain ones, and larger scores.
    fn yarn(
        &self,
        key: &str,
        plain: &Rotary,
        theta: f64,
        original: f64,
        max_positions: f64,
    ) -> Result<Rotary, String> {
        let factor = match self.factor {
            None => max_positions / original,
            given => self.needed(key, "factor", given)?,
        };
        let pairs = plain.frequencies.len();
        let dim = 2.0 * pairs as f64;
        let turns = |turns: f64| {
            dim * (original / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
        };
        let set = |value: Option<f64>, default| value.filter(|v| *v != 0.0).unwrap_or(default);
        let (mut low, mut high) =
            (turns(set(self.beta_fast, 32.0)), turns(set(self.beta_slow, 1.0)));
        if self.truncate.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let width = if high == low { 0.001 } else { high - low };
        let frequencies = plain.frequencies.iter().enumerate().map(|(pair, &frequency)| {
            let ramp = ((pair as f64 - low) / width).clamp(0.0, 1.0) as f32;
            (frequency / factor as f32) * ramp + frequency * (1.0 - ramp)
        });
        let grown = |scale: f64| if factor > 1.0 { 0.1 * scale * factor.ln() + 1.0 } else { 1.0 };
        let magnitude = match (self.attention_factor, set(self.mscale, 0.0), self.mscale_all_dim) {
            (Some(given), ..) => given,
            (None, scale, Some(all)) if scale != 0.0 && all != 0.0 => grown(scale) / grown(all),
            _ => grown(1.0),
        };
        Ok(Rotary { frequencies: frequencies.collect(), magnitude })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    /// `config.json` of a golden model, and its embedding.
    fn golden(case: &str) -> (Value, i64, Rotary) {
        let path = format!("{}/tests/golden/{case}/config.json", env!("CARGO_MANIFEST_DIR"));
        let config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let hidden = config["hidden_size"].as_i64().unwrap();
        let heads = config["num_attention_heads"].as_i64().unwrap();
        let dim = config["head_dim"].as_i64().unwrap_or(hidden / heads);
        let rotary = Rotary::read(&config, dim, 64).unwrap();
        (config, dim, rotary)
    }

    #[test]
    fn layers_share_the_angles_of_a_batch() {
        let positions = Tensor::from_slice(&[0_i64, 1, 2, 0, 1]);
        let cache = AngleCache::default();
        let (short, long) =
            (Rotary::unscaled(8, 1e4).unwrap(), Rotary::unscaled(8, 1.6e5).unwrap());
        let of = |rotary: &Rotary, kind| cache.get(rotary, &positions, kind).unwrap();
        let first = of(&short, Kind::Float);
        assert_eq!(first.cos.data_ptr(), of(&short.clone(), Kind::Float).cos.data_ptr());
        assert_eq!(of(&short, Kind::BFloat16).cos.kind(), Kind::BFloat16);
        for (rotary, angles) in [(&short, of(&short, Kind::Float)), (&long, of(&long, Kind::Float))]
        {
            assert!(angles.sin.equal(&rotary.angles(&positions, Kind::Float).unwrap().sin));
        }
    }

    #[test]
    fn the_spelling_of_older_files_means_the_same() {
        for case in ["llama_odd", "llama_yarn", "mistral_tiny", "qwen2_yarn", "qwen3_odd"] {
            let (mut config, dim, rotary) = golden(case);
            let mut scaling = config["rope_parameters"].take();
            config.as_object_mut().unwrap().remove("rope_parameters");
            let fields = scaling.as_object_mut().unwrap();
            config["rope_theta"] = fields.remove("rope_theta").unwrap();
            let kind = fields.remove("rope_type").unwrap();
            fields.insert("type".into(), kind.clone());
            config["rope_scaling"] = scaling;
            assert_eq!(Rotary::read(&config, dim, 64).unwrap(), rotary, "{case}");
            // As transformers saves such a file; where the two differ, the newer name counts.
            config["rope_scaling"]["rope_type"] = kind;
            for older in ["longrope", "default"] {
                assert_eq!(Rotary::read(&config, dim, 64).unwrap(), rotary, "{case}");
                config["rope_scaling"]["type"] = older.into();
            }
        }
    }

    /// So that the golden logits of these models tell whether each is read.
    #[test]
    fn every_option_of_the_yarn_models_matters() {
        for case in ["llama_yarn", "qwen2_yarn"] {
            let (config, dim, rotary) = golden(case);
            for option in config["rope_parameters"].as_object().unwrap().keys() {
                let mut without = config.clone();
                without["rope_parameters"].as_object_mut().unwrap().remove(option);
                let other = Rotary::read(&without, dim, 64);
                assert_ne!(other.as_ref().ok(), Some(&rotary), "{case} without {option}");
            }
        }
    }
}
