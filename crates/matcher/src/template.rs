//! The form of a rule's tag: `product:{product_id}`, `tenant:{tenant_id}:student:{new.student_id}`.
//!
//! A word, a colon, then literals and columns; so each has a coarse form, `product:*`. Parsed once, at start.

use std::sync::Arc;

use walcast_model::{Tag, TagHash, TagPiece};

/// Which image of a row a column is read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Image {
    /// Both: each gives a tag.
    Either,
    New,
    Old,
}

/// `student_id`, `new.student_id`, `old.student_id`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    pub image: Image,
    pub column: Arc<str>,
}

#[derive(Debug, Clone)]
pub struct Template {
    text: Arc<str>,
    word: Arc<str>,
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone)]
enum Piece {
    Literal(String),
    Column(Reference),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("`{0}` does not begin with a word of a-z, A-Z, 0-9, `_`, `-` and a colon, as `product:` does")]
    Word(String),
    #[error("`{0}` names no column; write one as {{column}}, so that each row has its tag")]
    NoColumn(String),
    #[error("`{0}` has a brace that is not closed, or nothing in it")]
    Brace(String),
    #[error("`{text}` holds `{found}`; between columns there may be letters, digits and `: / _ -`")]
    Literal { text: String, found: char },
    #[error("`{0}` is too long for a tag")]
    TooLong(String),
}

/// What a column is worth, for one image of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled<'a> {
    Value(&'a str),
    /// Null, or there is no such image: no tag.
    Nothing,
    /// The stream does not say.
    Unknown,
}

impl Reference {
    pub fn parse(text: &str) -> Reference {
        let (image, column) = match text.split_once('.') {
            Some(("new", column)) => (Image::New, column),
            Some(("old", column)) => (Image::Old, column),
            _ => (Image::Either, text),
        };
        Reference { image, column: column.into() }
    }
}

impl Template {
    pub fn parse(text: &str) -> Result<Template, TemplateError> {
        let (word, _) = text.split_once(':').ok_or_else(|| TemplateError::Word(text.into()))?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        if word.is_empty() || !word.chars().all(plain) {
            return Err(TemplateError::Word(text.into()));
        }
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((literal, tail)) = rest.split_once('{') {
            let (name, tail) = tail.split_once('}').ok_or_else(|| TemplateError::Brace(text.into()))?;
            let name = name.trim();
            if name.is_empty() || name.contains('{') {
                return Err(TemplateError::Brace(text.into()));
            }
            pieces.extend((!literal.is_empty()).then(|| Piece::Literal(literal.to_owned())));
            pieces.push(Piece::Column(Reference::parse(name)));
            rest = tail;
        }
        if pieces.is_empty() {
            return Err(TemplateError::NoColumn(text.into()));
        }
        pieces.extend((!rest.is_empty()).then(|| Piece::Literal(rest.to_owned())));
        let literals = || pieces.iter().filter_map(|piece| if let Piece::Literal(text) = piece { Some(text) } else { None });
        if let Some(found) = literals().flat_map(|text| text.chars()).find(|c| !plain(*c) && !matches!(c, ':' | '/')) {
            return Err(TemplateError::Literal { text: text.into(), found });
        }
        if literals().map(String::len).sum::<usize>() > Tag::MAX_BYTES / 2 {
            return Err(TemplateError::TooLong(text.into()));
        }
        Ok(Template { text: text.into(), word: word.into(), pieces })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn word(&self) -> &str {
        &self.word
    }

    /// What is raised where the tag itself cannot be told.
    pub fn companion(&self) -> TagHash {
        Tag::any_of(&self.word).hash()
    }

    pub fn columns(&self) -> impl Iterator<Item = &Reference> {
        self.pieces.iter().filter_map(|piece| if let Piece::Column(column) = piece { Some(column) } else { None })
    }

    /// The tag's hash; the companion's if a value is unknown or too long; none if one is null.
    pub fn fill<'a>(&self, value: impl Fn(&Reference) -> Filled<'a>) -> Option<TagHash> {
        let mut parts = Vec::with_capacity(self.pieces.len());
        let mut unknown = false;
        for piece in &self.pieces {
            match piece {
                Piece::Literal(text) => parts.push(TagPiece::Literal(text)),
                Piece::Column(column) => match value(column) {
                    Filled::Value(text) => parts.push(TagPiece::Value(text)),
                    // No tag at all, whatever the others are.
                    Filled::Nothing => return None,
                    Filled::Unknown => unknown = true,
                },
            }
        }
        let tag = if unknown { None } else { Tag::composed(parts.into_iter()) };
        Some(tag.map_or_else(|| self.companion(), |tag| tag.hash()))
    }

    /// Could the rule raise this tag, letter by letter?
    pub fn fits(&self, tag: &Tag) -> bool {
        fits(&self.pieces, tag.as_str())
    }
}

fn fits(pieces: &[Piece], text: &str) -> bool {
    match pieces {
        [] => text.is_empty(),
        [Piece::Literal(literal), rest @ ..] => text.strip_prefix(literal.as_str()).is_some_and(|text| fits(rest, text)),
        [Piece::Column(_), rest @ ..] => {
            let mut ends = text.char_indices().map(|(at, _)| at).chain([text.len()]);
            ends.any(|end| Tag::spells_value(&text[..end]) && fits(rest, &text[end..]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_has_a_word_and_columns() {
        let template = Template::parse("tenant:{tenant_id}:student:{new.id}/x").unwrap();
        assert_eq!(template.word(), "tenant");
        let columns: Vec<_> = template.columns().map(|column| (column.image, &*column.column)).collect();
        assert_eq!(columns, [(Image::Either, "tenant_id"), (Image::New, "id")]);
        for (text, wrong) in [
            ("student", "begin with a word"),
            (":{id}", "begin with a word"),
            ("a b:{id}", "begin with a word"),
            ("{id}:x", "begin with a word"),
            ("student:all", "names no column"),
            ("student:{", "brace"),
            ("student:{}", "brace"),
            ("student:{a{b}", "brace"),
            ("t:id={id}", "holds `=`"),
            ("t:{id}*", "holds `*`"),
            ("t:{id}}", "holds `}`"),
        ] {
            let error = Template::parse(text).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(wrong), "{text}: {error}");
        }
    }

    #[test]
    fn values_are_escaped_null_raises_nothing_and_what_is_unknown_raises_the_coarse_form() {
        let template = Template::parse("s:{a}:{b}").unwrap();
        let fill = |a: Filled<'static>, b: Filled<'static>| template.fill(|column| if &*column.column == "a" { a } else { b });
        let hash = |text: &str| Some(Tag::stored(text).hash());
        assert_eq!(fill(Filled::Value("1"), Filled::Value("x:y")), hash("s:1:x%3Ay"));
        assert_eq!(fill(Filled::Unknown, Filled::Value("1")), hash("s:*"));
        assert_eq!(fill(Filled::Unknown, Filled::Nothing), None);
        let long = "x".repeat(65);
        assert_eq!(template.fill(|_| Filled::Value(&long)), hash("s:*"));
    }

    #[test]
    fn what_a_rule_could_raise_fits_and_nothing_else() {
        let template = Template::parse("a:{x}-{y}/z").unwrap();
        for (text, fit) in [
            ("a:1-2/z", true),
            ("a:1-2-3/z", true),
            ("a:-/z", true),
            ("a:1-2", false),
            ("a:1:1-2/z", false),
            ("a:1.5-2/z", false),
            ("a:1%2E5-2/z", true),
            ("a:1%2e5-2/z", false),
            ("a:*-2/z", false),
        ] {
            assert_eq!(template.fits(&Tag::parse(text).unwrap()), fit, "{text}");
        }
    }
}
