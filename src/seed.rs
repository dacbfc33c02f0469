//! Every random choice of a run comes from its seed and from what it is for, never from how much
//! randomness was used before. So a forward pass can be run again, and a resumed run continues
//! as if it had not stopped.

/// The finalizer of splitmix64 (Steele et al., 2014).
#[must_use]
pub fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The seed of one stage's dropout in one micro-batch of one rank.
#[must_use]
pub fn of_stage(seed: u64, step: usize, micro_batch: usize, rank: usize, stage: usize) -> i64 {
    let parts = [step, micro_batch, rank, stage];
    let mixed = parts.iter().fold(mix(seed), |state, &part| mix(state ^ part as u64));
    // torch takes a signed seed; the sign bit is dropped to keep it positive.
    (mixed >> 1) as i64
}

/// The seed of a parameter that is initialised.
#[must_use]
pub fn of_name(seed: u64, name: &str) -> i64 {
    let mixed = name.bytes().fold(mix(seed), |state, byte| mix(state ^ u64::from(byte)));
    (mixed >> 1) as i64
}

/// Standard normal numbers by the method of Box and Muller (1958), in f64: unlike libtorch's they
/// do not depend on which vector instructions a processor has, so all hosts draw the same.
pub fn normals(seed: i64) -> impl Iterator<Item = f64> {
    (0_u64..).flat_map(move |pair| {
        let first = mix(mix(seed as u64) ^ (2 * pair));
        let second = mix(mix(seed as u64) ^ (2 * pair + 1));
        let radius = (-2.0 * unit(first).ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * unit(second)).sin_cos();
        [radius * cosine, radius * sine]
    })
}

/// Numbers spread evenly over `(0, 1]`, the same on all hosts.
pub fn uniforms(seed: i64) -> impl Iterator<Item = f64> {
    (0_u64..).map(move |place| unit(mix(mix(seed as u64) ^ place)))
}

/// 53 random bits, in (0, 1].
fn unit(bits: u64) -> f64 {
    ((bits >> 11) + 1) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_has_its_own_seed() {
        let mut seen = std::collections::BTreeSet::new();
        for step in 0..4 {
            for micro_batch in 0..3 {
                for rank in 0..3 {
                    for stage in 0..4 {
                        let drawn = of_stage(666, step, micro_batch, rank, stage);
                        assert!(drawn >= 0);
                        assert!(seen.insert(drawn), "seed of {step}/{micro_batch}/{rank}/{stage}");
                    }
                }
            }
        }
        assert_ne!(of_name(1, "a"), of_name(2, "a"));
        assert_ne!(of_name(1, "ab"), of_name(1, "ba"));
    }

    #[test]
    fn normals_are_normal() {
        let draws: Vec<f64> = normals(5).take(20_000).collect();
        let mean = draws.iter().sum::<f64>() / 20_000.0;
        let variance = draws.iter().map(|x| x * x).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        let beyond = draws.iter().filter(|x| x.abs() > 1.959_964).count() as f64 / 20_000.0;
        assert!((beyond - 0.05).abs() < 0.01, "{beyond}");
    }

    #[test]
    fn uniforms_are_uniform() {
        let draws: Vec<f64> = uniforms(7).take(20_000).collect();
        assert!(draws.iter().all(|x| 0.0 < *x && *x <= 1.0));
        for tenth in 1..=10 {
            let below = draws.iter().filter(|x| **x <= f64::from(tenth) / 10.0).count();
            assert!((below as f64 / 20_000.0 - f64::from(tenth) / 10.0).abs() < 0.01, "{below}");
        }
    }
}
