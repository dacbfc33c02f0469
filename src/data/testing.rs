//! Data sets for unit tests, made without a file.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::store::{Form, Place, Sink, TableSink};
use super::{Dataset, DatasetKind, Pair, estimated_tokens};

/// A data set of `(query, document, label)`, each on a line of its own; groups have the sizes
/// given, and there are none where there is no size.
pub(crate) fn dataset<Q: AsRef<str>, D: AsRef<str>>(
    kind: DatasetKind,
    pairs: impl IntoIterator<Item = (Q, D, f32)>,
    group_sizes: &[usize],
) -> Dataset {
    let table = |name| TableSink::new(&Place::Memory, name, Form::Text).unwrap();
    let (mut queries, mut documents) = (table("queries"), table("documents"));
    let [mut kept, mut groups] = ["pairs", "groups"].map(|n| Sink::new(&Place::Memory, n).unwrap());
    let mut known: Vec<String> = Vec::new();
    let push = |table: &mut TableSink, text: &str| {
        table.push(text.as_bytes(), estimated_tokens(text) as u32).unwrap();
    };
    for (number, (query, document, label)) in pairs.into_iter().enumerate() {
        let query = query.as_ref();
        let place = known.iter().position(|text| text == query).unwrap_or_else(|| {
            push(&mut queries, query);
            known.push(query.to_owned());
            known.len() - 1
        });
        push(&mut documents, document.as_ref());
        let number = number as u32;
        let pair = Pair { query: place as u32, document: number, label, line: number + 1 };
        kept.write(&pair.to_bytes()).unwrap();
    }
    let mut end = 0;
    for size in group_sizes {
        end += *size as u32;
        groups.write(&end.to_le_bytes()).unwrap();
    }
    Dataset {
        path: "d".into(),
        kind,
        queries: queries.finish().unwrap().0,
        documents: documents.finish().unwrap().0,
        pairs: kept.finish().unwrap().0,
        groups: groups.finish().unwrap().0,
    }
}
