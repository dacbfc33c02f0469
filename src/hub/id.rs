//! The names of models on the hub.

/// A model of the hub, at a branch, tag or commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubId {
    /// `name` or `org/name`.
    pub(super) name: String,
    /// What stood behind `@`, else `main`.
    pub(super) revision: String,
}

impl HubId {
    /// Reads `text` where it has the shape of a hub id; paths that begin with a dot or a slash, or
    /// go deeper than two names, have not.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let parts: Vec<&str> = name.split('/').collect();
        let is_name = |part: &&str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && !part.ends_with(['.', '-'])
                && !part.contains("..")
                && !part.contains("--")
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let fits = parts.len() <= 2 && parts.iter().all(is_name) && is_revision(revision);
        fits.then(|| Self { name: name.to_owned(), revision: revision.to_owned() })
    }
}

/// A git reference, which becomes a file name below `refs`: `main`, `v1.0`, `refs/pr/3`.
fn is_revision(text: &str) -> bool {
    let is_part = |part: &str| {
        !part.starts_with('.')
            && !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    text.split('/').all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        for (text, expected) in [
            ("gpt2", Some(("gpt2", "main"))),
            ("BAAI/bge-reranker-base", Some(("BAAI/bge-reranker-base", "main"))),
            ("a/b@v1.0", Some(("a/b", "v1.0"))),
            ("a/b@refs/pr/3", Some(("a/b", "refs/pr/3"))),
            ("./a", None),
            ("../a", None),
            ("/a/b", None),
            ("a/b/c", None),
            ("a//b", None),
            ("a/..", None),
            ("a/b ", None),
            ("a/b@", None),
            ("a/b@../x", None),
            ("", None),
        ] {
            let found = HubId::parse(text);
            let found = found.as_ref().map(|id| (&*id.name, &*id.revision));
            assert_eq!(found, expected, "{text:?}");
        }
    }
}
