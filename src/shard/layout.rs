//! Where each parameter of a stage lies in the stage's flat buffer. Pure arithmetic, no tensors.

use std::ops::Range;

use crate::model::Parameter;

/// Parameters start at multiples of this many elements (64 bytes of fp32), so that matrix kernels
/// see aligned rows whatever came before.
const ALIGNMENT: usize = 16;

/// Learning rates and decay by parameter name.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterGroups {
    /// Learning rate of parameters that no special group names.
    pub lr: f64,
    /// Decay of decayed parameters.
    pub weight_decay: f64,
    /// `(keywords, lr)`: the first group with a keyword inside a parameter's name sets its rate.
    pub special: Vec<(Vec<String>, f64)>,
}

impl ParameterGroups {
    /// Keywords that no part of any of `parameters` has in its name.
    #[must_use]
    pub fn unmatched(&self, parameters: &[Parameter]) -> Vec<&str> {
        let keywords = self.special.iter().flat_map(|(keywords, _)| keywords);
        let names = || parameters.iter().flat_map(|p| &p.parts).map(|part| &part.name);
        keywords
            .map(String::as_str)
            .filter(|keyword| !names().any(|name| name.contains(keyword)))
            .collect()
    }

    fn lr_of(&self, name: &str) -> f64 {
        self.special
            .iter()
            .find(|(keywords, _)| keywords.iter().any(|keyword| name.contains(keyword.as_str())))
            .map_or(self.lr, |&(_, lr)| lr)
    }
}

/// One parameter's place.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// Elements of the flat buffer.
    pub range: Range<usize>,
    /// The stacked shape.
    pub shape: Vec<i64>,
    /// Checkpoint name, shape and elements of each part, in stacking order.
    pub parts: Vec<(crate::model::stage::TensorSpec, Range<usize>)>,
}

/// A run of the buffer whose parameters share learning rate and decay.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Elements of the flat buffer; padding inside and after belongs to the run.
    pub range: Range<usize>,
    /// Base learning rate, before the schedule's factor.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// The layout of one stage's flat buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct UnitLayout {
    /// The parameters in the stage's order.
    pub places: Vec<Place>,
    /// The runs in buffer order; they cover the whole buffer.
    pub runs: Vec<Run>,
    /// Elements of the buffer, a multiple of the world size.
    pub length: usize,
    /// Elements that are parameters, without padding.
    pub elements: usize,
}

impl UnitLayout {
    /// Lays out `parameters`: those with one learning rate and decay stand together, and the
    /// buffer divides by `world_size`.
    #[must_use]
    pub fn new(parameters: &[Parameter], groups: &ParameterGroups, world_size: usize) -> Self {
        let key = |index: &usize| {
            let parameter = &parameters[*index];
            let decay = if parameter.decayed { groups.weight_decay } else { 0.0 };
            (decay, groups.lr_of(&parameter.parts[0].name))
        };
        let mut order: Vec<usize> = (0..parameters.len()).collect();
        // Stable, so that equal keys keep the stage's order; decayed parameters come first.
        order.sort_by(|a, b| {
            let (a, b) = (key(a), key(b));
            b.0.total_cmp(&a.0).then(a.1.total_cmp(&b.1))
        });

        let mut ranges = vec![0..0; parameters.len()];
        let mut runs: Vec<Run> = Vec::new();
        let mut next: usize = 0;
        for index in order {
            let (weight_decay, _) = key(&index);
            let start = next;
            for part in &parameters[index].parts {
                let lr = groups.lr_of(&part.name);
                let end = next + part.elements();
                match runs.last_mut() {
                    Some(run) if run.lr == lr && run.weight_decay == weight_decay => {
                        run.range.end = end;
                    }
                    _ => runs.push(Run { range: next..end, lr, weight_decay }),
                }
                next = end;
            }
            ranges[index] = start..next;
            next = next.next_multiple_of(ALIGNMENT);
            // The gap before the next parameter belongs to the run before it.
            if let Some(run) = runs.last_mut() {
                run.range.end = next;
            }
        }
        let length = next.next_multiple_of(world_size);
        if let Some(run) = runs.last_mut() {
            run.range.end = length;
        }
        let places = parameters.iter().zip(ranges).map(|(p, range)| place(p, range)).collect();
        let elements = parameters.iter().map(Parameter::elements).sum();
        Self { places, runs, length, elements }
    }
}

fn place(parameter: &Parameter, range: Range<usize>) -> Place {
    let mut start = range.start;
    let parts = parameter
        .parts
        .iter()
        .map(|part| {
            let begin = start;
            start += part.elements();
            (part.clone(), begin..start)
        })
        .collect();
    Place { range, shape: parameter.shape(), parts }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::stage::TensorSpec;

    fn groups() -> ParameterGroups {
        ParameterGroups {
            lr: 1e-3,
            weight_decay: 0.01,
            special: vec![(vec!["classifier".into()], 1e-2)],
        }
    }

    #[test]
    fn runs_cover_the_buffer_and_stacked_parts_are_contiguous() {
        let spec = |name: &str, shape: &[i64]| TensorSpec::new(name, shape);
        let parameters = [
            Parameter::one(spec("norm.bias", &[5]), false),
            Parameter::stacked(vec![spec("q", &[3, 3]), spec("k", &[2, 3])], true),
            Parameter::one(spec("classifier.weight", &[1, 7]), true),
        ];
        let layout = UnitLayout::new(&parameters, &groups(), 3);
        assert_eq!(layout.elements, 5 + 15 + 7);
        assert_eq!(layout.length % 3, 0);
        assert_eq!(layout.places[1].shape, [5, 3]);
        assert_eq!(layout.places[1].range, 0..15);
        assert_eq!(layout.places[1].parts[1].1, 9..15);
        assert_eq!(layout.places[2].range, 16..23);
        assert_eq!(layout.places[0].range, 32..37);
        let mut end = 0;
        for run in &layout.runs {
            assert_eq!(run.range.start, end);
            end = run.range.end;
        }
        assert_eq!(end, layout.length);
        assert_eq!(groups().unmatched(&parameters), Vec::<&str>::new());
        assert_eq!(groups().unmatched(&parameters[..2]), ["classifier"]);
        let rates: Vec<(f64, f64)> = layout.runs.iter().map(|r| (r.lr, r.weight_decay)).collect();
        assert_eq!(rates, [(1e-3, 0.01), (1e-2, 0.01), (1e-3, 0.0)]);
    }

    #[test]
    fn stacked_parts_may_learn_at_rates_of_their_own() {
        let spec = |name: &str| TensorSpec::new(name, &[2, 3]);
        let stacked = Parameter::stacked(vec![spec("q"), spec("key"), spec("v")], true);
        let groups = ParameterGroups { special: vec![(vec!["key".into()], 5e-3)], ..groups() };
        let layout = UnitLayout::new(&[stacked], &groups, 1);
        let runs: Vec<_> = layout.runs.iter().map(|run| (run.range.clone(), run.lr)).collect();
        assert_eq!(runs, [(0..6, 1e-3), (6..12, 5e-3), (12..32, 1e-3)]);
    }
}
